//! The pod's share: one virtio-fs for all of its files.

use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::guest::SHARE_DIR;
use rustix::fs::{major, minor, stat};
use rustix::mount::MountFlags;

use super::{SandboxError, mount_new};

/// How far the kernel reads ahead, in KiB: as much as one request holds. Its default is an eighth of that.
const READ_AHEAD_KIB: &str = "1024";

/// Mounts the share, if the pod has one.
pub fn mount(tag: &str) -> Result<(), SandboxError> {
    if tag.is_empty() {
        return Ok(());
    }
    mount_new("virtiofs", tag, SHARE_DIR, MountFlags::NODEV, "")?;
    if let Err(error) = tune(Path::new(SHARE_DIR)) {
        tracing::warn!(%error, "cannot set the read-ahead and the write-back limits of the pod's files: they are slower");
    }
    Ok(())
}

/// A FUSE server is not trusted to write back: 1 % of the memory may wait for it. This one is the host, so the limits of all
/// file systems do (Documentation/ABI/testing/sysfs-class-bdi).
fn tune(share: &Path) -> io::Result<()> {
    let device = stat(share)?.st_dev;
    let bdi = PathBuf::from(format!("/sys/class/bdi/{}:{}", major(device), minor(device)));
    for (file, value) in [("read_ahead_kb", READ_AHEAD_KIB), ("max_ratio", "100"), ("strict_limit", "0")] {
        std::fs::write(bdi.join(file), value)?;
    }
    Ok(())
}
