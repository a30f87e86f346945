//! `delete`: clean up what a dead shim left, in the 5 s that containerd gives, and say how the task ended.
//!
//! containerd runs this whenever a connection that it opened has closed, a normal shutdown included, and for each container
//! of a pod with version 2 of the contract; so everything may be gone already, or be going away at the same time.

use std::io::Write;
use std::path::{Path, PathBuf};

use bulkhead_protocol::node::RUN_ROOT;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};

use super::flags::Flags;
use crate::annotations::Role;
use crate::bundle;
use crate::endpoint::Endpoint;
use crate::paths::{RunDir, socket_path};
use crate::pod::files::PodFiles;
use crate::pod::process::Exit;
use crate::sandbox::{Cgroup, kill_recorded};
use crate::share::{Share, ShareError};

/// Runs the action.
pub fn run(flags: &Flags) -> Result<(), DeleteError> {
    // containerd 1.6 gives the flag and also makes it the working directory; without either there is no bundle to read.
    let bundle = flags.bundle.clone().or_else(|| std::env::current_dir().ok()).unwrap_or_default();
    match bundle::read_role(&bundle) {
        Ok(Role::Member(sandbox)) => remove_member(flags, &sandbox)?,
        // Without a readable spec nothing says that it was a member; a pod's directory with this id would be its own.
        Ok(Role::Sandbox | Role::Standalone) | Err(_) => {
            let endpoint = Endpoint::new(socket_path(&flags.address, &flags.namespace, &flags.id));
            remove_pod(&endpoint, &RunDir::new(Path::new(RUN_ROOT), &flags.namespace, &flags.id))?;
            // A bundle without a spec is one of the Sandbox API, whose files are ours.
            if !bundle.join("config.json").exists()
                && let Some(files) = PodFiles::locate(&bundle, &flags.id)
            {
                files.remove();
            }
        }
    }
    remove_rootfs(&bundle);
    let answer = DeleteResponse {
        exit_status: Exit::KILLED,
        exited_at: MessageField::some(Timestamp::now()),
        ..DeleteResponse::default()
    };
    let bytes = answer.write_to_bytes().map_err(DeleteError::Encode)?;
    std::io::stdout().write_all(&bytes).map_err(DeleteError::Answer)
}

/// The mounts of one container; its pod goes on.
fn remove_member(flags: &Flags, sandbox: &str) -> Result<(), DeleteError> {
    let run_dir = RunDir::new(Path::new(RUN_ROOT), &flags.namespace, sandbox);
    Share::of(&run_dir).remove_container(&flags.id).map_err(DeleteError::Share)
}

/// Everything of a pod: processes first, so that nothing is made anew while it is being removed.
fn remove_pod(endpoint: &Endpoint, run_dir: &RunDir) -> Result<(), DeleteError> {
    // The first record also names a daemon that has no VM, not yet or not any more. The second one is for daemons of releases
    // that do not write the first.
    kill_recorded(&[&endpoint.record(), &run_dir.shim_pid(), &run_dir.vmm_pid()]);
    if let Some(cgroup) = Cgroup::noted(&run_dir.cgroup()) {
        cgroup.remove();
    }
    endpoint.withdraw();
    Share::destroy(run_dir).map_err(DeleteError::Share)
}

/// Older containerd versions mount a root file system in the bundle themselves when a shim asks them to; ours never does,
/// but what is mounted there would keep the bundle from being removed.
fn remove_rootfs(bundle: &Path) {
    let rootfs: PathBuf = bundle.join("rootfs");
    let flags = rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW;
    let _ = rustix::mount::unmount(&rootfs, flags);
}

/// `delete` failed.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Mounts.
    #[error(transparent)]
    Share(ShareError),
    /// Cannot happen with a message of ours.
    #[error("cannot encode the answer to delete")]
    Encode(#[source] protobuf::Error),
    /// stdout is gone.
    #[error("cannot print the answer to delete")]
    Answer(#[source] std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::record;

    #[test]
    fn daemon_that_has_no_vm_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::new(dir.path().join("socket"));
        std::fs::write(endpoint.socket(), "").unwrap();
        let mut daemon = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        record(&endpoint.record(), daemon.id());
        remove_pod(&endpoint, &RunDir::new(&dir.path().join("run"), "k8s.io", "s")).unwrap();
        assert!(!daemon.wait().unwrap().success());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
