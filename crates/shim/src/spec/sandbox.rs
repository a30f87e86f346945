//! What the spec of a pod's sandbox (or of a container without a pod) says about the VM around it.

use std::collections::HashMap;
use std::path::PathBuf;

use bulkhead_protocol::agent::UserNamespace;
use bulkhead_protocol::vmspec::IdMaps;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::host::path_of;
use super::{SpecError, users};
use crate::annotations::{self, Role};

/// The sandbox by its spec.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SandboxSpec {
    /// The guest's host name; may be empty.
    pub hostname: String,
    /// NIS domain name; may be empty.
    pub domainname: String,
    /// Where its network is.
    pub netns: Netns,
    /// Its user namespace, if it has one.
    pub user: Option<UserNamespace>,
    /// How the owners of its files are mapped.
    pub share_ids: IdMaps,
    /// Nobody but the guest changes root file systems. An engine copies files into a container's while it runs (`docker cp`).
    pub private_roots: bool,
    /// sysctls of the pod's namespaces.
    pub sysctls: HashMap<String, String>,
    /// Where the pod is accounted on the host.
    pub cgroups_path: Option<PathBuf>,
    /// All annotations.
    pub annotations: HashMap<String, String>,
}

/// A pod's network namespace on the host.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Netns {
    /// The sandbox's process has to have one of its own. containerd 2 lets CNI make the network there when the sandbox runs
    /// (internal/cri/server/sandbox_run.go, for pods with a user namespace), engines like Docker make it by a hook, and
    /// without either it has no network but loopback.
    #[default]
    New,
    /// CNI has prepared it.
    At(PathBuf),
}

/// Reads the sandbox's spec; refuses what shares a namespace of the host that a VM cannot share.
pub fn sandbox(spec: &Spec) -> Result<SandboxSpec, SpecError> {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let find = |typ| namespaces.and_then(|list| list.iter().find(|namespace| namespace.typ() == typ));
    let network = find(LinuxNamespaceType::Network).ok_or(SpecError::HostNetwork)?;
    find(LinuxNamespaceType::Ipc).ok_or(SpecError::HostIpc)?;
    find(LinuxNamespaceType::Pid).ok_or(SpecError::HostPid)?;
    let user = find(LinuxNamespaceType::User).and(linux);
    let user =
        user.map(|linux| users::namespace(users::inside(linux.uid_mappings()), users::inside(linux.gid_mappings())));
    let user = user.transpose()?;
    let netns = path_of(network).map_or(Netns::New, |path| Netns::At(path.to_path_buf()));
    let annotations = spec.annotations().clone().unwrap_or_default();
    Ok(SandboxSpec {
        hostname: spec.hostname().clone().unwrap_or_default(),
        domainname: spec.domainname().clone().unwrap_or_default(),
        netns,
        user,
        share_ids: users::of_share(spec)?,
        private_roots: annotations::role(&annotations) == Ok(Role::Sandbox),
        sysctls: linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default(),
        cgroups_path: linux.and_then(|linux| linux.cgroups_path().clone()),
        annotations,
    })
}
