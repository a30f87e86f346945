//! What the shim leaves out of every spec, and nobody else (agent.proto, `CreateContainerRequest`): what is the host's, what is
//! the pod's, and what the guest's kernel has no module for. The guest itself is the pod's IPC and UTS namespace, and its network
//! namespace unless the pod has a user namespace.
//!
//! A spec that has something of it all the same is refused. Nobody means it for this guest, and libcontainer would go by it.

use oci_spec::runtime::{Hooks, LinuxNamespace, LinuxNamespaceType, Process, Spec};

use crate::containers::ContainerError;

/// Refuses a spec that has what is not the container's.
pub fn of_spec(spec: &Spec) -> Result<(), ContainerError> {
    spec.process().as_ref().map_or(Ok(()), of_process)?;
    refuse(&[
        ("hostname", spec.hostname().is_some()),
        ("domainname", spec.domainname().is_some()),
        ("hooks", spec.hooks().as_ref().is_some_and(has_others)),
    ])?;
    let Some(linux) = spec.linux() else { return Ok(()) };
    refuse(&[
        ("linux.namespaces", linux.namespaces().iter().flatten().any(is_of_pod)),
        ("linux.uidMappings", linux.uid_mappings().is_some()),
        ("linux.gidMappings", linux.gid_mappings().is_some()),
        ("linux.sysctl", linux.sysctl().is_some()),
        ("linux.mountLabel", linux.mount_label().is_some()),
        ("linux.intelRdt", linux.intel_rdt().is_some()),
    ])
}

/// The same of a process, an init or an exec.
pub fn of_process(process: &Process) -> Result<(), ContainerError> {
    refuse(&[
        ("process.apparmorProfile", process.apparmor_profile().is_some()),
        ("process.selinuxLabel", process.selinux_label().is_some()),
    ])
}

fn refuse(fields: &[(&'static str, bool)]) -> Result<(), ContainerError> {
    let left_in = fields.iter().find(|(_, is_there)| *is_there);
    left_in.map_or(Ok(()), |(field, _)| Err(ContainerError::LeftIn { field }))
}

/// Whether there are hooks beside those that are programs of the container's own.
fn has_others(hooks: &Hooks) -> bool {
    [hooks.prestart(), hooks.create_runtime(), hooks.create_container(), hooks.poststart(), hooks.poststop()]
        .iter()
        .any(|list| list.as_ref().is_some_and(|list| !list.is_empty()))
}

/// Namespaces of the pod are joined by other words than the spec's, and none is known here by a path of the host.
fn is_of_pod(namespace: &LinuxNamespace) -> bool {
    use LinuxNamespaceType::{Ipc, Network, Pid, Uts};
    matches!(namespace.typ(), Network | Ipc | Uts | Pid) || namespace.path().is_some()
}
