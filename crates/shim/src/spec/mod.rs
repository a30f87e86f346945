//! A container's OCI spec, rewritten for the guest (the contract is at `CreateContainerRequest` in agent.proto).
//!
//! Pure: [`disks`] and [`volumes`] say what of the host a container is to be given, and [`translate`] is told under which names the
//! guest has it. Whatever names a thing of the host (namespace paths,
//! cgroups, security labels, cpusets) is dropped, its block devices become the guest's ([`devices`]); what cannot be honoured in a guest is refused.

mod asker;
mod devices;
mod error;
mod hooks;
mod host;
mod huge_pages;
mod mounts;
mod namespaces;
mod pod;
mod resources;
mod sandbox;
mod users;

use bulkhead_protocol::guest::SHARE_DIR;
use oci_spec::runtime::{Linux, Process, Root, Spec};

pub use asker::Asker;
pub use devices::{DeviceNumber, GuestDisk, HostDisk, disks, leave_out_hosts};
pub use error::SpecError;
pub use hooks::{HostHooks, take as take_hooks};
pub use host::{refuse_namespaces, refuse_netns, refuse_shared};
pub use huge_pages::{HugeVolume, huge_volumes};
pub use mounts::{Access, GuestVolume, SCRATCH_DEPTH, Volume, volumes};
pub use namespaces::PidChoice;
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

#[cfg(test)]
mod tests;
