//! What tests of the share are done with: mount namespaces, which take root, and a share that a VMM is locked into.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bulkhead_protocol::guest::SHARED_VOLUMES;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, move_mount,
    open_tree, unmount,
};

use super::super::{Share, ShareError, mountinfo};
use crate::paths::RunDir;
use crate::spec::Volume;

/// Runs `body` in a thread with a private mount namespace. unshare(2) of the file system attributes is per thread.
pub fn in_mount_namespace(body: impl FnOnce(&Path) + Send + 'static) {
    assert!(rustix::process::geteuid().is_root(), "the share's mounts are tested as root");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    std::thread::spawn(move || {
        // SAFETY: of the flags only FILES can break other threads' descriptors, and it is not given.
        #[allow(unsafe_code)]
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        body(&path);
    })
    .join()
    .unwrap();
}

/// The mount namespace of a VMM that has locked itself into the share.
pub fn jail_of(run: &RunDir) -> OwnedFd {
    let share = run.share();
    let lock_in = move || {
        // SAFETY: of the flags only FILES can break other threads' descriptors, and it is not given.
        #[allow(unsafe_code)]
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
        let namespace = rustix::fs::open("/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
        let tree = open_tree(CWD, &share, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
        move_mount(&tree, "", CWD, &share, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        rustix::process::fchdir(&tree)?;
        rustix::process::pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        Ok::<_, Errno>(namespace)
    };
    std::thread::spawn(lock_in).join().unwrap().unwrap()
}

/// A pod's share, and what its VMM sees of it.
pub struct Pod {
    pub run: RunDir,
    pub share: Share,
    /// The mount table is read through it where there is no /proc.
    proc: OwnedFd,
}

impl Pod {
    pub fn new(dir: &Path) -> Self {
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        share.is_jail_of(jail_of(&run));
        let proc = rustix::fs::open("/proc", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        Self { run, share, proc }
    }

    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.share.place.jail.enter(|| Ok(work())).unwrap()
    }

    pub fn read(&self, at: impl AsRef<Path>) -> Option<String> {
        let at = Path::new("/").join(at);
        self.inside(|| std::fs::read_to_string(at).ok())
    }

    pub fn can_write(&self, at: impl AsRef<Path>) -> bool {
        let at = Path::new("/").join(at);
        self.inside(|| std::fs::write(at, "").is_ok())
    }

    /// Mounts in the VMM's namespace, the share itself not among them.
    pub fn mounts(&self) -> usize {
        let mut table = String::new();
        self.inside(|| {
            let file = rustix::fs::openat(&self.proc, "thread-self/mountinfo", OFlags::RDONLY, Mode::empty()).unwrap();
            std::io::Read::read_to_string(&mut File::from(file), &mut table).unwrap();
        });
        table.lines().count() - 1
    }

    /// Shows a directory to a container, and answers what it is in the share.
    pub fn show(&self, container: &str, volume: Volume) -> PathBuf {
        self.try_show(container, volume).unwrap()
    }

    /// The same of what may be refused.
    pub fn try_show(&self, container: &str, volume: Volume) -> Result<PathBuf, ShareError> {
        let given = self.share.add_volumes(container, vec![volume])?;
        Ok(Path::new(SHARED_VOLUMES).join(given[0].number.to_string()))
    }

    /// Ends it, whereupon nothing is mounted for anybody.
    pub fn end(self) {
        Share::destroy(&self.run).unwrap();
        assert_eq!(self.mounts(), 0);
    }
}

/// How many mounts the node has.
pub fn mounts_of_the_node() -> usize {
    mountinfo::mounts_below(Path::new("/")).unwrap().len()
}

pub fn tmpfs(at: &Path) {
    std::fs::create_dir_all(at).unwrap();
    mount("tmpfs", at, "tmpfs", MountFlags::empty(), None).unwrap();
}
