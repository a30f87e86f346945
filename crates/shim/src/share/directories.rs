//! Directories of the share: made, and removed without a step into a volume.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::ShareError;
use super::mountinfo;

/// Makes a directory and those above it; one that is there is no error.
pub fn make_dir(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// How often the mounts below a path are looked at until there are none. One round takes all of them away; more are for what
/// the host mounts meanwhile in a volume that follows it.
const ROUNDS: u32 = 8;

/// Removes directories of a share, and what they are mounted on in the VMM's namespace is detached with them.
pub fn remove_tree(path: &Path) -> Result<(), ShareError> {
    // Only after nothing is mounted there for the node: removing must never reach into a volume. A shim of a version that
    // mounted there may have been replaced while its pod ran.
    detach_mounts(path)?;
    let removed = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    ignore_absent(removed).map_err(|error| ShareError::at("remove", path, error))
}

/// The outermost mounts are detached, and take with them what is mounted below: a path that leads through a volume may have no
/// end, when whoever serves that volume does not answer any more.
fn detach_mounts(path: &Path) -> Result<(), ShareError> {
    for _ in 0..ROUNDS {
        let mounts = outermost(mountinfo::mounts_below(path).map_err(ShareError::MountTable)?);
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in &mounts {
            match unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                // Another one may be removing the same.
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
                Err(error) => return Err(ShareError::at("unmount", mount, error.into())),
            }
        }
    }
    Err(ShareError::at("unmount", path, Errno::BUSY.into()))
}

/// The mounts that are not below another one. If several are at one place all of them count: one may hide what is below
/// another.
pub fn outermost(mut mounts: Vec<PathBuf>) -> Vec<PathBuf> {
    // By component, so what is below a place comes straight after it.
    mounts.sort();
    mounts.dedup_by(|next, outer| next != outer && next.starts_with(&*outer));
    mounts
}

/// What is gone already is no error.
pub fn ignore_absent(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
