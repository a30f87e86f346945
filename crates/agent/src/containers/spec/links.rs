//! Mounts on links of the image that lead to nothing yet, such as an /etc/resolv.conf of systemd's.
//!
//! runc makes the mount where the link leads, within the root. libcontainer follows a link to what exists only, so it gets
//! the place itself.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;

/// Points destinations to where the root file system's links lead.
pub fn follow(mounts: &mut [Mount], rootfs: &Path) {
    let mut made: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        let destination = mount.destination().clone();
        // Below another mount it is that one's links that count, which libcontainer sees.
        if !made.iter().any(|above| destination.starts_with(above))
            && let Some(place) = behind_dangling_link(rootfs, &destination)
        {
            mount.set_destination(place);
        }
        made.push(destination);
    }
}

fn behind_dangling_link(rootfs: &Path, destination: &Path) -> Option<PathBuf> {
    let place = safe_path::scoped_join(rootfs, destination).ok()?;
    let inside = Path::new("/").join(place.strip_prefix(rootfs).ok()?);
    (inside != destination && place.symlink_metadata().is_err()).then_some(inside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::MountBuilder;
    use std::os::unix::fs::symlink;

    fn followed(rootfs: &Path, destinations: &[&str]) -> Vec<PathBuf> {
        let mount = |to: &&str| MountBuilder::default().destination(to).build().unwrap();
        let mut mounts: Vec<_> = destinations.iter().map(mount).collect();
        follow(&mut mounts, rootfs);
        mounts.iter().map(|mount| mount.destination().clone()).collect()
    }

    #[test]
    fn only_links_to_nothing_are_followed() {
        let root = tempfile::tempdir().unwrap();
        let rootfs = root.path().canonicalize().unwrap();
        std::fs::create_dir_all(rootfs.join("etc")).unwrap();
        std::fs::write(rootfs.join("etc/there"), "").unwrap();
        symlink("../run/systemd/stub.conf", rootfs.join("etc/resolv.conf")).unwrap();
        symlink("/etc/there", rootfs.join("etc/link")).unwrap();
        symlink("../../../../outside", rootfs.join("etc/up")).unwrap();
        symlink("loop", rootfs.join("etc/loop")).unwrap();
        let given = ["/etc/resolv.conf", "/etc/link", "/etc/there", "/new/place", "/etc/up", "/etc/loop", "/"];
        let wanted = ["/run/systemd/stub.conf", "/etc/link", "/etc/there", "/new/place", "/outside", "/etc/loop", "/"];
        assert_eq!(followed(&rootfs, &given), wanted.map(PathBuf::from));
        assert_eq!(followed(&rootfs, &["/etc", "/etc/resolv.conf"]), ["/etc", "/etc/resolv.conf"].map(PathBuf::from));
    }
}
