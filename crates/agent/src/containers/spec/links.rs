//! Mounts on links of the image.
//!
//! runc makes a mount where links lead within the root, whether something is there or not, as with an /etc/resolv.conf of
//! systemd's. libcontainer follows a link to what exists only, so it gets the place itself. Links of what is mounted before
//! are not the image's; there libcontainer goes on by itself.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Mount;

/// Most links on the way to one place, as with path_resolution(7).
const MAX_LINKS: usize = 40;

/// Points destinations to where the root file system's links lead.
pub fn follow(mounts: &mut [Mount], rootfs: &Path) {
    let mut made: Vec<PathBuf> = Vec::new();
    for mount in mounts {
        // Those may not be on a link at all, which is libcontainer's to refuse.
        if !matches!(mount.typ().as_deref(), Some("proc" | "sysfs"))
            && let Some(place) = resolve(rootfs, mount.destination(), &made)
        {
            mount.set_destination(place);
        }
        made.push(mount.destination().clone());
    }
}

/// Where a path leads from the root, up to the first place that has a mount; `None` if it leads in circles.
fn resolve(rootfs: &Path, destination: &Path, made: &[PathBuf]) -> Option<PathBuf> {
    let (mut done, mut rest) = (PathBuf::from("/"), destination.to_path_buf());
    let mut links = 0;
    loop {
        let mut parts = rest.components();
        match parts.next() {
            None => return Some(done),
            Some(Component::ParentDir) => drop(done.pop()),
            Some(Component::Normal(name)) => {
                let next = done.join(name);
                if made.iter().any(|mount| next.starts_with(mount) && mount != Path::new("/")) {
                    return Some(next.join(parts.as_path()));
                }
                if let Ok(target) = std::fs::read_link(rootfs.join(next.strip_prefix("/").ok()?)) {
                    links += 1;
                    if links > MAX_LINKS {
                        return None;
                    }
                    if target.is_absolute() {
                        done = PathBuf::from("/");
                    }
                    rest = target.join(parts.as_path());
                    continue;
                }
                done = next;
            }
            Some(_) => {}
        }
        rest = parts.as_path().to_path_buf();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::MountBuilder;
    use std::os::unix::fs::symlink;

    fn followed(rootfs: &Path, destinations: &[&str]) -> Vec<PathBuf> {
        let mount = |to: &&str| {
            let kind = if *to == "/proc" { "proc" } else { "bind" };
            MountBuilder::default().destination(to).typ(kind).build().unwrap()
        };
        let mut mounts: Vec<_> = destinations.iter().map(mount).collect();
        follow(&mut mounts, rootfs);
        mounts.iter().map(|mount| mount.destination().clone()).collect()
    }

    fn root(links: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (at, target) in links {
            let at = root.path().join(at);
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            symlink(target, at).unwrap();
        }
        root
    }

    #[test]
    fn links_lead_where_they_do_in_the_container() {
        let links = [
            ("etc/resolv.conf", "../run/systemd/stub.conf"),
            ("etc/link", "/etc/there"),
            ("etc/up", "../../../../outside"),
            ("etc/loop", "loop"),
            ("proc", "x/proc"),
        ];
        let root = root(&links);
        std::fs::write(root.path().join("etc/there"), "").unwrap();
        let given = ["/etc/resolv.conf", "/etc/link", "/etc/there", "/new/./place/", "/etc/up", "/etc/loop", "/proc"];
        let wanted =
            ["/run/systemd/stub.conf", "/etc/there", "/etc/there", "/new/place", "/outside", "/etc/loop", "/proc"];
        for (given, wanted) in given.into_iter().zip(wanted) {
            assert_eq!(followed(root.path(), &[given]), [Path::new(wanted)]);
        }
    }

    #[test]
    fn links_below_a_mount_are_the_mounts() {
        let links = [("app/config", "/data/config"), ("data/config", "/etc/app"), ("var/lock", "/run/lock")];
        let root = root(&links);
        std::fs::create_dir_all(root.path().join("run/lock")).unwrap();
        let given = ["/data", "/app/config", "/run", "/var/lock", "/data/config/x"];
        let wanted = ["/data", "/data/config", "/run", "/run/lock", "/data/config/x"];
        assert_eq!(followed(root.path(), &given), wanted.map(PathBuf::from));
    }
}
