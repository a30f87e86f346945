//! What containers on Bulkhead may ask for, in the form of the OCI (runtime-spec: features.md, features-linux.md).
//!
//! containerd 2.x and the kubelet believe what is written here: `rro` among the mount options turns on recursive
//! read-only mounts, `user` among the namespaces together with `idmap` turns on user namespaces (containerd:
//! internal/cri/server/service.go). So nothing is listed that does not work.

use serde_json::{Value, json};

/// Versions of the runtime-spec that are understood.
const OCI_VERSIONS: (&str, &str) = ("1.0.0", "1.2.1");

/// Options of mounts.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "remount",
    "ro",
    "rprivate",
    "rro",
    "rslave",
    "rw",
    "slave",
    "strictatime",
    "suid",
    "sync",
];

/// Namespaces that a container may ask for. Its network, IPC, UTS and user namespaces are the pod's.
const NAMESPACES: &[&str] = &["cgroup", "ipc", "mount", "network", "pid", "user", "uts"];

/// The whole table.
pub fn features() -> Value {
    json!({
        "ociVersionMin": OCI_VERSIONS.0,
        "ociVersionMax": OCI_VERSIONS.1,
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": NAMESPACES,
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            // Volumes of a pod with a user namespace have the container's ids as with such mounts, and need none.
            "mountExtensions": { "idmap": { "enabled": true } },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_sorted_so_that_a_change_is_easy_to_see() {
        assert!(MOUNT_OPTIONS.is_sorted() && NAMESPACES.is_sorted());
        assert_eq!(features()["linux"]["namespaces"][0], "cgroup");
    }
}
