//! `Create`: the pod's VM for its sandbox, a container in it for all others.

use std::path::PathBuf;
use std::sync::Arc;

use bulkhead_protocol::agent::{CreateContainerRequest, event};
use containerd_shim_protos::events::task::{TaskCreate, TaskIO, TaskOOM};
use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::Spec;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use super::container::{Container, Kind};
use super::error::TaskError;
use super::process::Process;
use super::{Pod, options};
use crate::annotations::Role;
use crate::bundle;
use crate::config::Config;
use crate::io::{ProcessIo, Stdio};
use crate::sandbox::agent::{Agent, ProcessKey};
use crate::sandbox::{Sandbox, blocking};
use crate::share::ShareError;
use crate::spec::{self, GuestSpec, PidChoice};

/// Events of a guest that are listened to in its life. A guest that is out of memory again and again has said so.
const MAX_EVENTS: u32 = 4096;

/// What containerd asks to create.
#[derive(Clone, Debug, Default)]
pub struct CreateTask {
    /// The container.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Mounts of its root file system.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub stdio: Stdio,
    /// Runtime options.
    pub options: Option<Any>,
}

impl Pod {
    /// Creates a task and answers its pid.
    pub async fn create(self: Arc<Self>, task: CreateTask) -> Result<u32, TaskError> {
        let spec = bundle::read_spec(&task.bundle)?;
        let kind = match bundle::spec_role(&spec)? {
            Role::Sandbox => Kind::Sandbox,
            Role::Standalone => Kind::Standalone,
            Role::Member(id) if id == self.identity.sandbox_id => Kind::Member,
            Role::Member(id) => return Err(TaskError::WrongSandbox(id)),
        };
        if self.containers().contains_key(&task.id) {
            return Err(TaskError::Exists(format!("container {}", task.id)));
        }
        let key = ProcessKey { container: task.id.clone(), exec: String::new() };
        let init = Arc::new(Process::new(key, task.stdio.clone()));
        match kind {
            Kind::Sandbox => {
                let sandbox = self.boot(&spec, &task).await?;
                init.borrow_pid(sandbox.vm.pid());
            }
            Kind::Member => self.create_in(&*self.sandbox()?, spec, &task, &init).await?,
            Kind::Standalone => {
                let sandbox = self.boot(&spec, &task).await?;
                let created = self.create_in(&sandbox, spec, &task, &init).await;
                if created.is_err() {
                    self.teardown().await;
                }
                created?;
            }
        }
        self.register(kind, task, init)
    }

    fn register(self: Arc<Self>, kind: Kind, task: CreateTask, init: Arc<Process>) -> Result<u32, TaskError> {
        let pid = init.pid();
        let container = Arc::new(Container::new(task.id.clone(), kind, task.bundle.clone(), init));
        self.containers().insert(task.id.clone(), container.clone());
        let io = TaskIO {
            stdin: task.stdio.stdin,
            stdout: task.stdio.stdout,
            stderr: task.stdio.stderr,
            terminal: task.stdio.terminal,
            ..TaskIO::default()
        };
        self.publisher.publish(&TaskCreate {
            container_id: task.id,
            bundle: task.bundle.display().to_string(),
            rootfs: task.rootfs,
            io: MessageField::some(io),
            pid,
            ..TaskCreate::default()
        });
        self.watch_init(container)?;
        Ok(pid)
    }

    /// Boots the pod's VM, once.
    async fn boot(self: &Arc<Self>, spec: &Spec, task: &CreateTask) -> Result<Arc<Sandbox>, TaskError> {
        let _gate = self.gate.lock().await;
        if self.sandbox_slot().is_some() {
            return Err(TaskError::Exists(format!("sandbox {}", self.identity.sandbox_id)));
        }
        let sandbox_spec = spec::sandbox(spec)?;
        let config = Config::load(options::config_path(task.options.as_ref()).as_deref())?;
        let sandbox = Arc::new(Sandbox::boot(self.identity.run_dir.clone(), sandbox_spec, config).await?);
        *self.sandbox_slot() = Some(sandbox.clone());
        tokio::spawn(self.clone().listen(sandbox.agent.clone()));
        Ok(sandbox)
    }

    /// Creates a container in the VM. On an error nothing of it is left on the host.
    async fn create_in(
        &self,
        sandbox: &Sandbox,
        spec: Spec,
        task: &CreateTask,
        init: &Process,
    ) -> Result<(), TaskError> {
        let created = self.try_create_in(sandbox, spec, task, init).await;
        if created.is_err() {
            let (share, id) = (sandbox.share.clone(), task.id.clone());
            // The guest's side first: it may hold the mounts. What it says does not matter any more.
            let _ = sandbox.agent.delete_container(&id).await;
            let removed: Result<(), ShareError> = blocking(move || share.remove_container(&id)).await;
            if let Err(error) = removed {
                tracing::warn!("{}", super::error::chain(&error));
            }
        }
        created
    }

    async fn try_create_in(
        &self,
        sandbox: &Sandbox,
        spec: Spec,
        task: &CreateTask,
        init: &Process,
    ) -> Result<(), TaskError> {
        let prepared = task.bundle.join(spec::root_path(&spec));
        let guest = spec::translate(spec, &task.id)?;
        let (share, id, rootfs) = (sandbox.share.clone(), task.id.clone(), task.rootfs.clone());
        let volumes = guest.volumes.clone();
        let mounted: Result<(), ShareError> = blocking(move || {
            share.add_rootfs(&id, &rootfs, &prepared)?;
            volumes.iter().enumerate().try_for_each(|(index, volume)| share.add_volume(&id, index, volume))
        })
        .await;
        mounted?;
        sandbox.agent.create_container(self.request(task, guest)).await?;
        init.assign_pid()?;
        init.set_io(ProcessIo::connect(&sandbox.agent, &init.key, &task.stdio).await?);
        Ok(())
    }

    fn request(&self, task: &CreateTask, guest: GuestSpec) -> CreateContainerRequest {
        let target = match guest.pid {
            PidChoice::OfReported(pid) => self.member_with_pid(pid),
            PidChoice::Own | PidChoice::Pod => None,
        };
        CreateContainerRequest {
            container_id: task.id.clone(),
            spec: guest.json,
            streams: MessageField::some(task.stdio.streams()),
            pid_namespace: guest.pid.to_protocol(target.is_some()).into(),
            target_container_id: target.unwrap_or_default(),
            ..CreateContainerRequest::default()
        }
    }

    /// The container whose init was reported with this pid; none for the sandbox's.
    fn member_with_pid(&self, pid: u32) -> Option<String> {
        let containers = self.containers();
        let found = containers.values().find(|one| one.kind != Kind::Sandbox && one.init.pid() == pid);
        found.map(|container| container.id.clone())
    }

    /// Passes the guest's events on, to its end or to their bound.
    async fn listen(self: Arc<Self>, agent: Agent) {
        for _ in 0..MAX_EVENTS {
            match agent.next_event().await {
                Ok(event) => {
                    if let Some(event::Event::Oom(oom)) = event.event
                        && self.container(&oom.container_id).is_ok_and(|container| container.kind != Kind::Sandbox)
                    {
                        let container_id = oom.container_id;
                        self.publisher.publish(&TaskOOM { container_id, ..TaskOOM::default() });
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "no more events of the guest");
                    return;
                }
            }
        }
        tracing::warn!("the guest has sent {MAX_EVENTS} events, no longer listening to them");
    }
}
