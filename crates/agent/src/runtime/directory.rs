//! The working directory of a container, made where it does not exist, as runc makes it: by root, after the volumes are
//! mounted and before the root file system can become read-only.
//!
//! libcontainer has no such step. It runs createContainer hooks at that time, in the container's mount namespace and still
//! outside of its root (OCI runtime spec, config.md, "POSIX-platform Hooks"), so the agent adds itself as one. Every step is
//! resolved below the root file system: the image may hold symbolic links to anywhere.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Hook, Hooks, Mount, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, open, openat2};
use rustix::io::Errno;

/// First argument of the agent as the hook.
pub const DIRECTORY_ARG: &str = "make-directory";

/// Adds the hook to a spec whose working directory may be missing. Looks into the root file system; an error if there is
/// something else at that place.
pub fn provide(spec: &mut Spec) -> rustix::io::Result<()> {
    let Some(cwd) = spec.process().as_ref().map(|process| process.cwd().clone()) else { return Ok(()) };
    let Some(rootfs) = spec.root().as_ref().map(|root| root.path().clone()) else { return Ok(()) };
    let mounted = spec.mounts().iter().flatten().any(|mount| covers(mount, &cwd));
    if cwd == Path::new("/") {
        return Ok(());
    }
    if !mounted {
        match open_root(&rootfs).and_then(|root| enter(&root, &cwd)) {
            Ok(_) => return Ok(()),
            Err(Errno::NOTDIR) => return Err(Errno::NOTDIR),
            // Missing; if it is anything else, the hook meets it again.
            Err(_) => {}
        }
    }
    add_hook(spec, [Path::new(DIRECTORY_ARG), &rootfs, &cwd]);
    Ok(())
}

/// Has libcontainer run the agent with these arguments after the mounts are made and what was added before has run.
pub(super) fn add_hook<'a>(spec: &mut Spec, words: impl IntoIterator<Item = &'a Path>) {
    let words = std::iter::once(Path::new("bulkhead-agent")).chain(words);
    let mut hook = Hook::default();
    hook.set_path("/proc/self/exe".into());
    hook.set_args(Some(words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>()));
    let mut hooks: Hooks = spec.hooks().clone().unwrap_or_default();
    let mut list = hooks.create_container().clone().unwrap_or_default();
    list.push(hook);
    hooks.set_create_container(Some(list));
    spec.set_hooks(Some(hooks));
}

/// Whether a directory may be another one than the root file system's, because something is mounted on the way to it.
fn covers(mount: &Mount, cwd: &Path) -> bool {
    mount.destination() != Path::new("/") && cwd.starts_with(mount.destination())
}

/// The hook. Its answer to libcontainer is its exit status.
pub fn main(rootfs: &Path, cwd: &Path) -> i32 {
    // The container's state, of no use here; its writer must not find the pipe closed.
    let _ = io::copy(&mut io::stdin(), &mut io::sink());
    i32::from(make(rootfs, cwd).is_err())
}

/// Makes the directory and those above it.
fn make(rootfs: &Path, cwd: &Path) -> rustix::io::Result<()> {
    let root = open_root(rootfs)?;
    let mut path = PathBuf::from("/");
    for component in cwd.components() {
        let Component::Normal(name) = component else { continue };
        match enter(&root, &path.join(name)) {
            Err(Errno::NOENT) => {
                match mkdirat(enter(&root, &path)?, name, Mode::from_raw_mode(0o755)) {
                    Err(Errno::EXIST) | Ok(()) => {}
                    Err(errno) => return Err(errno),
                }
                path.push(name);
                enter(&root, &path)?;
            }
            Err(errno) => return Err(errno),
            Ok(_) => path.push(name),
        }
    }
    Ok(())
}

pub(super) fn open_root(rootfs: &Path) -> rustix::io::Result<OwnedFd> {
    open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

pub(super) fn enter(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_directories_are_made_below_the_root_only() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/elsewhere", root.path().join("link")).unwrap();
        std::fs::create_dir(root.path().join("elsewhere")).unwrap();
        make(root.path(), Path::new("/a/b/c")).unwrap();
        make(root.path(), Path::new("/link/deep")).unwrap();
        make(root.path(), Path::new("/../../up")).unwrap();
        assert!(root.path().join("a/b/c").is_dir());
        assert!(root.path().join("elsewhere/deep").is_dir() && root.path().join("up").is_dir());
    }

    #[test]
    fn file_in_the_way_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("file"), "").unwrap();
        assert_eq!(make(root.path(), Path::new("/file/below")), Err(Errno::NOTDIR));
        assert_eq!(make(root.path(), Path::new("/file")), Err(Errno::NOTDIR));
    }

    #[test]
    fn hook_is_added_only_where_it_may_be_needed() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("there")).unwrap();
        let hooks = |cwd: &str| {
            let spec = serde_json::json!({
                "ociVersion": "1.0.2", "root": {"path": root.path()},
                "process": {"cwd": cwd, "user": {"uid": 0, "gid": 0}},
                "mounts": [{"destination": "/there/volume"}],
            });
            let mut spec: Spec = serde_json::from_value(spec).unwrap();
            provide(&mut spec)?;
            let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.create_container().clone());
            Ok(hooks.map_or(0, |list| list.len()))
        };
        std::fs::write(root.path().join("file"), "").unwrap();
        for (cwd, added) in [("/", Ok(0)), ("/there", Ok(0)), ("/missing", Ok(1)), ("/there/volume/x", Ok(1))] {
            assert_eq!(hooks(cwd), added, "{cwd}");
        }
        assert_eq!(hooks("/file"), Err(Errno::NOTDIR));
    }
}
