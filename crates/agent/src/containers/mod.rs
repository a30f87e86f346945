//! The pod's containers: which there are, what state each is in, and the verbs of the agent's service on them.
//!
//! State is split by owner. This table holds containers, a container its processes, [`Streams`] their streams, the reaper
//! their pids. Locks are held for look-ups only: never two at a time, never across an await.

mod container;
pub mod error;
mod process;
mod share;
mod spec;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::agent::{
    CreateContainerRequest, ExecRequest, PidNamespace, Streams as Wanted, UpdateVolumeRequest, UserNamespace,
};
use bulkhead_protocol::guest::{MAX_IDENTIFIER, is_identifier};
use bulkhead_protocol::stdio::Stream;
use tokio::sync::OnceCell;

use crate::cgroup::Cgroup;
use crate::layers::Layers;
use crate::netns::Netns;
use crate::reaper::{ExitWatch, Reaper};
use crate::runtime::message::{IdMaps, WindowSize};
use crate::runtime::{Created, Runtime};
use crate::stdio::{Owner, Streams, ends};
use crate::volumes::Volumes;
use crate::{events, sys};
pub use container::Container;
use container::Phase;
pub use error::ContainerError;
pub use process::Process;
use share::Share;
use spec::Placement;

/// Highest signal number, the last of the real-time ones (signal(7)).
const MAX_SIGNAL: u32 = 64;

/// All containers of the pod.
#[derive(Debug)]
pub struct Containers {
    runtime: Runtime,
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    events: events::Sender,
    table: Mutex<HashMap<String, Arc<Container>>>,
    /// The init of the shared pid namespace, made when the first container asks for it, or with the pod's user namespace.
    pod_init: OnceCell<(u32, ExitWatch)>,
    netns: Netns,
    exec_serial: AtomicU64,
    share: Share,
    layers: Layers,
}

impl Containers {
    /// No container yet.
    pub fn new(runtime: Runtime, streams: Arc<Streams>, netns: Netns, events: events::Sender) -> Self {
        Self {
            reaper: runtime.reaper(),
            runtime,
            streams,
            events,
            table: Mutex::default(),
            pod_init: OnceCell::new(),
            netns,
            exec_serial: AtomicU64::new(0),
            share: Share::default(),
            layers: Layers::default(),
        }
    }

    /// The images that their root file systems may be made of.
    pub fn layers(&self) -> Layers {
        self.layers.clone()
    }

    /// A container by its id.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        self.table().get(id).cloned().ok_or_else(|| ContainerError::NoContainer { id: id.into() })
    }

    /// A process of a container; an empty exec id means init.
    pub fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        self.get(id)?.process(exec_id)
    }

    /// Makes the pod a user namespace, to which its network and its shared pid namespace belong. Before any container.
    pub async fn create_user_namespace(&self, user: &UserNamespace) -> Result<(), ContainerError> {
        self.netns.set(self.pod_init(Some(IdMaps::of(user))).await?);
        Ok(())
    }

    /// Creates a container whose init waits to be started.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<(), ContainerError> {
        check_id(&request.container_id)?;
        let id = request.container_id.clone();
        let container = self.reserve(&id)?;
        let share = self.share.clone();
        // Beside the creation, which does not depend on it.
        tokio::task::spawn_blocking(move || share.look());
        let created = self.create_reserved(&container, &request).await;
        if created.is_err() {
            self.forget(&container).await;
        }
        created
    }

    async fn create_reserved(
        &self,
        container: &Arc<Container>,
        request: &CreateContainerRequest,
    ) -> Result<(), ContainerError> {
        let id = container.id();
        let pid_namespace = request.pid_namespace.enum_value_or_default();
        let placement = Placement {
            cgroup: container.cgroup().path().into(),
            pid_namespace: self.pid_namespace(pid_namespace, &request.target_container_id).await?,
            holder: self.holder()?,
            terminal: request.streams.terminal,
        };
        let (json, copies, copied) = (request.spec.clone(), Volumes::of(id), request.copied_volumes.clone());
        let (share, owner, volumes) = (self.share.clone(), id.to_owned(), request.volumes.clone());
        let (layers, root) = (self.layers.clone(), request.root.clone());
        let spec = blocking(move || {
            share.enter(&owner, &volumes);
            if let Some(root) = root.as_ref() {
                layers.create(&owner, root)?;
            }
            copies.create(&copied)?;
            spec::adapt(&json, &placement)
        })
        .await?;
        if let Some(process) = spec.process() {
            container.set_init_spec(process.clone());
        }
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        container.cgroup().restrict_devices(rules.unwrap_or_default())?;
        let (stdio, ours) = ends::make(&request.streams).map_err(ContainerError::Streams)?;
        let created = self.runtime.create(id, spec, stdio).await?;
        let process = self.adopt(container, "", created, ours, &request.streams)?;
        container.set_phase(Phase::Created);
        let shares_pids = pid_namespace != PidNamespace::PID_NAMESPACE_OWN;
        tokio::spawn(container::follow(Arc::clone(container), process, self.events.clone(), shares_pids));
        Ok(())
    }

    /// Starts a created container.
    pub async fn start(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        container.advance(Phase::Created, Phase::Running)?;
        let started = self.runtime.start(id).await;
        if started.is_err() {
            container.set_phase(Phase::Created);
        }
        started.map_err(Into::into)
    }

    /// Removes a container whose init has ended, with whatever its processes have left.
    pub async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        container.begin_deletion()?;
        container.cgroup().kill_and_wait().await?;
        container.execs_made().await?;
        container.cgroup().kill_and_wait().await?;
        container.cgroup().remove()?;
        let (share, root_of) = (self.share.clone(), id.to_owned());
        let _ = tokio::task::spawn_blocking(move || share.unmount_root(&root_of)).await;
        self.runtime.delete(id)?;
        Volumes::of(id).remove()?;
        let (layers, owner) = (self.layers.clone(), id.to_owned());
        blocking(move || Ok(layers.remove(&owner)?)).await?;
        self.streams.remove_container(id);
        self.share.leave(id);
        self.table().remove(id);
        Ok(())
    }

    /// Goes on to a later version of a volume of which the guest keeps a copy.
    pub async fn update_volume(&self, request: UpdateVolumeRequest) -> Result<(), ContainerError> {
        let volumes = Volumes::of(self.get(&request.container_id)?.id());
        blocking(move || Ok(volumes.update(request.volume.get_or_default())?)).await
    }

    /// Creates a process in a running container; it runs at once.
    pub async fn exec(&self, request: ExecRequest) -> Result<(), ContainerError> {
        check_id(&request.exec_id)?;
        let container = self.get(&request.container_id)?;
        container.reserve_exec(&request.exec_id)?;
        let created = self.exec_reserved(&container, &request).await;
        if created.is_err() {
            container.forget_exec(&request.exec_id);
        }
        created
    }

    async fn exec_reserved(&self, container: &Container, request: &ExecRequest) -> Result<(), ContainerError> {
        let process = spec::adapt_process(&request.process, request.streams.terminal, container.init_spec())?;
        let (stdio, ours) = ends::make(&request.streams).map_err(ContainerError::Streams)?;
        let init = container.process("")?;
        // Until it has, nobody may look at the namespaces that it has joined (ptrace(2), access mode checks).
        init.executed().await;
        let group = container.cgroup().group_for_exec(init.pid());
        let serial = self.exec_serial.fetch_add(1, Ordering::Relaxed);
        let created = self.runtime.exec(container.id(), group, serial, process, stdio).await?;
        self.adopt(container, &request.exec_id, created, ours, &request.streams).map(drop)
    }

    /// Forgets an exec that has ended.
    pub fn delete_exec(&self, id: &str, exec_id: &str) -> Result<(), ContainerError> {
        let container = self.get(id)?;
        if exec_id.is_empty() {
            return Err(ContainerError::State { id: id.into(), is: "not an exec", wanted: "deleted as a container" });
        }
        if !container.process(exec_id)?.ended() {
            return Err(ContainerError::State { id: exec_id.into(), is: "running", wanted: "ended" });
        }
        container.forget_exec(exec_id);
        self.streams.remove(&Owner { container_id: id.into(), exec_id: exec_id.into() });
        Ok(())
    }

    /// What has been written to a process's stdout and stderr so far.
    pub fn written(&self, id: &str, exec_id: &str) -> (Option<u64>, Option<u64>) {
        let owner = Owner { container_id: id.into(), exec_id: exec_id.into() };
        (self.streams.written(&owner, Stream::Stdout), self.streams.written(&owner, Stream::Stderr))
    }

    /// Sends a signal to a process, or to every process of the container.
    pub fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), ContainerError> {
        if signal > MAX_SIGNAL {
            return Err(ContainerError::BadSignal { signal });
        }
        let container = self.get(id)?;
        if all {
            return container.signal_all(signal);
        }
        let process = container.process(exec_id)?;
        let source = match self.reaper.kill(process.pid(), signal) {
            Ok(true) => return Ok(()),
            Ok(false) => return Err(ContainerError::Ended { id: id.into(), exec_id: exec_id.into() }),
            Err(source) => source,
        };
        Err(ContainerError::Signal { pid: process.pid(), signal, source })
    }

    /// Changes the size of a process's terminal.
    pub fn resize(&self, id: &str, exec_id: &str, size: WindowSize) -> Result<(), ContainerError> {
        if self.process(id, exec_id)?.resize(size).map_err(ContainerError::Resize)? {
            return Ok(());
        }
        Err(ContainerError::NoTerminal { id: id.into(), exec_id: exec_id.into() })
    }

    /// Makes the agent the keeper of a process that was created, and of its streams.
    fn adopt(
        &self,
        container: &Container,
        exec_id: &str,
        created: Created,
        mut ours: ends::AgentEnds,
        wanted: &Wanted,
    ) -> Result<Arc<Process>, ContainerError> {
        if let Some(master) = &created.terminal {
            let ends = ends::terminal_ends(wanted, master).inspect_err(|_| {
                // Nobody would know of it.
                let _ = self.reaper.kill(created.pid, sys::SIGKILL);
            });
            ours.extend(ends.map_err(ContainerError::Streams)?);
        }
        self.streams.add(Owner { container_id: container.id().into(), exec_id: exec_id.into() }, ours);
        let process = Arc::new(Process::new(created));
        container.add_process(exec_id, Arc::clone(&process));
        Ok(process)
    }

    /// The pid namespace that a new container joins; `None` for one of its own.
    async fn pid_namespace(&self, kind: PidNamespace, target: &str) -> Result<Option<u32>, ContainerError> {
        match kind {
            PidNamespace::PID_NAMESPACE_OWN => Ok(None),
            PidNamespace::PID_NAMESPACE_TARGET => {
                let init = self.process(target, "")?;
                // Its pid may be another's by now.
                if init.ended() {
                    return Err(ContainerError::State { id: target.into(), is: "ended", wanted: "running" });
                }
                Ok(Some(init.pid()))
            }
            PidNamespace::PID_NAMESPACE_POD => self.pod_init(None).await.map(Some),
        }
    }

    /// The init of the shared pid namespace.
    async fn pod_init(&self, user: Option<IdMaps>) -> Result<u32, ContainerError> {
        let create = async || {
            let created = self.runtime.pod_namespaces(user).await?;
            Ok::<_, ContainerError>((created.pid, created.exit))
        };
        let (pid, exit) = self.pod_init.get_or_try_init(create).await?;
        if exit.ended() { Err(ContainerError::NoPodNamespace) } else { Ok(*pid) }
    }

    /// The process in the pod's user and network namespaces, if it has its own.
    fn holder(&self) -> Result<Option<u32>, ContainerError> {
        let ended = self.pod_init.get().is_some_and(|(_, exit)| exit.ended());
        let holder = self.netns.holder();
        if ended && holder.is_some() { Err(ContainerError::NoPodNamespace) } else { Ok(holder) }
    }

    /// Enters a container in the table before it exists, so that its id is taken.
    fn reserve(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(ContainerError::ContainerExists { id: id.into() });
        }
        let container = Arc::new(Container::new(id, Cgroup::create(id)?));
        table.insert(id.into(), Arc::clone(&container));
        Ok(container)
    }

    /// Takes back a container that could not be created. What cannot be undone is only logged: the cause was told.
    async fn forget(&self, container: &Container) {
        let id = container.id();
        if let Err(error) = container.cgroup().kill_and_wait().await {
            tracing::warn!(id, %error, "a container that was not created leaves processes behind");
        }
        if let Err(error) = container.cgroup().remove() {
            tracing::warn!(id, %error, "a container that was not created leaves a control group behind");
        }
        if let Err(error) = self.runtime.delete(id) {
            tracing::warn!(id, %error, "a container that was not created leaves files behind");
        }
        if let Err(error) = Volumes::of(id).remove() {
            tracing::warn!(id, %error, "a container that was not created leaves volumes behind");
        }
        let (layers, owner) = (self.layers.clone(), id.to_owned());
        if let Err(error) = blocking(move || Ok(layers.remove(&owner)?)).await {
            tracing::warn!(id, %error, "a container that was not created leaves image layers behind");
        }
        self.streams.remove_container(id);
        self.share.leave(id);
        self.table().remove(id);
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs what may wait for the host beside the event loop.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ContainerError> + Send + 'static,
) -> Result<T, ContainerError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ContainerError::Ending)?
}

/// Ids become names of files and control groups.
fn check_id(id: &str) -> Result<(), ContainerError> {
    if is_identifier(id) {
        return Ok(());
    }
    Err(ContainerError::BadId { id: id.chars().take(MAX_IDENTIFIER).collect() })
}
