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
use super::end::UNSTARTED_END;
use super::error::TaskError;
use super::hooks::ContainerHooks;
use super::process::Process;
use super::{Pod, options};
use crate::about;
use crate::annotations::Role;
use crate::bundle;
use crate::config::Config;
use crate::host_pid::Users;
use crate::io::{ProcessIo, Stdio};
use crate::sandbox::agent::{Agent, AgentError, ProcessKey, SIGKILL};
use crate::sandbox::{Sandbox, demand, mounting, patience, removing};
use crate::share::ShareError;
use crate::spec::{
    self, Asker, ConsoleSize, Given, GuestSpec, GuestVolume, HugeVolume, PidChoice, SandboxSpec, Volume,
};

/// Events of a guest that are listened to in its life. A guest that is out of memory again and again has said so.
const MAX_EVENTS: u32 = 4096;

/// Time from one event to the next that is listened to: what comes meanwhile waits in the guest, so that a flood of them is
/// neither passed on nor keeps other events from containerd.
const EVENT_PACE: Duration = Duration::from_secs(1);

/// How long guest and VMM may take in all to create a container, and then to remove one that could not be created: the
/// kubelet gives two minutes for both.
const CREATED: Duration = Duration::from_secs(80);
/// See there.
const FORGOTTEN: Duration = Duration::from_secs(30);

/// How long a container's interfaces that a hook has made may take to come into its guest: device slots and a call of the agent's.
const CARRIED: Duration = Duration::from_secs(60);

/// How much of that the guest may take. The VMM, which is asked after it, takes disks away whatever the guest does.
const GUEST_FORGETS: Duration = Duration::from_secs(20);

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
    pub async fn create(self: Arc<Self>, mut task: CreateTask) -> Result<u32, TaskError> {
        let mut spec = bundle::read_spec(&task.bundle)?;
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
        let _creation = Creation::begin(self.clone(), &task.id)?;
        let key = ProcessKey { container: task.id.clone(), exec: String::new() };
        let init = Arc::new(Process::new(key, task.stdio.clone()));
        let container = Arc::new(Container::new(task.id.clone(), kind, task.bundle.clone(), init, hooks));
        let (init, hooks) = (&container.init, &container.hooks);
        match kind {
            Kind::Sandbox => {
                init.set_io(ProcessIo::hold(&task.stdio)?);
                let sandbox = self.boot(spec::sandbox(&spec)?, config_path(&task)).await?;
                self.or_teardown(init.assign_pid(&self.keeper, &spec::arguments(&spec)).map(drop)).await?;
                self.or_teardown(hooks.created(init.pid()).await).await?;
                self.or_teardown(self.register(&container, &task, &sandbox)).await?;
            }
            Kind::Member => self.create_in(&self.sandbox()?, spec, &task, &container).await?,
            Kind::Standalone => {
                spec::refuse_shared(&spec)?;
                // Docker has no word for a privileged container without them; a client of containerd's has, and is told it.
                if Asker::of(&spec) == Asker::Docker {
                    spec::leave_out_hosts(&mut spec);
                }
                // A pod's VM is there already. This one would be made in vain.
                spec::check(&spec, &task.id)?;
                let sandbox = self.boot(spec::sandbox(&spec)?, config_path(&task)).await?;
                self.or_teardown(self.create_in(&sandbox, spec, &task, &container).await).await?;
            }
        }
        Ok(container.init.pid())
    }

    /// What follows on the boot has failed: the VM goes again.
    async fn or_teardown<E>(&self, outcome: Result<(), E>) -> Result<(), E> {
        if outcome.is_err() {
            self.teardown().await;
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
        spec: SandboxSpec,
        config: Option<PathBuf>,
    ) -> Result<Arc<Sandbox>, TaskError> {
        let _gate = self.gate.lock().await;
        if self.sandbox_slot().is_some() {
            return Err(TaskError::Exists(format!("sandbox {}", self.identity.sandbox_id)));
        }
        let config = Config::load(config.as_deref())?;
        let users = if spec.user.is_some() { Users::Own } else { Users::Nodes };
        let sandbox = Arc::new(Sandbox::boot(self.identity.run_dir.clone(), spec, config).await?);
        if let Err(error) = self.keeper.enter(sandbox.namespace(), users) {
            sandbox.destroy().await;
            return Err(TaskError::HostPid(error));
        }
        *self.sandbox_slot() = Some(sandbox.clone());
        tokio::spawn(self.clone().listen(sandbox.agent.clone()));
        tokio::spawn(demand::follow(sandbox.clone()));
        Ok(sandbox)
    }

    /// Creates a container in the VM. On an error nothing of it is left on the host.
    async fn create_in(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        spec: Spec,
        task: &CreateTask,
        container: &Arc<Container>,
    ) -> Result<(), TaskError> {
        let (init, hooks) = (&container.init, &container.hooks);
        let created = patience::within(CREATED, self.try_create_in(sandbox, spec, task, init)).await;
        let created = match created {
            Ok(()) => hooks.created(init.pid()).await.map_err(TaskError::from),
            failed => failed,
        };
        let created = match created {
            Ok(()) if container.kind == Kind::Standalone => {
                patience::within(CARRIED, sandbox.follow_network()).await.map_err(TaskError::from)
            }
            other => other,
        };
        let created = created.and_then(|()| self.register(container, task, sandbox));
        if created.is_err() {
            patience::within(FORGOTTEN, forget(sandbox, &init.key)).await;
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
        sandbox.attach_network().await?;
        let arguments = spec::arguments(&spec);
        let prepared = task.bundle.join(spec::root_path(&spec));
        let wanted = spec::disks(&spec)?;
        let mut limits = spec::limits(&spec);
        let (spec, huge_volumes) = with_huge_volumes(sandbox, spec).await?;
        let volumes = spec::volumes(&spec, &huge_volumes)?;
        for page_kib in huge_volumes.iter().map(|volume| volume.page_kib) {
            sandbox.complete_huge_pages(&mut limits, page_kib);
        }
        sandbox.make_room(&task.id, limits).await?;
        let disks = sandbox.attach_disks(&task.id, &wanted).await?;
        let volumes = mount(sandbox, task, prepared, volumes).await?;
        let given = Given { disks, huge_volumes, volumes };
        let guest = spec::translate(spec, &task.id, &given)?;
        let request = CreateContainerRequest {
            volumes: given.volumes.iter().map(|volume| volume.number).collect(),
            copied_volumes: sandbox.volumes.add(&sandbox.agent, &task.id, &given.volumes),
            ..self.request(task, guest)
        };
        sandbox.agent.create_container(request).await?;
        sandbox.volumes.activate(&task.id);
        init.assign_pid(&self.keeper, &arguments)?;
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
                        && let Ok(container) = self.container(&oom.container_id)
                        && container.kind != Kind::Sandbox
                    {
                        container.out_of_memory();
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
                        agent.unheard().await;
                    }
                    return;
                }
            }
        }
        tracing::warn!("the guest has sent {MAX_EVENTS} events, no longer listening to them");
    }
}

/// Mounts a container's root file system and volumes in the pod's share.
async fn mount(
    sandbox: &Sandbox,
    task: &CreateTask,
    prepared: PathBuf,
    volumes: Vec<Volume>,
) -> Result<Vec<GuestVolume>, ShareError> {
    let (share, id, rootfs) = (sandbox.share.clone(), task.id.clone(), task.rootfs.clone());
    let (abandoned, its_id) = (share.clone(), id.clone());
    let mount = move || {
        if rootfs.is_empty() {
            refuse_link(&prepared)?;
        }
        share.add_rootfs(&id, &rootfs, &prepared)?;
        share.add_volumes(&id, volumes)
    };
    mounting(mount, move || warn_of(abandoned.remove_container(&its_id))).await
}

/// Removes what there is of a container that could not be created.
async fn forget(sandbox: &Sandbox, init: &ProcessKey) {
    let (share, id) = (sandbox.share.clone(), init.container.clone());
    // The guest's side first: it may hold the mounts. What it says does not matter any more.
    let forgotten = async {
        if sandbox.agent.signal(init, SIGKILL, true).await.is_ok() {
            let _ = patience::timeout(UNSTARTED_END, sandbox.agent.wait(init)).await;
        }
        let _ = sandbox.agent.delete_container(&id).await;
    };
    let _ = patience::timeout(GUEST_FORGETS, forgotten).await;
    sandbox.volumes.remove(&id);
    sandbox.container_ended(&id);
    sandbox.detach_disks(&id).await;
    sandbox.give_back().await;
    warn_of(removing(move || share.remove_container(&id)).await);
}

/// What cannot be removed goes with the pod.
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
async fn with_huge_volumes(sandbox: &Sandbox, spec: Spec) -> Result<(Spec, Vec<HugeVolume>), TaskError> {
    let look = move || {
        let volumes = spec::huge_volumes(&spec);
        Ok::<_, ShareError>((spec, volumes))
    };
    let (spec, volumes) = mounting(look, || ()).await?;
    for volume in &volumes {
        sandbox.agent.add_huge_page_volume(volume).await?;
    }
    Ok((spec, volumes))
}
