//! Namespaces of a container: the pod's network, IPC and UTS namespaces are the guest's own; no path of the host survives.

use std::path::Path;

use bulkhead_protocol::agent::PidNamespace;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use super::SpecError;

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

/// Removes what the guest gives itself and answers where the pid namespace comes from.
pub fn strip(spec: &mut Spec) -> Result<PidChoice, SpecError> {
    let Some(linux) = spec.linux_mut() else { return Ok(PidChoice::Pod) };
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    let mut pid = PidChoice::Pod;
    let mut kept = Vec::new();
    for mut namespace in namespaces {
        match namespace.typ() {
            LinuxNamespaceType::Network | LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts => {}
            LinuxNamespaceType::Pid => pid = choice(&namespace)?,
            _ => {
                namespace.set_path(None);
                kept.push(namespace);
            }
        }
    }
    linux.set_namespaces(Some(kept));
    Ok(pid)
}

fn choice(namespace: &LinuxNamespace) -> Result<PidChoice, SpecError> {
    let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(PidChoice::Own);
    };
    reported_pid(path).map(PidChoice::OfReported).ok_or_else(|| SpecError::PidPath(path.clone()))
}

/// The number in `/proc/<pid>/ns/pid`.
fn reported_pid(path: &Path) -> Option<u32> {
    path.strip_prefix("/proc").ok()?.to_str()?.strip_suffix("/ns/pid")?.parse().ok()
}
