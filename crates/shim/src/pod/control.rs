//! Calls on a running container: pause, resume, update, numbers, terminal size, closing stdin; and the VM's counters.

use std::sync::Arc;

use bulkhead_protocol::counters::DeviceCounters;
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use containerd_shim_protos::types::task::Status;
use protobuf::well_known_types::any::Any;

use super::Pod;
use super::container::{Container, Kind};
use super::error::TaskError;
use crate::deadlines::{Deadline, Operation};
use crate::sandbox::SandboxError;
use crate::{spec, stats};

impl Pod {
    /// Freezes a container.
    pub async fn pause(self: Arc<Self>, deadline: Deadline, id: String) -> Result<(), TaskError> {
        let container = self.member(&id)?;
        container.init.expect("pause", &[Status::RUNNING])?;
        self.sandbox()?.agent.pause_container(deadline, &id).await?;
        container.init.set_status(Status::PAUSED);
        self.publisher.publish(&TaskPaused { container_id: id, ..TaskPaused::default() });
        Ok(())
    }

    /// Thaws a container.
    pub async fn resume(self: Arc<Self>, deadline: Deadline, id: String) -> Result<(), TaskError> {
        let container = self.member(&id)?;
        container.init.expect("resume", &[Status::PAUSED])?;
        self.sandbox()?.agent.resume_container(deadline, &id).await?;
        container.init.set_status(Status::RUNNING);
        self.publisher.publish(&TaskResumed { container_id: id, ..TaskResumed::default() });
        Ok(())
    }

    /// Changes a container's resources; `resources` is OCI JSON.
    pub async fn update(self: Arc<Self>, deadline: Deadline, id: String, resources: Vec<u8>) -> Result<(), TaskError> {
        let container = self.container(&id)?;
        if container.kind == Kind::Sandbox {
            // The sandbox has no process to limit.
            return Ok(());
        }
        container.init.expect("update", &[Status::CREATED, Status::RUNNING, Status::PAUSED])?;
        let resources = spec::parse_resources(&resources)?;
        let sandbox = self.sandbox()?;
        let mut limits = sandbox.limits(&id);
        limits.update(&resources);
        let json = spec::translate_resources(resources)?;
        let change = async { Ok(sandbox.agent.update_container(deadline, &id, json).await?) };
        let changed = sandbox.change_limits(deadline, &id, limits, change).await;
        let _ = deadline.part(Operation::AwaitShrinking).timeout(sandbox.give_back()).await;
        changed
    }

    /// A container's numbers, also after its end; the last ones that are known if the guest is slow. The sandbox's own are none:
    /// nothing runs in it.
    pub async fn stats(&self, deadline: Deadline, id: &str) -> Result<Any, TaskError> {
        let container = self.container(id)?;
        if container.kind == Kind::Sandbox {
            return Ok(stats::empty()?);
        }
        let (agent, id) = (self.sandbox()?.agent.clone(), id.to_owned());
        container.stats.get(deadline, async move { Ok(stats::pack(agent.stats(&id).await?)?) }).await
    }

    /// What the devices of the VM have counted.
    pub async fn counters(&self, deadline: Deadline) -> Result<Vec<DeviceCounters>, TaskError> {
        Ok(self.sandbox()?.vm.counters(deadline).await.map_err(SandboxError::from)?)
    }

    /// Sets a terminal's size.
    pub async fn resize(
        &self,
        deadline: Deadline,
        id: &str,
        exec: &str,
        width: u32,
        height: u32,
    ) -> Result<(), TaskError> {
        let process = self.process(id, exec)?;
        process.expect("resize the terminal of", &[Status::CREATED, Status::RUNNING, Status::PAUSED])?;
        if self.container(id)?.kind == Kind::Sandbox || process.pid() == 0 {
            return Ok(());
        }
        Ok(self.sandbox()?.agent.resize(deadline, &process.key, width, height).await?)
    }

    /// Closes a process's stdin once what is in it has been read.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Result<(), TaskError> {
        self.process(id, exec)?.close_stdin();
        Ok(())
    }

    fn member(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let container = self.container(id)?;
        if container.kind == Kind::Sandbox {
            return Err(TaskError::Unsupported("pausing a sandbox"));
        }
        Ok(container)
    }
}
