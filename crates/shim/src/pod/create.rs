//! `Create`: the pod's VM for its sandbox, a container in it for all others.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::{CreateContainerRequest, event};
use containerd_shim_protos::events::task::{TaskCreate, TaskIO, TaskOOM};
use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::Spec;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tokio::sync::watch;

use super::container::{Container, Kind};
use super::error::{TaskError, expect_identifier};
use super::hooks::ContainerHooks;
use super::process::Process;
use super::{Pod, options};
use crate::about;
use crate::annotations::Role;
use crate::bundle;
use crate::config::Config;
use crate::deadlines::{Deadline, Operation};
use crate::host_files;
use crate::host_pid::Users;
use crate::io::{ProcessIo, Stdio};
use crate::layers::{self, Layered};
use crate::sandbox::agent::{Agent, AgentError, ProcessKey, SIGKILL};
use crate::sandbox::{OpenLayers, Sandbox, demand, removing};
use crate::share::ShareError;
use crate::spec::{
    self, Asker, ConsoleSize, Given, GuestSpec, GuestVolume, HugeVolume, PidChoice, SandboxSpec, Volume,
};

/// Events of a guest that are listened to in its life. A guest that is out of memory again and again has said so.
const MAX_EVENTS: u32 = 4096;

/// Time from one event to the next that is listened to: what comes meanwhile waits in the guest, so that a flood of them is
/// neither passed on nor keeps other events from containerd.
const EVENT_PACE: Duration = Duration::from_secs(1);

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

/// The configuration that the task's options name, if they name one.
fn config_path(task: &CreateTask) -> Option<PathBuf> {
    options::config_path(task.options.as_ref())
}

impl Pod {
    /// Creates a task and answers its pid.
    pub async fn create(self: Arc<Self>, deadline: Deadline, mut task: CreateTask) -> Result<u32, TaskError> {
        expect_identifier(&task.id, "the container id is not an identifier of containerd")?;
        let _creation = Creation::begin(self.clone(), &task.id)?;
        let bundle = task.bundle.clone();
        let mut spec = host_files::CONTAINERS.run(deadline, move || bundle::read_spec(&bundle)).await??;
        spec::refuse_namespaces(&spec)?;
        task.stdio.console = spec.process().as_ref().map(ConsoleSize::of).unwrap_or_default();
        let hooks = ContainerHooks::new(spec::take_hooks(&mut spec)?, &spec, &task.id, &task.bundle);
        about::note_pod(spec.annotations().as_ref());
        let kind = match bundle::spec_role(&spec)? {
            Role::Sandbox => Kind::Sandbox,
            Role::Standalone => Kind::Standalone,
            Role::Member(id) if id == self.identity.sandbox_id => Kind::Member,
            Role::Member(id) => return Err(TaskError::WrongSandbox(id)),
        };
        let key = ProcessKey { container: task.id.clone(), exec: String::new() };
        let init = Arc::new(Process::new(key, task.stdio.clone()));
        let container = Arc::new(Container::new(task.id.clone(), kind, task.bundle.clone(), init, hooks));
        let (init, hooks) = (&container.init, &container.hooks);
        match kind {
            Kind::Sandbox => {
                let deadline = deadline.turned_into(Operation::CreatePod);
                init.set_io(ProcessIo::hold(deadline, &task.stdio).await?);
                let sandbox_spec = spec::sandbox(&spec)?;
                let (config, deadline) = configured(deadline, config_path(&task)).await?;
                let sandbox = self.boot(deadline, sandbox_spec, config).await?;
                self.or_take_back(init.assign_pid(&self.keeper, &spec::arguments(&spec)).map(drop)).await?;
                self.or_take_back(hooks.created(init.pid()).await).await?;
                self.or_take_back(self.register(&container, &task, &sandbox)).await?;
            }
            Kind::Member => self.create_in(deadline, &self.sandbox()?, spec, &task, &container).await?,
            Kind::Standalone => {
                spec::refuse_shared(&spec)?;
                // Docker has no word for a privileged container without them; a client of containerd's has, and is told it.
                if Asker::of(&spec) == Asker::Docker {
                    spec::leave_out_hosts(&mut spec);
                }
                // A pod's VM is there already. This one would be made in vain.
                spec::check(&spec, &task.id)?;
                let deadline = deadline.turned_into(Operation::CreateStandalone);
                let sandbox_spec = spec::sandbox(&spec)?;
                let (config, deadline) = configured(deadline, config_path(&task)).await?;
                let sandbox = self.boot(deadline, sandbox_spec, config).await?;
                self.or_take_back(self.create_in(deadline, &sandbox, spec, &task, &container).await).await?;
            }
        }
        Ok(container.init.pid())
    }

    /// Takes the VM down again if what follows its boot has failed.
    async fn or_take_back<E>(&self, outcome: Result<(), E>) -> Result<(), E> {
        if outcome.is_err() {
            self.take_back().await;
        }
        outcome
    }

    /// Makes a container known, unless it has been deleted already: whoever asked for it does not wait any more.
    fn register(
        self: &Arc<Self>,
        container: &Arc<Container>,
        task: &CreateTask,
        sandbox: &Arc<Sandbox>,
    ) -> Result<(), TaskError> {
        let creating = self.creating();
        if creating.get(&task.id).is_some_and(|deleted| *deleted.borrow()) {
            return Err(TaskError::Deleted(task.id.clone()));
        }
        self.containers().insert(task.id.clone(), container.clone());
        drop(creating);
        let stdio = task.stdio.clone();
        let io = TaskIO {
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            ..TaskIO::default()
        };
        self.publisher.publish(&TaskCreate {
            container_id: task.id.clone(),
            bundle: task.bundle.display().to_string(),
            rootfs: task.rootfs.clone(),
            io: MessageField::some(io),
            pid: container.init.pid(),
            ..TaskCreate::default()
        });
        // Of a VM that has ended meanwhile as well: that ends the container, which can be deleted then.
        self.watch_init(container.clone(), sandbox.clone());
        Ok(())
    }

    /// Boots the pod's VM, once.
    pub(super) async fn boot(
        self: &Arc<Self>,
        deadline: Deadline,
        spec: SandboxSpec,
        config: Config,
    ) -> Result<Arc<Sandbox>, TaskError> {
        let _gate = self.gate.lock().await;
        if self.sandbox_slot().is_some() {
            return Err(TaskError::Exists(format!("sandbox {}", self.identity.sandbox_id)));
        }
        let users = if spec.user.is_some() { Users::Own } else { Users::Nodes };
        let sandbox = Arc::new(Sandbox::boot(deadline, self.identity.run_dir.clone(), spec, config).await?);
        if let Err(error) = self.keeper.enter(sandbox.namespace(), users) {
            sandbox.destroy().await;
            return Err(TaskError::HostPid(error));
        }
        self.identity.run_dir.link_socket(self.identity.endpoint.socket());
        *self.sandbox_slot() = Some(sandbox.clone());
        tokio::spawn(self.clone().listen(sandbox.agent.clone()));
        tokio::spawn(demand::follow(sandbox.clone()));
        Ok(sandbox)
    }

    /// Creates a container in the VM. On an error nothing of it is left on the host.
    async fn create_in(
        self: &Arc<Self>,
        deadline: Deadline,
        sandbox: &Arc<Sandbox>,
        spec: Spec,
        task: &CreateTask,
        container: &Arc<Container>,
    ) -> Result<(), TaskError> {
        let (init, hooks) = (&container.init, &container.hooks);
        let making = deadline.part(Operation::MakeContainer);
        let created = match self.try_create_in(making, sandbox, spec, task, init).await {
            Ok(()) => hooks.created(init.pid()).await.map_err(TaskError::from),
            failed => failed,
        };
        let created = match created {
            Ok(()) if container.kind == Kind::Standalone => {
                sandbox.follow_network(deadline.part(Operation::CarryNetwork)).await.map_err(TaskError::from)
            }
            other => other,
        };
        let created = created.and_then(|()| self.register(container, task, sandbox));
        if created.is_err() {
            // Whatever the creation has left of the call's time: nothing of it may stay.
            take_back(Deadline::begin(Operation::TakeBackContainer), sandbox, &init.key).await;
        }
        created
    }

    async fn try_create_in(
        &self,
        deadline: Deadline,
        sandbox: &Sandbox,
        spec: Spec,
        task: &CreateTask,
        init: &Process,
    ) -> Result<(), TaskError> {
        sandbox.attach_network(deadline).await?;
        let arguments = spec::arguments(&spec);
        let prepared = task.bundle.join(spec::root_path(&spec));
        let wanted = spec::disks(&spec)?;
        let mut limits = spec::limits(&spec);
        let (spec, huge_volumes) = with_huge_volumes(deadline, sandbox, spec).await?;
        let volumes = spec::volumes(&spec, &huge_volumes)?;
        for page_kib in huge_volumes.iter().map(|volume| volume.page_kib) {
            sandbox.complete_huge_pages(&mut limits, page_kib);
        }
        let (layered, layers) = open_layers(deadline, task).await?.unzip();
        limits.image_bytes = layers.as_ref().map_or(0, OpenLayers::bytes);
        sandbox.make_room(deadline, &task.id, limits).await?;
        let disks = sandbox.attach_disks(deadline, &task.id, &wanted).await?;
        let root = match layers {
            Some(layers) => Some(sandbox.attach_layers(deadline, &task.id, layers).await?),
            None => None,
        };
        let volumes = mount(deadline, sandbox, task, layered, prepared, volumes).await?;
        let given = Given { disks, huge_volumes, volumes };
        let guest = spec::translate(spec, &task.id, &given)?;
        let request = CreateContainerRequest {
            root: root.into(),
            volumes: given.volumes.iter().map(|volume| volume.number).collect(),
            copied_volumes: sandbox.volumes.add(deadline, &sandbox.agent, &task.id, &given.volumes).await?,
            ..self.request(task, guest)
        };
        sandbox.agent.create_container(deadline, request).await?;
        sandbox.volumes.activate(&task.id);
        init.assign_pid(&self.keeper, &arguments)?;
        init.set_io(ProcessIo::connect(deadline, &sandbox.agent, &init.key, &task.stdio).await?);
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
                        && let Ok(container) = self.container(&oom.container_id)
                        && container.kind != Kind::Sandbox
                    {
                        container.out_of_memory().await;
                        let container_id = oom.container_id;
                        self.publisher.publish(&TaskOOM { container_id, ..TaskOOM::default() });
                    }
                    if tokio::time::timeout(EVENT_PACE, agent.vm_ended()).await.is_ok() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "no more events of the guest");
                    if !matches!(error, AgentError::Refused { .. }) {
                        agent.lost().await;
                    }
                    return;
                }
            }
        }
        tracing::warn!("the guest has reported {MAX_EVENTS} out-of-memory kills; no more are reported to containerd");
    }
}

/// The configuration, and the time that a call has with it: an operator may give a boot more than the table does.
pub(super) async fn configured(deadline: Deadline, path: Option<PathBuf>) -> Result<(Config, Deadline), TaskError> {
    let config = host_files::CONTAINERS.run(deadline, move || Config::load(path.as_deref())).await??;
    let more = config.boot_timeout.saturating_sub(Operation::BootGuest.budget());
    Ok((config, deadline.longer_by(more)))
}

/// Opens the layers of a container's image, if containerd describes its root file system by them.
async fn open_layers(deadline: Deadline, task: &CreateTask) -> Result<Option<(Layered, OpenLayers)>, TaskError> {
    let rootfs = task.rootfs.clone();
    let open = move || -> Result<_, TaskError> {
        let Some(layered) = layers::parse(&rootfs, layers::is_image_mounted_on)? else { return Ok(None) };
        let files = OpenLayers::open(&layered)?;
        Ok(Some((layered, files)))
    };
    host_files::CONTAINERS.run(deadline, open).await?
}

/// Mounts a container's root file system and volumes in the pod's share. One of layers is the guest's to mount.
async fn mount(
    deadline: Deadline,
    sandbox: &Sandbox,
    task: &CreateTask,
    layered: Option<Layered>,
    prepared: PathBuf,
    volumes: Vec<Volume>,
) -> Result<Vec<GuestVolume>, TaskError> {
    let (share, id, rootfs) = (sandbox.share.clone(), task.id.clone(), task.rootfs.clone());
    let (abandoned, its_id) = (share.clone(), id.clone());
    let mount = move || {
        if rootfs.is_empty() {
            refuse_link(&prepared)?;
        }
        match layered {
            Some(layered) => share.add_layered_root(&id, &layered)?,
            None => share.add_rootfs(&id, &rootfs, &prepared)?,
        }
        share.add_volumes(&id, volumes)
    };
    let undo = move || warn_of(abandoned.remove_container(&its_id));
    Ok(host_files::CONTAINERS.run_or_undo(deadline, mount, undo).await??)
}

/// Removes what there is of a container that could not be created.
async fn take_back(deadline: Deadline, sandbox: &Arc<Sandbox>, init: &ProcessKey) {
    let (share, id) = (sandbox.share.clone(), init.container.clone());
    // The guest's side first: it may hold the mounts. What it says does not matter any more.
    let forgetting = deadline.part(Operation::GuestForgets);
    if sandbox.agent.signal(forgetting, init, SIGKILL, true).await.is_ok() {
        let _ = forgetting.part(Operation::ProcessEnds).timeout(sandbox.agent.wait(init)).await;
    }
    let _ = sandbox.agent.delete_container(forgetting, &id).await;
    sandbox.volumes.remove(&id);
    sandbox.container_ended(&id);
    sandbox.detach_disks(deadline.part(Operation::LeaveDisks), &id).await;
    drop(sandbox.give_back());
    warn_of(removing(move || share.remove_container(&id)).await);
}

/// Only logs a failure: what could not be removed is removed with the pod.
fn warn_of(removed: Result<(), ShareError>) {
    if let Err(error) = removed {
        tracing::warn!("{}", bulkhead_protocol::error::chain(&error));
    }
}

/// A Create that runs, until this is dropped.
struct Creation {
    pod: Arc<Pod>,
    id: String,
}

impl Creation {
    /// Takes an id; fails if a container has it, or is going to.
    fn begin(pod: Arc<Pod>, id: &str) -> Result<Self, TaskError> {
        {
            let mut creating = pod.creating();
            if creating.contains_key(id) || pod.containers().contains_key(id) {
                return Err(TaskError::Exists(format!("container {id}")));
            }
            creating.insert(id.to_owned(), watch::channel(false).0);
        }
        Ok(Self { pod, id: id.to_owned() })
    }
}

impl Drop for Creation {
    fn drop(&mut self) {
        self.pod.creating().remove(&self.id);
    }
}

/// A prepared root file system is a directory. A link in its place would show the guest whatever of the host it leads to.
fn refuse_link(rootfs: &Path) -> Result<(), ShareError> {
    match std::fs::symlink_metadata(rootfs) {
        Ok(meta) if meta.is_symlink() => {
            Err(ShareError::Rootfs { path: rootfs.to_path_buf(), source: rustix::io::Errno::LOOP.into() })
        }
        _ => Ok(()),
    }
}

/// Makes the volumes of huge pages that a spec mounts.
async fn with_huge_volumes(
    deadline: Deadline,
    sandbox: &Sandbox,
    spec: Spec,
) -> Result<(Spec, Vec<HugeVolume>), TaskError> {
    let look = move || {
        let volumes = spec::huge_volumes(&spec);
        (spec, volumes)
    };
    let (spec, volumes) = host_files::CONTAINERS.run(deadline, look).await?;
    for volume in &volumes {
        sandbox.agent.add_huge_page_volume(deadline, volume).await?;
    }
    Ok((spec, volumes))
}
