//! Namespaces that a spec names by a path and that are the node's own. CRI-O gives a pod of the host's network a path like any
//! other's, so what counts is what is behind it.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use super::SpecError;
use crate::node_namespaces::is_nodes;

/// Refuses a spec that names one.
pub fn refuse_namespaces(spec: &Spec) -> Result<(), SpecError> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    for namespace in namespaces.into_iter().flatten() {
        let (Some(path), Some((name, error))) = (path_of(namespace), known(namespace.typ())) else { continue };
        if is_nodes(path, name) {
            return Err(error);
        }
    }
    Ok(())
}

/// Refuses the path of a network namespace.
pub fn refuse_netns(path: &Path) -> Result<(), SpecError> {
    if is_nodes(path, "net") { Err(SpecError::HostNetwork) } else { Ok(()) }
}

/// Refuses namespaces that a container without a pod would share with the node or with another container, which is in another
/// kernel.
pub fn refuse_shared(spec: &Spec) -> Result<(), SpecError> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let mut has_names = false;
    for namespace in namespaces.into_iter().flatten() {
        has_names |= namespace.typ() == LinuxNamespaceType::Uts;
        if let Some(path) = path_of(namespace).filter(|_| namespace.typ() != LinuxNamespaceType::Network) {
            return Err(SpecError::SharedNamespace(namespace.typ().to_string(), path.into()));
        }
    }
    if has_names { Ok(()) } else { Err(SpecError::HostUts) }
}

/// The path of a namespace that has one.
pub fn path_of(namespace: &LinuxNamespace) -> Option<&Path> {
    namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty())
}

/// The name in /proc of a namespace that a VM cannot share with the host, and what is said then.
fn known(kind: LinuxNamespaceType) -> Option<(&'static str, SpecError)> {
    Some(match kind {
        LinuxNamespaceType::Network => ("net", SpecError::HostNetwork),
        LinuxNamespaceType::Ipc => ("ipc", SpecError::HostIpc),
        LinuxNamespaceType::Pid => ("pid", SpecError::HostPid),
        LinuxNamespaceType::Uts => ("uts", SpecError::HostUts),
        LinuxNamespaceType::User => ("user", SpecError::HostUser),
        LinuxNamespaceType::Mount => ("mnt", SpecError::HostMounts),
        LinuxNamespaceType::Cgroup | LinuxNamespaceType::Time => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(namespaces: serde_json::Value) -> Spec {
        serde_json::from_value(json!({"ociVersion": "1.1.0", "linux": {"namespaces": namespaces}})).unwrap()
    }

    #[test]
    fn namespace_of_the_node_is_refused_by_whatever_path() {
        let dir = tempfile::tempdir().unwrap();
        for (kind, name, words) in [
            ("network", "net", "hostNetwork"),
            ("ipc", "ipc", "hostIPC"),
            ("pid", "pid", "hostPID"),
            ("uts", "uts", "UTS"),
            ("user", "user", "user namespace"),
            ("mount", "mnt", "mount namespace"),
        ] {
            let link = dir.path().join(name);
            std::os::unix::fs::symlink(format!("/proc/self/ns/{name}"), &link).unwrap();
            // The first process's is out of sight of a test in a container.
            let first = Path::new("/proc/1/ns").join(name);
            for path in [first, link].into_iter().filter(|path| path.metadata().is_ok()) {
                let error = refuse_namespaces(&spec(json!([{"type": kind, "path": path}]))).unwrap_err();
                assert!(error.to_string().contains(words), "{kind}: {error}");
            }
        }
        assert!(matches!(refuse_netns(Path::new("/proc/self/ns/net")), Err(SpecError::HostNetwork)));
    }

    #[test]
    fn namespaces_of_others_pass_and_so_do_new_ones_and_what_is_not_there() {
        let listed = json!([{"type": "network", "path": "/nonexistent"}, {"type": "ipc"}, {"type": "uts", "path": ""},
            {"type": "cgroup", "path": "/proc/self/ns/cgroup"}]);
        refuse_namespaces(&spec(listed)).unwrap();
        // The placeholder of a pod, for one.
        let other = std::process::Command::new("unshare").args(["-u", "sleep", "60"]).spawn();
        let mut other = other.unwrap();
        // It is in its own namespace once it is sleep(1).
        let comm = format!("/proc/{}/comm", other.id());
        while std::fs::read_to_string(&comm).unwrap() != "sleep\n" {
            std::thread::yield_now();
        }
        refuse_namespaces(&spec(json!([{"type": "uts", "path": format!("/proc/{}/ns/uts", other.id())}]))).unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
    }

    #[test]
    fn container_without_a_pod_shares_no_namespace_but_its_network() {
        let own = json!([{"type": "network", "path": "/run/netns/x"}, {"type": "ipc"}, {"type": "uts"}]);
        refuse_shared(&spec(own)).unwrap();
        let error = refuse_shared(&spec(json!([{"type": "ipc", "path": "/proc/7/ns/ipc"}]))).unwrap_err().to_string();
        assert!(error.contains("ipc") && error.contains("/proc/7/ns/ipc"), "{error}");
        assert!(matches!(refuse_shared(&spec(json!([{"type": "ipc"}]))), Err(SpecError::HostUts)));
    }
}
