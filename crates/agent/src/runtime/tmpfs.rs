//! File systems in memory over directories of the image, as runc mounts them: one whose options do not say otherwise has the
//! mode of the directory that it hides, and with the option `tmpcopyup`, which is a runtime's and not the kernel's, a copy of
//! what is in it (runc: libcontainer/rootfs_linux.go). CRI-O asks for the copy at /run, /tmp and /var/tmp of containers with a
//! read-only root, and for what a systemd in a container wants.
//!
//! libcontainer knows neither. The mode becomes an option of the mount. The copy is made by a createContainer hook, as in
//! [`super::directory`]: then everything is mounted, so both ends of the copy are reached by copies of their mounts that have
//! nothing on them, and neither a volume below the directory nor a later mount takes part.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags, fstat, fstatvfs, mkfifoat, openat};
use rustix::mount::{MountFlags, OpenTreeFlags, mount_remount, open_tree};

use super::directory::{add_hook, enter, open_root};

/// First argument of the agent as the hook.
pub const COPY_UP_ARG: &str = "copy-up";

/// The option that asks for a copy.
const COPY_UP: &str = "tmpcopyup";

/// Completes the options of a spec's mounts, and adds the hook if there is something to copy. Looks into the root file system.
pub fn provide(spec: &mut Spec) {
    let Some(rootfs) = spec.root().as_ref().map(|root| root.path().clone()) else { return };
    let root = open_root(&rootfs);
    let mode_of = |place: &Path| Some(fstat(enter(root.as_ref().ok()?, place).ok()?).ok()?.st_mode & 0o7777);
    let (mut made, mut copied): (Vec<PathBuf>, Vec<PathBuf>) = Default::default();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let place = mount.destination().clone();
        // What is covered is not seen, and what is written there would be written into the cover.
        copied.retain(|earlier| !earlier.starts_with(&place));
        if mount.typ().as_deref() == Some("tmpfs") {
            let is_image = !made.iter().any(|earlier| place.starts_with(earlier));
            if complete(mount, || mode_of(&place).filter(|_| is_image)) {
                copied.push(place.clone());
            }
        }
        made.push(place);
    }
    if !copied.is_empty() {
        let words = [Path::new(COPY_UP_ARG), &rootfs].into_iter().chain(copied.iter().map(PathBuf::as_path));
        add_hook(spec, words);
    }
}

/// Makes the options the kernel's own; `mode` is that of the directory below. Answers whether a copy is asked for.
fn complete(mount: &mut Mount, mode: impl FnOnce() -> Option<u32>) -> bool {
    let mut options = mount.options().clone().unwrap_or_default();
    let wanted = options.iter().any(|option| option == COPY_UP);
    options.retain(|option| option != COPY_UP);
    if !options.iter().any(|option| option.starts_with("mode="))
        && let Some(mode) = mode()
    {
        options.push(format!("mode={mode:04o}"));
    }
    mount.set_options(Some(options));
    wanted
}

/// The hook. Its answer to libcontainer is its exit status; the reason goes where the container's errors go.
pub fn main(rootfs: &Path, places: &[PathBuf]) -> i32 {
    // The container's state, of no use here; its writer must not find the pipe closed.
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
    let failed = places.iter().find_map(|place| Some((place, copy_up(rootfs, place).err()?)));
    if let Some((place, error)) = &failed {
        eprintln!("cannot copy {} of the image into the tmpfs that is mounted on it: {error}", place.display());
    }
    i32::from(failed.is_some())
}

fn copy_up(rootfs: &Path, place: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (place.parent(), place.file_name()) else { return Ok(()) };
    let root = open_root(rootfs)?;
    let mounted = enter(&root, place)?;
    let parent = alone(&enter(&root, parent)?)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let hidden = openat(&parent, name, flags, Mode::empty())?;
    let read_only = fstatvfs(&mounted)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    if read_only {
        set_read_only(&mounted, false)?;
    }
    copy_into(&path_of(&hidden), &path_of(&alone(&mounted)?))?;
    if read_only {
        set_read_only(&mounted, true)?;
    }
    Ok(())
}

/// The directory without what is mounted on and below it.
fn alone(directory: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(directory, "", flags)
}

fn path_of(directory: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", directory.as_raw_fd()).into()
}

/// Changes whether a mount can be written, and nothing else of it.
fn set_read_only(mounted: &OwnedFd, read_only: bool) -> rustix::io::Result<()> {
    let is = fstatvfs(mounted)?.f_flag;
    let mut flags = MountFlags::BIND;
    flags.set(MountFlags::RDONLY, read_only);
    flags.set(MountFlags::NOSUID, is.contains(StatVfsMountFlags::NOSUID));
    flags.set(MountFlags::NODEV, is.contains(StatVfsMountFlags::NODEV));
    flags.set(MountFlags::NOEXEC, is.contains(StatVfsMountFlags::NOEXEC));
    mount_remount(path_of(mounted), flags, c"")
}

/// Copies what is in a directory: directories, files, links and fifos, with modes and owners. Its depth is bounded by the
/// length that a path can have. Where something is already, a later mount has its place.
fn copy_into(from: &Path, to: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (from, to, found) = (entry.path(), to.join(entry.file_name()), entry.metadata()?);
        let kind = found.file_type();
        if kind.is_dir() {
            match std::fs::create_dir(&to) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                Err(_) if !to.symlink_metadata()?.is_dir() => continue,
                _ => copy_into(&from, &to)?,
            }
        } else if to.symlink_metadata().is_ok() {
            continue;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(&from)?, &to)?;
        } else if kind.is_file() {
            std::fs::copy(&from, &to)?;
        } else if kind.is_fifo() {
            mkfifoat(CWD, &to, Mode::RUSR)?;
        } else {
            continue;
        }
        // The owner first: a change of it clears set-id bits.
        std::os::unix::fs::lchown(&to, Some(found.uid()), Some(found.gid()))?;
        if !kind.is_symlink() {
            std::fs::set_permissions(&to, std::fs::Permissions::from_mode(found.mode() & 0o7777))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn provided(rootfs: &Path, mounts: Value) -> Value {
        let spec = json!({"ociVersion": "1.0.2", "root": {"path": rootfs}, "mounts": mounts});
        let mut spec: Spec = serde_json::from_value(spec).unwrap();
        provide(&mut spec);
        serde_json::to_value(spec).unwrap()
    }

    fn tmpfs(at: &str, options: &[&str]) -> Value {
        json!({"destination": at, "type": "tmpfs", "source": "tmpfs", "options": options})
    }

    #[test]
    fn mode_is_the_images_unless_the_options_say_one() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("tmp")).unwrap();
        std::fs::set_permissions(root.path().join("tmp"), std::fs::Permissions::from_mode(0o1770)).unwrap();
        let mounts = [tmpfs("/tmp", &["nosuid"]), tmpfs("/tmp", &["mode=755"]), tmpfs("/none", &[])];
        let spec = provided(root.path(), json!(mounts));
        let options: Vec<_> = spec["mounts"].as_array().unwrap().iter().map(|mount| mount["options"].clone()).collect();
        assert_eq!(options, [json!(["nosuid", "mode=1770"]), json!(["mode=755"]), json!([])]);
        assert!(spec["hooks"].is_null());
        // What is mounted above hides the image's directory.
        let spec = provided(root.path(), json!([tmpfs("/", &[]), tmpfs("/tmp", &[])]));
        assert_eq!(spec["mounts"][1]["options"], json!([]));
    }

    #[test]
    fn copies_are_asked_for_where_they_are_seen() {
        let root = tempfile::tempdir().unwrap();
        let copied = |at: &str| tmpfs(at, &["tmpcopyup", "mode=755"]);
        let volume = |at: &str| json!({"destination": at, "type": "bind", "source": "/v", "options": ["rbind"]});
        let mounts = [copied("/run"), copied("/a/b"), copied("/c"), volume("/run/secrets"), volume("/a"), volume("/c")];
        let spec = provided(root.path(), json!(mounts));
        assert_eq!(spec["mounts"][0]["options"], json!(["mode=755"]));
        let hooks = spec["hooks"]["createContainer"].as_array().unwrap();
        assert_eq!(hooks.len(), 1);
        assert_eq!(hooks[0]["args"], json!(["bulkhead-agent", COPY_UP_ARG, root.path(), "/run"]));
    }

    #[test]
    fn what_is_there_already_stays() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["both/image", "file/image"] {
            std::fs::create_dir_all(from.path().join(name).parent().unwrap()).unwrap();
            std::fs::write(from.path().join(name), "image").unwrap();
        }
        std::os::unix::fs::symlink("elsewhere", from.path().join("link")).unwrap();
        std::fs::create_dir(to.path().join("both")).unwrap();
        std::fs::create_dir(to.path().join("link")).unwrap();
        std::fs::write(to.path().join("file"), "place of a mount").unwrap();
        copy_into(from.path(), to.path()).unwrap();
        assert_eq!(std::fs::read_to_string(to.path().join("both/image")).unwrap(), "image");
        assert_eq!(std::fs::read_to_string(to.path().join("file")).unwrap(), "place of a mount");
        assert!(to.path().join("link").symlink_metadata().unwrap().is_dir());
    }
}
