//! What the spec of a pod's sandbox (or of a container without a pod) says about the VM around it.

use std::collections::HashMap;
use std::path::PathBuf;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::SpecError;

/// The sandbox by its spec.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct SandboxSpec {
    /// The guest's host name; may be empty.
    pub hostname: String,
    /// The CNI's network namespace; `None` for a pod with no network but loopback.
    pub netns: Option<PathBuf>,
    /// sysctls of the pod's namespaces.
    pub sysctls: HashMap<String, String>,
    /// Where the pod is accounted on the host.
    pub cgroups_path: Option<PathBuf>,
    /// All annotations.
    pub annotations: HashMap<String, String>,
}

/// Reads the sandbox's spec; refuses what shares a namespace of the host that a VM cannot share.
pub fn sandbox(spec: &Spec) -> Result<SandboxSpec, SpecError> {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let find = |typ| namespaces.and_then(|list| list.iter().find(|namespace| namespace.typ() == typ));
    let network = find(LinuxNamespaceType::Network).ok_or(SpecError::HostNetwork)?;
    find(LinuxNamespaceType::Ipc).ok_or(SpecError::HostIpc)?;
    let netns = network.path().clone().filter(|path| !path.as_os_str().is_empty());
    if netns.is_none() && find(LinuxNamespaceType::User).is_some() {
        return Err(SpecError::UserNetwork);
    }
    Ok(SandboxSpec {
        hostname: spec.hostname().clone().unwrap_or_default(),
        netns,
        sysctls: linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default(),
        cgroups_path: linux.and_then(|linux| linux.cgroups_path().clone()),
        annotations: spec.annotations().clone().unwrap_or_default(),
    })
}
