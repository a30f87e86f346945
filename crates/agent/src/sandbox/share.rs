//! How the kernel treats the pod's share, which is one virtio-fs for all of its files.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor, stat};

/// How far the kernel reads ahead, in KiB: as much as one request holds. Its default is an eighth of that.
const READ_AHEAD_KIB: &str = "1024";

/// A FUSE server is not trusted to write back: 1 % of the memory may wait for it. This one is the host, so the limits of all
/// file systems do (Documentation/ABI/testing/sysfs-class-bdi). A device that has written little yet has a small share of these
/// limits; this one has at least half of them, because there is hardly another, so files that are soon removed are not written.
pub fn tune(share: &Path) -> io::Result<()> {
    let device = stat(share)?.st_dev;
    let bdi = PathBuf::from(format!("/sys/class/bdi/{}:{}", major(device), minor(device)));
    for (file, value) in
        [("read_ahead_kb", READ_AHEAD_KIB), ("max_ratio", "100"), ("min_ratio", "50"), ("strict_limit", "0")]
    {
        std::fs::write(bdi.join(file), value)?;
    }
    Ok(())
}
