//! The sandbox: one VM with what belongs to it on the host, from boot to the last unmount.

pub mod agent;
mod cgroup;
mod console;
mod hypervisor;
mod process;
mod timeline;
mod vm;

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::agent::CreateSandboxRequest;
use bulkhead_protocol::guest::SHARE_TAG;

use crate::annotations::{self, AnnotationError};
use crate::config::{Config, ConfigError};
use crate::network::{self, Network, NetworkError};
use crate::paths::RunDir;
use crate::share::{Share, ShareError};
use crate::spec::SandboxSpec;
use agent::{Agent, AgentError};
pub use cgroup::Cgroup;
pub use process::{kill_recorded, record};
use timeline::Timeline;
pub use vm::{Vm, VmError};

/// How long an orderly end of the guest may take before its VMM is killed. The guest only has to kill processes and
/// flush: what containers wrote is in files of the host already. The kubelet waits two minutes for the whole.
const ORDERLY_END: Duration = Duration::from_secs(10);

/// A pod's running VM.
#[derive(Debug)]
pub struct Sandbox {
    /// The machine.
    pub vm: Vm,
    /// What runs in it.
    pub agent: Agent,
    /// What it sees of the host.
    pub share: Share,
    run_dir: RunDir,
    netns: Option<PathBuf>,
}

impl Sandbox {
    /// Boots the VM. On an error nothing is left behind.
    pub async fn boot(run_dir: RunDir, spec: SandboxSpec, config: Config) -> Result<Self, SandboxError> {
        let netns = spec.netns.clone();
        let booted = Self::try_boot(&run_dir, spec, config).await;
        if booted.is_err() {
            release(&run_dir, netns.as_deref()).await;
        }
        booted
    }

    async fn try_boot(run_dir: &RunDir, spec: SandboxSpec, config: Config) -> Result<Self, SandboxError> {
        let mut timeline = Timeline::begin();
        let size = config.size(&annotations::request(&spec.annotations, &config.annotations)?)?;
        let files = hypervisor::Files::open(&config)?;
        let share = blocking({
            let run_dir = run_dir.clone();
            move || Share::create(&run_dir)
        })
        .await?;
        record(&run_dir.shim_pid(), std::process::id());
        let mut network = match spec.netns.clone() {
            Some(netns) => network::attach(netns).await?,
            None => Network::default(),
        };
        let devices = std::mem::take(&mut network.devices);
        let cgroup = spec.cgroups_path.as_deref().and_then(|path| Cgroup::create(path, &run_dir.cgroup()));
        let machine = hypervisor::Machine { files, size, devices, share: share.open()?, cgroup: cgroup.as_ref() };
        timeline.done("share and network");
        let (vm, built) = Vm::boot(&config, machine, &run_dir.vmm_pid()).await?;
        timeline.until("VMM start", built);
        timeline.done("guest");
        let agent = Agent::connect(&vm).await?;
        timeline.split(agent.create_sandbox(request(&spec, network, size.vcpus)).await?);
        timeline.done("sandbox set-up");
        timeline.write(&run_dir.timeline());
        Ok(Self { vm, agent, share, run_dir: run_dir.clone(), netns: spec.netns })
    }

    /// Ends the guest orderly, or in bounded time.
    pub async fn stop(&self) {
        if self.vm.has_ended() {
            return;
        }
        // Either answer is good: what counts is that the VM ends.
        let end = async {
            let _ = self.agent.destroy_sandbox().await;
            self.vm.ended().await;
        };
        if tokio::time::timeout(ORDERLY_END, end).await.is_err() {
            tracing::warn!("the guest did not end in {ORDERLY_END:?}, killing its VMM");
        }
        self.vm.kill().await;
    }

    /// Stops the VM and removes everything that it had on the host.
    pub async fn destroy(&self) {
        self.stop().await;
        release(&self.run_dir, self.netns.as_deref()).await;
    }
}

/// Removes redirects, the cgroup, mounts and the pod's directory, after the VMM has ended. Goes on after a failure: each step is worth doing.
async fn release(run_dir: &RunDir, netns: Option<&std::path::Path>) {
    if let Some(netns) = netns
        && let Err(error) = network::detach(netns).await
    {
        tracing::warn!("{}", crate::pod::error::chain(&error));
    }
    if let Some(cgroup) = Cgroup::noted(&run_dir.cgroup()) {
        cgroup.remove();
    }
    let run_dir = run_dir.clone();
    if let Err(error) = blocking(move || Share::destroy(&run_dir)).await {
        tracing::warn!("{}", crate::pod::error::chain(&error));
    }
}

/// Runs system calls that may block on a thread beside the reactor.
pub async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<ShareError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(ShareError::MountTable(std::io::Error::other(error)).into()),
    }
}

fn request(spec: &SandboxSpec, network: Network, vcpus: u8) -> CreateSandboxRequest {
    let mut entropy = vec![0; 64];
    let _ = rustix::rand::getrandom(&mut entropy[..], rustix::rand::GetRandomFlags::empty());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    CreateSandboxRequest {
        hostname: spec.hostname.clone(),
        interfaces: network.interfaces,
        routes: network.routes,
        neighbours: network.neighbours,
        sysctls: spec.sysctls.clone(),
        online_cpus: u32::from(vcpus),
        realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(0),
        entropy,
        share_tag: SHARE_TAG.to_owned(),
        ..CreateSandboxRequest::default()
    }
}

/// The VM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// An annotation of the pod.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// The configuration, or a size beyond it.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The share.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
}
