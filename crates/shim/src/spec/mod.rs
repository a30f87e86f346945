//! A container's OCI spec, rewritten for the guest (the contract is at `CreateContainerRequest` in agent.proto).
//!
//! Pure: [`disks`] and [`volumes`] say what of the host a container is to be given, and [`translate`] is told under which names the
//! guest has it. Whatever names a thing of the host (namespace paths,
//! cgroups, security labels, cpusets) is dropped, its block devices become the guest's ([`devices`]); what cannot be honoured in a guest is refused.

mod asker;
mod devices;
mod hooks;
mod host;
mod huge_pages;
mod mounts;
mod namespaces;
mod pod;
mod resources;
mod sandbox;
mod users;

use bulkhead_protocol::agent::PidNamespace;
use bulkhead_protocol::cri::NamespaceMode;
use bulkhead_protocol::guest::SHARE_DIR;
use oci_spec::runtime::{Linux, Process, Root, Spec};
use protobuf::EnumOrUnknown;

pub use asker::Asker;
pub use devices::{DeviceNumber, GuestDisk, HostDisk, disks, leave_out_hosts};
pub use hooks::{HostHooks, take as take_hooks};
pub use host::{refuse_namespaces, refuse_netns, refuse_shared};
pub use huge_pages::{HugeVolume, huge_volumes};
pub use mounts::{Access, GuestVolume, SCRATCH_DEPTH, Volume, volumes};
pub use pod::pod_sandbox;
pub use resources::{limits, parse as parse_resources, translate as translate_resources};
pub use sandbox::{Netns, SandboxSpec, sandbox};

/// A container as the agent is asked to create it.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// The spec as JSON.
    pub json: Vec<u8>,
    /// Where the pid namespace comes from.
    pub pid: PidChoice,
}

/// Where a container's pid namespace comes from, by the pids that the shim has reported.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PidChoice {
    /// A new one.
    Own,
    /// The pod's.
    Pod,
    /// That of the container with this reported pid, or the pod's if it is the sandbox's.
    OfReported(u32),
}

impl PidChoice {
    /// The protocol's form; `target` is whether a container was found for the pid.
    pub fn to_protocol(self, target: bool) -> PidNamespace {
        match self {
            Self::Own => PidNamespace::PID_NAMESPACE_OWN,
            Self::OfReported(_) if target => PidNamespace::PID_NAMESPACE_TARGET,
            Self::Pod | Self::OfReported(_) => PidNamespace::PID_NAMESPACE_POD,
        }
    }
}

/// What a container has been given before its spec is rewritten.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// Those that [`disks`] has named.
    pub disks: Vec<GuestDisk>,
    /// Those that [`huge_volumes`] has found.
    pub huge_volumes: Vec<HugeVolume>,
    /// Those that [`volumes`] has named.
    pub volumes: Vec<GuestVolume>,
}

/// Refuses what [`translate`], [`disks`] and [`volumes`] will refuse, before there is anything to give.
pub fn check(spec: &Spec, id: &str) -> Result<(), SpecError> {
    disks(spec)?;
    let volumes = volumes(spec, &[])?.into_iter().map(|host| GuestVolume { host, number: 0 }).collect();
    translate(spec.clone(), id, &Given { volumes, ..Given::default() }).map(drop)
}

/// Rewrites a container's spec.
pub fn translate(mut spec: Spec, id: &str, given: &Given) -> Result<GuestSpec, SpecError> {
    devices::renumber(&mut spec, &given.disks);
    devices::open_to_privileged(&mut spec);
    refuse_what_is_on_the_host(&spec)?;
    let binds = mounts::Binds::of(&spec, &given.huge_volumes);
    let pid = namespaces::strip(&mut spec)?;
    mounts::rewrite(&mut spec, id, &binds, &given.volumes)?;
    users::rewrite(&mut spec);
    let mut root = spec.root().clone().unwrap_or_default();
    root.set_path(format!("{SHARE_DIR}/{id}/rootfs").into());
    // The names are the pod's: the guest has them since its sandbox was created.
    spec.set_root(Some(root)).set_hostname(None).set_domainname(None);
    if let Some(process) = spec.process_mut() {
        strip_process(process);
    }
    if let Some(linux) = spec.linux_mut() {
        strip_linux(linux);
    }
    let json = serde_json::to_vec(&spec).map_err(SpecError::Encode)?;
    Ok(GuestSpec { json, pid })
}

fn refuse_what_is_on_the_host(spec: &Spec) -> Result<(), SpecError> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(SpecError::NetDevices);
    }
    let listener = linux.seccomp().as_ref().and_then(|seccomp| seccomp.listener_path().as_ref());
    if listener.is_some_and(|path| !path.as_os_str().is_empty()) {
        return Err(SpecError::SeccompListener);
    }
    Ok(())
}

/// The root directory that a spec names, relative to the bundle unless absolute.
pub fn root_path(spec: &Spec) -> std::path::PathBuf {
    spec.root().as_ref().map_or_else(|| "rootfs".into(), |root: &Root| root.path().clone())
}

/// What a container executes.
pub fn arguments(spec: &Spec) -> Vec<String> {
    spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default()
}

/// The same of an exec's process, JSON.
pub fn process_arguments(json: &[u8]) -> Vec<String> {
    let process: Option<Process> = serde_json::from_slice(json).ok();
    process.and_then(|process| process.args().clone()).unwrap_or_default()
}

/// Size of a terminal in characters; 0 is the kernel's choice.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ConsoleSize {
    /// Columns.
    pub width: u32,
    /// Lines.
    pub height: u32,
}

impl ConsoleSize {
    /// What a process says of its terminal.
    pub fn of(process: &Process) -> Self {
        let cells = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        let size = process.console_size();
        size.map_or_else(Self::default, |size| Self { width: cells(size.width()), height: cells(size.height()) })
    }
}

/// Rewrites an exec's process, JSON in, JSON out, and says what size its terminal has.
pub fn translate_process(json: &[u8]) -> Result<(Vec<u8>, ConsoleSize), SpecError> {
    let mut process: Process = serde_json::from_slice(json).map_err(SpecError::Process)?;
    strip_process(&mut process);
    let size = ConsoleSize::of(&process);
    Ok((serde_json::to_vec(&process).map_err(SpecError::Encode)?, size))
}

/// The guest's kernel has neither AppArmor nor SELinux: the VM is the confinement. Nor has it the host's CPUs.
fn strip_process(process: &mut Process) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    process.set_exec_cpu_affinity(None);
}

fn strip_linux(linux: &mut Linux) {
    linux.set_cgroups_path(None);
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    linux.set_memory_policy(None);
    // Propagation beyond the guest does not exist; inside, the container's tree is its own.
    linux.set_rootfs_propagation(None);
    // The pod's sysctls are set once, when the sandbox is created.
    linux.set_sysctl(None);
    if let Some(resources) = linux.resources_mut() {
        resources::strip(resources);
    }
}

/// A spec that a guest cannot honour.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The pod wants the host's network.
    #[error(
        "hostNetwork is not possible in a VM, which has a network of its own; remove hostNetwork from the pod or run it with runc"
    )]
    HostNetwork,
    /// The pod wants the host's IPC.
    #[error(
        "hostIPC is not possible in a VM, which has a kernel of its own; remove hostIPC from the pod or run it with runc"
    )]
    HostIpc,
    /// The pod wants to see the host's processes.
    #[error(
        "hostPID is not possible in a VM, whose processes are not the host's; remove hostPID from the pod or run it with runc"
    )]
    HostPid,
    /// The pod wants the host's names.
    #[error(
        "the host's UTS namespace is not possible in a VM, which has a host name of its own; remove what asks for it (hostNetwork of a pod, --uts host) or use runc"
    )]
    HostUts,
    /// The pod wants the host's user namespace, by its path.
    #[error(
        "the host's user namespace is not possible in a VM, whose users are not the host's; remove what names its path or use runc"
    )]
    HostUser,
    /// The pod wants the host's mounts.
    #[error(
        "the host's mount namespace is not possible in a VM, which has mounts of its own; remove what names its path or use runc"
    )]
    HostMounts,
    /// A container without a pod wants a namespace of another container.
    #[error(
        "the container is to share the {0} namespace {1:?}, which is not in its VM: a container without a pod has a VM to itself; give it a namespace of its own, or make a pod of both"
    )]
    SharedNamespace(String, std::path::PathBuf),
    /// A mount shall propagate into the host.
    #[error(
        "the mount at {0:?} is to propagate into the host (Bidirectional), which a VM cannot do; use HostToContainer or None"
    )]
    Bidirectional(std::path::PathBuf),
    /// The container's devices shall be those of a directory of the host.
    #[error(
        "the mount at /dev would replace the container's devices by those of the host, which a VM cannot reach; mount it elsewhere, or run the pod with runc"
    )]
    Dev,
    /// A network interface of the host is to be moved into the container.
    #[error(
        "the container is given a network device of the host (linux.netDevices), which cannot be moved into a VM; remove what adds it, or run the pod with runc"
    )]
    NetDevices,
    /// A seccomp filter asks a program of the host.
    #[error(
        "the container's seccomp filter notifies a listener on the host (listenerPath), which cannot answer for processes of a VM; use a profile without one, or run the pod with runc"
    )]
    SeccompListener,
    /// A `createContainer` hook.
    #[error(
        "the container has an OCI hook createContainer, a program of the host that cannot run inside a VM; remove what adds it, or run the pod with runc"
    )]
    CreateContainerHook,
    /// A device of the host that a guest cannot be given.
    #[error(
        "the container is given the host's device {0:?}, which a VM cannot reach; only block devices are possible: {hint}",
        hint = .1.without_host_devices()
    )]
    Device(std::path::PathBuf, Asker),
    /// Nobody could set up a container.
    #[error(
        "the pod's user namespace has no id 0, as which its containers are set up; map root of users and groups, or remove the user namespace from the pod"
    )]
    NoRoot,
    /// A mode of user namespaces that no pod can have.
    #[error(
        "the pod asks for a user namespace of the mode {0:?}, but it has one of its own (POD) or none (NODE); correct the pod's configuration"
    )]
    UserNamespaceMode(EnumOrUnknown<NamespaceMode>),
    /// Ids beyond what there are.
    #[error("the pod's user namespace maps ids beyond 4294967295; correct its mappings")]
    Ids,
    /// The ids of a volume are to be mapped by a namespace that has no path.
    #[error(
        "the owners of the volume at {0:?} are to be mapped, but the container's user namespace is not one that can be opened; update CRI-O"
    )]
    VolumeIds(std::path::PathBuf),
    /// A bind mount without a source.
    #[error("the mount at {0:?} has no source")]
    NoSource(std::path::PathBuf),
    /// Cannot happen with volumes that [`volumes`] has named.
    #[error("the volume {0:?} is not in the pod's share")]
    NotGiven(std::path::PathBuf),
    /// A pid namespace path that names no process.
    #[error("the pid namespace path {0:?} is not /proc/<pid>/ns/pid")]
    PidPath(std::path::PathBuf),
    /// An exec's process.
    #[error("the exec's process is not an OCI process")]
    Process(#[source] serde_json::Error),
    /// An update's resources.
    #[error("the update's resources are not OCI resources")]
    Resources(#[source] serde_json::Error),
    /// Cannot happen with what was parsed before.
    #[error("cannot encode the spec")]
    Encode(#[source] serde_json::Error),
}

#[cfg(test)]
mod tests;
