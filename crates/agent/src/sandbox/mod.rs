//! CreateSandbox: makes the guest, which until then is like every other (ARCHITECTURE.md, D7), a pod's.

mod clock;
pub mod memory;
mod network;
mod share;
pub mod size;
pub mod sysctl;

use std::collections::HashSet;
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bulkhead_protocol::agent::network_step::Step;
use bulkhead_protocol::agent::{
    AddNetworkRequest, AddNetworkResponse, CreateSandboxRequest, Demand, DemandRequest, HugePageVolume, InterfaceStats,
    ResizeGuestRequest, SyncClockRequest, SyncClockResponse,
};
use bulkhead_protocol::guest::{SHARE_DIR, SHM_DIR};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::netns::Netns;
use crate::{cgroup, power, sys};
pub use clock::Clock;
use clock::Offset;
use memory::{Memory, MemoryError};
pub use network::NetworkError;
pub use size::SizeError;
use sysctl::SysctlError;

/// Size of the pod's /dev/shm in bytes: what container engines give.
const SHM_SIZE: u64 = 64 << 20;

/// The pod's sandbox, which is the guest.
#[derive(Debug, Default)]
pub struct Sandbox {
    created: AtomicBool,
    /// Held while CPUs come and go, so that the last request is the one that counts.
    resizing: Mutex<()>,
    netns: Netns,
    clock: Arc<Clock>,
    links: network::Links,
    /// The files of the parameters that the pod has asked for.
    sysctls: OnceLock<HashSet<PathBuf>>,
    memory: Arc<Memory>,
}

impl Sandbox {
    /// A guest whose pod's network is to be found there.
    pub fn new(netns: Netns, clock: Clock) -> Self {
        Self { netns, clock: Arc::new(clock), ..Self::default() }
    }

    /// The guest becomes a pod's, which it can once.
    pub fn claim(&self) -> Result<(), SandboxError> {
        if self.created.swap(true, Ordering::Relaxed) { Err(SandboxError::Exists) } else { Ok(()) }
    }

    /// Sets the guest up. A set-up that fails leaves a guest that is of no use any more. Answers as [`Self::add_network`].
    pub async fn set_up(&self, request: CreateSandboxRequest) -> Result<AddNetworkResponse, SandboxError> {
        seed(&request.entropy)?;
        // The host's clock may have been set since KVM told the guest the time. If this fails the shim corrects the clock
        // later.
        self.clock.sync(None).map_err(SandboxError::Clock)?;
        request.node_sysctls.iter().for_each(|(name, value)| sysctl::follow(name, value));
        if !request.hostname.is_empty() {
            rustix::system::sethostname(request.hostname.as_bytes())
                .map_err(|errno| SandboxError::Hostname { name: request.hostname.clone(), source: errno.into() })?;
        }
        if !request.domainname.is_empty() {
            rustix::system::setdomainname(request.domainname.as_bytes())
                .map_err(|errno| SandboxError::Hostname { name: request.domainname.clone(), source: errno.into() })?;
        }
        size::online_cpus(request.online_cpus)?;
        self.memory.resize(request.memory_mib)?;
        mount_shm()?;
        mount_share(&request.share_tag)?;
        let answer = self.add_network(request.network.unwrap_or_default()).await?;
        let own = request.sysctls.keys().filter_map(|name| sysctl::path_of(name)).collect();
        // After the interfaces, because some parameters name one. Those of the network belong to the writing thread's
        // namespace.
        let set = move || request.sysctls.iter().try_for_each(|(name, value)| sysctl::set(name, value));
        self.netns.run(set).await.map_err(NetworkError::Namespace)??;
        let _ = self.sysctls.set(own);
        let clock = Arc::clone(&self.clock);
        tokio::spawn(async move { clock.follow().await });
        Ok(answer)
    }

    /// Changes the pod's network; devices are there. Answers with what the kernel did not take: whether the pod can do without
    /// is not the guest's to say.
    pub async fn add_network(&self, mut request: AddNetworkRequest) -> Result<AddNetworkResponse, SandboxError> {
        // The pod's own come before those of a namespace that is carried later.
        if let Some(own) = self.sysctls.get() {
            let of_pod = |name: &str| sysctl::path_of(name).is_some_and(|path| own.contains(&path));
            for step in &mut request.steps {
                if let Some(Step::Sysctls(sysctls)) = &mut step.step {
                    sysctls.sysctls.retain(|sysctl| !of_pod(&sysctl.name));
                }
            }
        }
        Ok(self.links.change(&self.netns, request).await?)
    }

    /// Corrects the guest's clock by what the host has found out, and answers with what it is then.
    pub fn sync_clock(&self, request: &SyncClockRequest) -> Result<SyncClockResponse, SandboxError> {
        let told = i64::try_from(request.error_ns).ok().filter(|error| *error > 0);
        let told = told.map(|error| Offset { ahead: request.ahead_ns, error });
        let reads_host = self.clock.sync(told).map_err(SandboxError::Clock)?;
        let realtime_ns = u64::try_from(clock::now()).unwrap_or(0);
        Ok(SyncClockResponse { realtime_ns, reads_host, ..Default::default() })
    }

    /// Counters of the pod's interfaces.
    pub fn interface_stats(&self) -> Vec<InterfaceStats> {
        network::interface_stats(&self.netns)
    }

    /// Gives the guest as many CPUs and huge pages as the pod's containers need. Waits for the kernel.
    pub fn resize(&self, request: &ResizeGuestRequest) -> Result<(), SandboxError> {
        let _alone = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        size::online_cpus(request.online_cpus)?;
        request.huge_pages.iter().try_for_each(size::reserve_huge_pages)?;
        Ok(self.memory.resize(request.memory_mib)?)
    }

    /// Returns with what the pod needs next of memory.
    pub async fn next_demand(&self, request: &DemandRequest) -> Result<Demand, SandboxError> {
        Ok(self.memory.next(request).await?)
    }

    /// Makes a volume of huge pages. Waits for the kernel.
    pub fn add_huge_page_volume(&self, volume: &HugePageVolume) -> Result<(), SandboxError> {
        let _alone = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(size::add_huge_page_volume(volume)?)
    }

    /// Ends every container and the guest. Returns only if that failed.
    pub async fn destroy(&self) -> Result<(), SandboxError> {
        if let Err(error) = cgroup::kill_pod().await {
            tracing::warn!(%error, "the guest ends with processes running");
        }
        rustix::fs::sync();
        let _ = unmount(SHARE_DIR, UnmountFlags::DETACH);
        let Err(error) = power::restart();
        Err(SandboxError::Reboot(error))
    }
}

/// Random bytes of the host, so that guests started from one template differ.
fn seed(entropy: &[u8]) -> Result<(), SandboxError> {
    for bytes in entropy.chunks(sys::MAX_ENTROPY) {
        std::fs::File::options()
            .write(true)
            .open("/dev/urandom")
            .and_then(|device| Ok(sys::add_entropy(&device, bytes)?))
            .map_err(SandboxError::Entropy)?;
    }
    Ok(())
}

fn mount_shm() -> Result<(), SandboxError> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_new("tmpfs", "shm", SHM_DIR, flags, &format!("mode=1777,size={SHM_SIZE}"))
}

fn mount_share(tag: &str) -> Result<(), SandboxError> {
    if tag.is_empty() {
        return Ok(());
    }
    mount_new("virtiofs", tag, SHARE_DIR, MountFlags::NODEV, "")?;
    if let Err(error) = share::tune(Path::new(SHARE_DIR)) {
        tracing::warn!(%error, "cannot set the read-ahead and the write-back limits of the pod's files: they are slower");
    }
    Ok(())
}

fn mount_new(
    kind: &'static str,
    source: &str,
    target: &'static str,
    flags: MountFlags,
    data: &str,
) -> Result<(), SandboxError> {
    let mounted = std::fs::create_dir_all(Path::new(target)).and_then(|()| {
        let data = CString::new(data)?;
        Ok(mount(source, target, kind, flags, Some(data.as_c_str()))?)
    });
    mounted.map_err(|source| SandboxError::Mount { kind, target, source })
}

/// The guest cannot be made the pod's.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A guest is one pod's for its life.
    #[error("this guest has a sandbox already; every sandbox needs a guest of its own")]
    Exists,
    /// sethostname(2).
    #[error("cannot set the host or domain name to \"{name}\"")]
    Hostname { name: String, source: io::Error },
    /// random(4).
    #[error("cannot seed the guest's random number generator")]
    Entropy(#[source] io::Error),
    /// adjtimex(2), ptp(4).
    #[error("cannot correct the guest's clock")]
    Clock(#[source] io::Error),
    /// CPUs and huge pages.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// mount(2).
    #[error("cannot mount {kind} at {target}")]
    Mount { kind: &'static str, target: &'static str, source: io::Error },
    /// Interfaces, routes, neighbours.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Sysctls.
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    /// reboot(2).
    #[error("cannot reboot the guest")]
    Reboot(#[source] io::Error),
}

impl SandboxError {
    /// Whether the request, rather than the guest, is at fault.
    pub fn is_bad_request(&self) -> bool {
        matches!(self, Self::Sysctl(SysctlError::Name { .. }))
    }
}
