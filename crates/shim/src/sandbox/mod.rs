//! The sandbox: one VM with what belongs to it on the host, from boot to the last unmount.

pub mod agent;
mod bounded_replies;
mod cgroup;
mod clock;
pub mod demand;
mod disks;
mod error;
#[cfg(test)]
pub mod fake;
mod images;
mod inotify;
mod oom;
mod pid_namespace;
mod pids;
mod pod_network;
mod process;
mod resize;
mod room;
mod sysctls;
mod timeline;
mod vm;
mod volumes;

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::{AddNetworkRequest, CreateSandboxRequest, LayeredRoot};
use bulkhead_protocol::guest::SHARE_TAG;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::task::JoinHandle;

use crate::about;
use crate::annotations;
use crate::config::Config;
use crate::deadlines::{self, Deadline, Operation};
use crate::host_files;
use crate::network;
use crate::own_thread;
use crate::paths::RunDir;
use crate::share::{Share, ShareError};
use crate::sizing::{Limits, Plan};
use crate::spec::{GuestDisk, HostDisk, SandboxSpec};
use agent::Agent;
pub use cgroup::Cgroup;
use clock::Synced;
pub use disks::DiskError;
use disks::Disks;
pub use error::SandboxError;
use images::Images;
pub use images::{ImagesError, OpenLayers};
use inotify::Inotify;
use pod_network::{Guest, PodNetwork};
pub use process::{has_ended, kill_recorded, record};
pub use resize::ResizeError;
use resize::Resizer;
use timeline::Timeline;
use vm::machine_spec;
pub use vm::{Vm, VmError};
use volumes::FollowedVolumes;

/// A pod's running VM.
#[derive(Debug)]
pub struct Sandbox {
    /// The machine.
    pub vm: Vm,
    /// What runs in it.
    pub agent: Agent,
    /// What it sees of the host.
    pub share: Share,
    /// When it was ready.
    pub booted_at: Timestamp,
    /// Those of its volumes that the guest keeps copies of.
    pub volumes: FollowedVolumes,
    disks: Disks,
    images: Images,
    resizer: Resizer,
    cgroup: Option<Cgroup>,
    run_dir: RunDir,
    network: Arc<PodNetwork>,
}

impl Sandbox {
    /// Boots the VM. On an error nothing is left behind.
    pub async fn boot(
        deadline: Deadline,
        run_dir: RunDir,
        spec: SandboxSpec,
        config: Config,
    ) -> Result<Self, SandboxError> {
        let network = Arc::new(PodNetwork::new(&spec.netns, config.unsupported_network).await?);
        let booted = Self::try_boot(deadline, &run_dir, spec, network.clone(), config).await;
        if booted.is_err() {
            release(&run_dir, &network).await;
        }
        booted
    }

    async fn try_boot(
        deadline: Deadline,
        run_dir: &RunDir,
        spec: SandboxSpec,
        pod_network: Arc<PodNetwork>,
        config: Config,
    ) -> Result<Self, SandboxError> {
        let mut timeline = Timeline::begin();
        let plan = Plan::new(&config, &annotations::request(&spec.annotations, &config.annotations)?)?;
        let opening = {
            let config = config.clone();
            move || machine_spec::Files::open(&config)
        };
        let files = host_files::CONTAINERS.run(deadline, opening).await??;
        let share = Share::create(run_dir)?;
        record(&run_dir.shim_pid(), std::process::id());
        let (devices, mut network) = pod_network.begin().await?;
        let cgroup = spec.cgroups_path.as_deref().and_then(|path| Cgroup::create(path, &run_dir.cgroup()));
        if let Some(cgroup) = &cgroup {
            deadlines::follow(cgroup.with_those_above().map(Path::to_path_buf).collect());
        }
        let (share_ids, share_dir) = (spec.share_ids.clone(), share.open()?);
        let machine = machine_spec::Machine {
            files,
            plan: &plan,
            devices,
            share: share_dir,
            share_ids,
            private_roots: spec.private_roots,
            cgroup: cgroup.as_ref(),
        };
        let slots = machine.net_slots();
        network::name_devices(&mut network, &slots);
        timeline.done("share and network");
        let (vm, built) = Vm::boot(deadline, &config, machine, &run_dir.vmm_pid()).await?;
        share.is_jail_of(vm.process()?);
        timeline.until("VMM start", built);
        timeline.done("guest");
        let deadline = deadline.part(Operation::TellGuestItsPod);
        let begun = begin(deadline, &vm, &pod_network, request(&spec, network, &plan)).await;
        if begun.is_err() {
            // Before its cgroup is removed, which cannot be done as long as something is in it.
            vm.kill().await;
        }
        let (agent, kernel, synced) = begun?;
        timeline.split(kernel);
        tokio::spawn(clock::follow(agent.clone(), synced));
        pod_network.booted(&vm, &agent, &slots).await;
        timeline.done("sandbox set-up");
        timeline.write(&run_dir.timeline());
        let (inotify, booted_at) = (Inotify::default(), Timestamp::now());
        let volumes = FollowedVolumes::new(inotify.clone());
        if let Some(cgroup) = cgroup.clone() {
            tokio::spawn(leave(vm.clone(), cgroup));
        }
        let (disks, images) = (Disks::default(), Images::new(inotify));
        let (resizer, run_dir) = (Resizer::new(plan), run_dir.clone());
        Ok(Self { vm, agent, share, booted_at, volumes, disks, images, resizer, cgroup, run_dir, network: pod_network })
    }

    /// Where CNI has said that the pod's network namespace is, if it has.
    pub fn netns(&self) -> Option<&Path> {
        self.network.prepared()
    }

    /// The pod's network namespace.
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.network.namespace()
    }

    /// Carries the network into the guest that CNI has made since it was booted, if it makes it so late.
    pub async fn attach_network(&self, deadline: Deadline) -> Result<(), SandboxError> {
        self.network.attach(Guest { vm: &self.vm, agent: &self.agent, deadline }).await
    }

    /// Carries what a hook, or an engine before it starts the container, has made in a container's own namespace, and from then
    /// on what comes and goes there. Its localhost is not the guest's, but the other way round: servers for the container may
    /// listen there.
    pub async fn follow_network(&self, deadline: Deadline) -> Result<(), SandboxError> {
        self.network.attach_and_follow(Guest { vm: &self.vm, agent: &self.agent, deadline }).await
    }

    /// Makes the VM large enough for one more container, which counts from now on until [`Self::container_ended`].
    pub async fn make_room(&self, deadline: Deadline, id: &str, limits: Limits) -> Result<(), ResizeError> {
        self.resizer.note(id, limits);
        let grown = self.resizer.grow(deadline, &self.vm, &self.agent).await;
        if grown.is_err() {
            self.resizer.forget(id);
        }
        self.tell_host();
        grown
    }

    /// containerd leaves limits of huge pages out of specs unless it is configured otherwise; the kubelet sets their sum for
    /// the pod's cgroup in any case. A container that mounts a volume of huge pages gets that, if no other has any.
    pub fn complete_huge_pages(&self, limits: &mut Limits, page_kib: u64) {
        if !limits.huge_pages.contains_key(&page_kib)
            && !self.resizer.has_huge_pages(page_kib)
            && let Some(bytes) = self.cgroup.as_ref().and_then(|cgroup| cgroup.pod_huge_pages(page_kib))
        {
            limits.huge_pages.insert(page_kib, bytes);
        }
    }

    /// Changes what a container may use: `change` is what makes the guest keep to it, and comes after the VM has grown. That it
    /// shrinks comes after this, by [`Self::give_back`].
    pub async fn change_limits<E: From<ResizeError>>(
        &self,
        deadline: Deadline,
        id: &str,
        limits: Limits,
        change: impl Future<Output = Result<(), E>>,
    ) -> Result<(), E> {
        let before = self.resizer.limits(id);
        self.resizer.change(id, before.larger(&limits));
        let changed = match self.resizer.grow(deadline, &self.vm, &self.agent).await {
            Ok(()) => change.await,
            Err(error) => Err(error.into()),
        };
        // It may have ended meanwhile.
        self.resizer.change(id, if changed.is_ok() { limits } else { before });
        self.tell_host();
        changed
    }

    /// What a container may use.
    pub fn limits(&self, id: &str) -> Limits {
        self.resizer.limits(id)
    }

    /// A container that has ended needs nothing any more; what it had is given back by [`Self::give_back`].
    pub fn container_ended(&self, id: &str) {
        self.resizer.forget(id);
        self.tell_host();
    }

    /// Gives back what no container needs, in a task that nobody has to wait for.
    pub fn give_back(self: &Arc<Self>) -> JoinHandle<()> {
        let sandbox = self.clone();
        about::spawn(async move { sandbox.resizer.shrink(&sandbox.vm, &sandbox.agent).await })
    }

    /// Gives a container its block devices.
    pub async fn attach_disks(
        &self,
        deadline: Deadline,
        id: &str,
        wanted: &[HostDisk],
    ) -> Result<Vec<GuestDisk>, DiskError> {
        self.disks.attach(deadline, &self.vm, &self.agent, id, wanted).await
    }

    /// Shows a container's image layers to the guest.
    pub async fn attach_layers(
        &self,
        deadline: Deadline,
        id: &str,
        layers: OpenLayers,
    ) -> Result<LayeredRoot, ImagesError> {
        self.images.attach(deadline, &self.vm, &self.agent, id, layers).await
    }

    /// Takes its block devices and image layers away.
    pub async fn detach_disks(&self, deadline: Deadline, id: &str) {
        let disks = self.disks.detach(deadline, &self.vm, &self.agent, id);
        let images = self.images.detach(deadline, &self.vm, &self.agent, id);
        tokio::join!(disks, images);
    }

    /// Does for the VMM what the kubelet wants of the host for containers. We bind the VMM, whose threads are the vCPUs, to the
    /// CPUs of the kubelet's static CPU policy, and set how soon the kernel kills it when the node has no more memory. Without
    /// a container the VMM keeps its score: another container is about to come, or the pod ends.
    fn tell_host(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.bind_to_cpus(&self.resizer.host_cpus());
        }
        if let Some(score) = self.resizer.oom_score_adj() {
            self.vm.set_oom_score(score);
        }
    }

    /// Ends the guest orderly, or in bounded time. It has that time whatever is left of a call's.
    pub async fn stop(&self) {
        if self.vm.has_ended() {
            return;
        }
        let deadline = Deadline::begin(Operation::OrderlyEnd);
        // Either answer is good: what counts is that the VM ends.
        let end = async {
            let _ = self.agent.destroy_sandbox(deadline).await;
            self.vm.ended().await;
        };
        if let Err(waited) = deadline.timeout(end).await {
            tracing::warn!("the guest did not end in {waited:?}, killing its VMM");
        }
        self.vm.kill().await;
    }

    /// Stops the VM and removes everything that it had on the host.
    pub async fn destroy(&self) {
        self.stop().await;
        release(&self.run_dir, &self.network).await;
    }
}

/// Connects to the agent and tells it of its pod and the time; answers with what the guest's kernel took to boot, and with who
/// sees to the clock from now on.
async fn begin(
    deadline: Deadline,
    vm: &Vm,
    network: &PodNetwork,
    request: CreateSandboxRequest,
) -> Result<(Agent, Duration, Synced), SandboxError> {
    let agent = Agent::connect(deadline, vm).await?;
    let (kernel, answer) = agent.create_sandbox(deadline, &request).await?;
    network.check(&request.network, &answer)?;
    let synced = clock::sync(deadline, &agent).await?;
    Ok((agent, kernel, synced))
}

/// Moves the shim out of the pod's cgroup when the VM has ended. The kubelet kills what is left in an ended pod's cgroup, and
/// containerd still has to ask the shim how the pod ended.
async fn leave(vm: Vm, cgroup: Cgroup) {
    vm.ended().await;
    cgroup.leave();
    cgroup.remove();
}

/// Removes redirects, the cgroup, mounts and the pod's directory, after the VMM has ended. Goes on after a failure: each step is worth doing.
async fn release(run_dir: &RunDir, network: &PodNetwork) {
    if let Err(error) = network.release().await {
        tracing::warn!("{}", bulkhead_protocol::error::chain(&error));
    }
    if let Some(cgroup) = Cgroup::noted(&run_dir.cgroup()) {
        cgroup.leave();
        cgroup.remove();
    }
    let run_dir = run_dir.clone();
    if let Err(error) = removing(move || Share::destroy(&run_dir)).await {
        tracing::warn!("{}", bulkhead_protocol::error::chain(&error));
    }
}

/// Runs system calls that remove something, on a thread of their own. They wait for no file system, and have no bound beside
/// others: all threads of [`host_files`] may wait for one that does not answer any more, and the pod must be removable all the
/// same.
pub async fn removing<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<ShareError> + Send + 'static,
{
    own_thread::run("bulkhead-remove", work).await.unwrap_or_else(|error| Err(ShareError::Thread(error).into()))
}

fn request(spec: &SandboxSpec, network: AddNetworkRequest, plan: &Plan) -> CreateSandboxRequest {
    let mut entropy = vec![0; 64];
    let _ = rustix::rand::getrandom(&mut entropy[..], rustix::rand::GetRandomFlags::empty());
    CreateSandboxRequest {
        hostname: spec.hostname.clone(),
        domainname: spec.domainname.clone(),
        user_namespace: spec.user.clone().into(),
        network: Some(network).into(),
        sysctls: spec.sysctls.clone(),
        online_cpus: u32::from(plan.initial.cpus),
        memory_mib: plan.boot_mib + plan.initial.plugged_mib,
        node_sysctls: sysctls::of_node(),
        entropy,
        share_tag: SHARE_TAG.to_owned(),
        ..CreateSandboxRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn container_without_disks_waits_for_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let (sandbox, _) = Sandbox::fake(dir.path()).await;
        let _attaching = (sandbox.disks.lock().await, sandbox.images.lock().await);
        let detached = sandbox.detach_disks(Deadline::begin(Operation::DetachDisks), "c");
        tokio::time::timeout(Duration::from_secs(10), detached).await.unwrap();
    }
}
