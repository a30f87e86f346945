//! `Kill` and `Delete`: both end in bounded time, whatever the guest does (ARCHITECTURE.md, D9).

use std::sync::Arc;

use containerd_shim_protos::events::task::TaskDelete;
use containerd_shim_protos::types::task::Status;
use futures::future::join_all;
use protobuf::MessageField;

use super::Pod;
use super::container::{Container, Kind};
use super::error::TaskError;
use super::process::{Exit, Process};
use crate::about;
use crate::deadlines::{Deadline, Operation};
use crate::sandbox::agent::{AgentError, SIGKILL};
use crate::sandbox::{Sandbox, removing};
use crate::share::ShareError;

/// Signals that end a sandbox: HUP, INT, QUIT, ABRT, KILL, TERM. The pause program would ignore the others.
const ENDING: [u32; 6] = [1, 2, 3, 6, SIGKILL, 15];

/// What is left of a process.
#[derive(Clone, Debug)]
pub struct Deleted {
    /// The pid that it had.
    pub pid: u32,
    /// How it ended.
    pub exit: Exit,
}

impl Pod {
    /// Sends a signal to a process, or to all of a container's.
    pub async fn kill(
        self: Arc<Self>,
        mut deadline: Deadline,
        id: String,
        exec: String,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let container = self.container(&id)?;
        let process = self.process(&id, &exec)?;
        if !exec.is_empty() && process.status() == Status::CREATED {
            // A start that is under way comes first, and has its own bound: what it makes is what is to be killed.
            drop(process.order.lock().await);
            deadline = Deadline::begin(Operation::Kill);
        }
        match process.status() {
            Status::STOPPED => return Err(TaskError::Finished),
            Status::CREATED if !exec.is_empty() => {
                return Err(TaskError::State { what: "kill", state: "created" });
            }
            _ => {}
        }
        // The process went with its VM, and is about to be recorded as ended. containerd takes no other error for that.
        let sandbox = self.sandbox().map_err(|_| TaskError::Finished)?;
        if container.kind == Kind::Sandbox {
            if ENDING.contains(&signal) {
                // containerd waits for the end by Wait, not by the answer to Kill.
                tokio::spawn(async move { sandbox.stop().await });
            }
            return Ok(());
        }
        let answer = sandbox.agent.signal(deadline, &process.key, signal, all).await;
        if signal == SIGKILL {
            about::spawn(self.clone().see_ended(container, process, sandbox.clone()));
        }
        match answer {
            Err(AgentError::Refused { code: ttrpc::Code::NOT_FOUND, .. }) => Err(TaskError::Finished),
            Err(error @ AgentError::Refused { .. }) => Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "the guest cannot deliver a signal; killing the VM");
                sandbox.vm.kill().await;
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Deletes an ended process, with all that is left of it.
    pub async fn delete(self: Arc<Self>, deadline: Deadline, id: String, exec: String) -> Result<Deleted, TaskError> {
        if exec.is_empty() {
            self.delete_container(deadline, &*self.created(&id)?).await
        } else {
            self.delete_exec(&*self.container(&id)?, &exec).await
        }
    }

    /// A container that is to be deleted. One that is still being created is not there, and is not going to be: containerd
    /// deletes what it has not waited for, and then forgets it.
    fn created(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        let creating = self.creating();
        let found = self.container(id);
        if found.is_err()
            && let Some(deleted) = creating.get(id)
        {
            deleted.send_replace(true);
        }
        found
    }

    async fn delete_exec(&self, container: &Container, exec: &str) -> Result<Deleted, TaskError> {
        let process = container.exec(exec)?;
        // A start that is under way says whether there is a process to forget. It has its own bound.
        let _order = process.order.lock().await;
        let deadline = Deadline::begin(Operation::Delete);
        container.exec(exec)?;
        process.expect("delete", &[Status::STOPPED, Status::CREATED])?;
        // It may never have been started. Then callers of `Wait` get an answer now, and a start is refused from now on.
        process.ended(Exit::now(Exit::KILLED));
        finish_io(deadline, &process).await;
        if let Ok(sandbox) = self.sandbox()
            && process.io().is_some()
        {
            tolerate(&sandbox, sandbox.agent.delete_process(deadline, &process.key).await).await;
        }
        container.remove_exec(exec);
        Ok(deleted(&process))
    }

    async fn delete_container(&self, deadline: Deadline, container: &Container) -> Result<Deleted, TaskError> {
        let init = &container.init;
        if init.status() == Status::CREATED {
            self.end_unstarted(deadline, container).await;
        }
        init.expect("delete", &[Status::STOPPED])?;
        // containerd gives up after 10 s and asks again: the second call waits for the first, and finds nothing.
        let _order = init.order.lock().await;
        self.container(&container.id)?;
        // All at once: containerd does not wait longer for having executed more.
        let execs = container.all_execs();
        join_all(execs.iter().chain([init]).map(|process| finish_io(deadline, process))).await;
        if container.kind == Kind::Sandbox {
            self.teardown().await;
        } else {
            self.remove_member(deadline, container).await?;
        }
        self.containers().remove(&container.id);
        self.end_execs(container);
        let deleted = deleted(init);
        self.publisher.publish(&TaskDelete {
            container_id: container.id.clone(),
            pid: deleted.pid,
            exit_status: deleted.exit.code,
            exited_at: MessageField::some(deleted.exit.at.clone()),
            ..TaskDelete::default()
        });
        container.hooks.deleted().await;
        self.end_if_empty();
        Ok(deleted)
    }

    /// Ends the execs of a container that is gone: they can neither start nor report their end any more. Callers of `Wait` get
    /// an answer, and containerd gets an event for each exec of whose start it knows.
    fn end_execs(&self, container: &Container) {
        for process in container.all_execs() {
            self.let_go(container, &process);
        }
    }

    /// Ends an exec here, whatever the guest says of it.
    fn let_go(&self, container: &Container, process: &Process) {
        let started = process.status() != Status::CREATED;
        let exit = Exit::now(Exit::KILLED);
        if process.ended(exit.clone()) && started {
            self.tell_exit(container, process, exit);
        }
    }

    /// Sees to the end of a process that was sent SIGKILL, whatever the guest answered. If a container goes on, we kill the VM:
    /// else its pod could not be removed. If an exec goes on, we report it as ended: it may wait in the guest's kernel for a
    /// file server of the host, and a probe that hangs must not end its pod.
    async fn see_ended(self: Arc<Self>, container: Arc<Container>, process: Arc<Process>, sandbox: Arc<Sandbox>) {
        if Deadline::begin(Operation::KilledEnds).timeout(process.wait()).await.is_ok() {
            return;
        }
        let limit = Operation::KilledEnds.budget();
        if process.key.exec.is_empty() {
            tracing::warn!("a container goes on {limit:?} after SIGKILL; killing the VM");
            sandbox.vm.kill().await;
            return;
        }
        tracing::warn!("an exec goes on {limit:?} after SIGKILL; reporting it as ended, the pod goes on");
        self.let_go(&container, &process);
    }

    async fn remove_member(&self, deadline: Deadline, container: &Container) -> Result<(), TaskError> {
        if container.kind == Kind::Standalone {
            self.teardown().await;
            return Ok(());
        }
        // The VM may have ended and be gone; the container's mounts went with it then.
        let Some(sandbox) = self.sandbox_slot().clone() else { return Ok(()) };
        let goes_on = !sandbox.vm.has_ended()
            && tolerate(&sandbox, sandbox.agent.delete_container(deadline, &container.id).await).await;
        sandbox.volumes.remove(&container.id);
        sandbox.container_ended(&container.id);
        if goes_on {
            sandbox.detach_disks(deadline.part(Operation::DetachDisks), &container.id).await;
            drop(sandbox.give_back());
        }
        let (share, id) = (sandbox.share.clone(), container.id.clone());
        let removed: Result<(), ShareError> = removing(move || share.remove_container(&id)).await;
        Ok(removed?)
    }

    /// A created container has a process that waits to be started; it is killed first.
    async fn end_unstarted(&self, deadline: Deadline, container: &Container) {
        let ended = |deadline: Deadline| deadline.part(Operation::ProcessEnds).timeout(container.init.wait());
        let Ok(sandbox) = self.sandbox() else {
            // The VM has ended, and with it the container as soon as its output has been copied.
            let _ = ended(deadline).await;
            return;
        };
        if container.kind == Kind::Sandbox {
            sandbox.stop().await;
            let _ = ended(deadline).await;
            return;
        }
        let deadline = deadline.part(Operation::EndUnstarted);
        let killed = async {
            let _ = sandbox.agent.signal(deadline, &container.init.key, SIGKILL, true).await;
            container.init.wait().await
        };
        if deadline.part(Operation::ProcessEnds).timeout(killed).await.is_err() {
            sandbox.vm.kill().await;
            // Not for ever: what waits for a disk of the host has not ended, and is said not to have.
            let _ = ended(deadline).await;
        }
    }
}

async fn finish_io(deadline: Deadline, process: &Process) {
    if let Some(io) = process.io() {
        io.finish(deadline.part(Operation::DrainOutput)).await;
    }
}

/// A refusal while cleaning up is logged; a guest that does not answer at all has its VM killed. Answers whether the VM goes on.
async fn tolerate(sandbox: &Sandbox, answer: Result<(), AgentError>) -> bool {
    match answer {
        Ok(()) => true,
        Err(error @ AgentError::Refused { .. }) => {
            tracing::warn!(%error, "the guest could not remove what it has of a process");
            true
        }
        Err(error) => {
            tracing::warn!(%error, "the guest does not answer to the removal of a process; killing the VM");
            sandbox.vm.kill().await;
            false
        }
    }
}

fn deleted(process: &Process) -> Deleted {
    Deleted { pid: process.pid(), exit: process.exit().unwrap_or_default() }
}
