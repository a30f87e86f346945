//! Where a pod's files are on the host: one directory, and one socket.
//!
//! `/run/bulkhead/<namespace>/<sandbox id>/`, mode 0700, holds `share/` (what the guest sees), the pids of shim and
//! VMM for the one who cleans up after them, and a link to the socket. The socket has containerd's customary place, `/run/containerd/s/<hash>`; see
//! [`crate::endpoint`] for what is beside it.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::node::{SHIM_RECORD, SHIM_SOCKET, VMM_RECORD};
use sha2::{Digest, Sha256};

/// Directory of the shims' sockets.
pub const SOCKET_DIR: &str = "/run/containerd/s";

/// The directory of one pod.
#[derive(Clone, Debug)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// Names the directory of a sandbox; both names are checked identifiers.
    pub fn new(root: &Path, namespace: &str, sandbox_id: &str) -> Self {
        Self(root.join(namespace).join(sandbox_id))
    }

    /// One that is there.
    pub fn at(path: &Path) -> Self {
        Self(path.to_path_buf())
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The pod's share.
    pub fn share(&self) -> PathBuf {
        self.0.join("share")
    }

    /// Names the shim's process.
    pub fn shim_pid(&self) -> PathBuf {
        self.0.join(SHIM_RECORD)
    }

    /// Names the VMM's process.
    pub fn vmm_pid(&self) -> PathBuf {
        self.0.join(VMM_RECORD)
    }

    /// Names the VMM's cgroup.
    pub fn cgroup(&self) -> PathBuf {
        self.0.join("cgroup")
    }

    /// Where the time of the boot went.
    pub fn timeline(&self) -> PathBuf {
        self.0.join("boot.json")
    }

    /// Leads to the shim's socket, for an operator's commands. Nothing else needs it.
    pub fn link_socket(&self, socket: &Path) {
        if let Err(error) = std::os::unix::fs::symlink(socket, self.0.join(SHIM_SOCKET)) {
            tracing::warn!(%error, "cannot link to the shim's socket in {}", self.0.display());
        }
    }

    /// Makes the directory, readable by root alone.
    pub fn create(&self) -> std::io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0)
    }
}

/// The socket of a sandbox's shim: a hash, because a path longer than 106 bytes cannot be bound (unix(7)).
pub fn socket_path(containerd: &str, namespace: &str, sandbox_id: &str) -> PathBuf {
    let digest = Sha256::digest(format!("{containerd}/{namespace}/{sandbox_id}"));
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Path::new(SOCKET_DIR).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_path_fits_and_tells_sandboxes_apart() {
        let a = socket_path("/run/containerd/containerd.sock", "k8s.io", "a");
        let b = socket_path("/run/containerd/containerd.sock", "k8s.io", "b");
        assert_ne!(a, b);
        assert!(a.as_os_str().len() <= 106);
        assert!(a.starts_with(SOCKET_DIR));
    }
}
