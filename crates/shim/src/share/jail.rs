//! The mount namespace of the pod's VMM, in which the mounts of its share are, and nowhere else.
//!
//! The node's mount table has none of them. So a directory of the node that something is mounted on below a pod's volume is no
//! mountpoint there: whoever owns it unmounts and removes it as if there were no pod. A mount is finished on the node's side,
//! detached, and attached by a thread that has entered the VMM's namespace, whose root is the share. It is taken off by the
//! removal of what it is mounted on, which the kernel follows by detaching it in every other namespace (Linux 3.19,
//! fs/namei.c `detach_mounts`); nothing has to be entered for that, and whatever is left goes with the VMM.
#![allow(unsafe_code)] // reason: unshare(2)

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread::Builder;

use rustix::io::Errno;
use rustix::mount::MountPropagationFlags;
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces, unshare_unsafe};

use super::tree::Tree;

/// Enough for system calls and the names that they take.
const STACK: usize = 128 << 10;

/// A VMM's mount namespace.
#[derive(Clone, Debug, Default)]
pub struct Jail(Arc<OnceLock<OwnedFd>>);

impl Jail {
    /// Names the mount namespace: by the pidfd of a VMM that has locked itself in, or by the namespace itself. A pidfd keeps
    /// nothing mounted after the VMM has ended. Only the first call has an effect.
    pub fn set(&self, vmm: OwnedFd) {
        let _ = self.0.set(vmm);
    }

    /// Does what is to be done there, on a thread for which the share is `/`.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T, Errno> + Send) -> io::Result<T> {
        // As of a process that is gone.
        let vmm = self.0.get().ok_or(Errno::SRCH)?;
        on_thread(|| {
            // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) FS changes nothing.
            unsafe { unshare_unsafe(UnshareFlags::FS) }?;
            move_into_thread_name_spaces(vmm.as_fd(), ThreadNameSpaceType::MOUNT)?;
            work()
        })
    }
}

/// Does what only a mount namespace of its own allows to do unseen, on a thread that leaves none of it behind.
pub fn apart<T: Send>(work: impl FnOnce() -> Result<T, Errno> + Send) -> io::Result<T> {
    on_thread(|| {
        // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) NEWNS changes nothing.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        work()
    })
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T, Errno> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = Builder::new().name("bulkhead-jail".to_owned()).stack_size(STACK).spawn_scoped(scope, work)?;
        let done = thread.join().map_err(|_| io::Error::other("the thread that mounts has panicked"))?;
        Ok(done?)
    })
}

/// Where a share is.
#[derive(Clone, Debug)]
pub struct Place {
    /// Its directory on the node, in which nothing is mounted there.
    pub dir: PathBuf,
    /// Where it is `/`, with all its mounts.
    pub jail: Jail,
}

impl Place {
    /// The path by which the VMM sees a path below the directory.
    pub fn inside(&self, path: &Path) -> PathBuf {
        Path::new("/").join(path.strip_prefix(&self.dir).unwrap_or(path))
    }

    /// Mounts a tree for the VMM, on what is at `target` in the share's directory.
    pub fn attach(&self, tree: &Tree, target: &Path) -> io::Result<()> {
        let share = rustix::fs::stat(&self.dir)?;
        let target = self.inside(target);
        self.jail.enter(|| {
            let root = rustix::fs::stat("/")?;
            // A VMM that is in no jail of this share is none: nothing is ever mounted for the node.
            if (root.st_dev, root.st_ino) != (share.st_dev, share.st_ino) {
                return Err(Errno::SRCH);
            }
            tree.attach(&target)
        })
    }
}
