//! Copies of mounts that are finished before anyone sees them.
//!
//! A guest sees a mount from the moment on at which it is attached in the VMM's jail. A volume that became read-only after it
//! was attached would be writable until then. So a copy is made detached (open_tree(2)), given its attributes
//! (mount_setattr(2), Linux 5.12) and attached. One that follows its source is the slave of it: what is mounted in the source
//! or unmounted later arrives in the copy, and nothing goes the other way.
#![allow(unsafe_code)] // reason: mount_setattr(2), which rustix does not have

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// What every mount of the share is for the host: data. Flags of the guest's mounts are the guest's.
pub const ONLY_DATA: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV).union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Whether the copy gets mounts that its source gets later.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Propagation {
    /// It does not.
    Private,
    /// It does, and not the other way round.
    Slave,
}

/// Opens the device `name` below the directory `dir`, so that who gets the descriptor can do no more with it than it says.
///
/// /proc/self/fd leads from a descriptor to the mount by which its file was opened, and there it can be opened again, with other
/// rights, as far as the node's owner and mode allow. So this is opened by a copy of the mount that allows no devices
/// afterwards: that open fails (EACCES).
pub fn open_device(dir: &Path, name: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let tree = Tree(open_tree(CWD, dir, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?);
    // A link could lead out of the copy.
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let device = rustix::fs::openat2(&tree.0, name, flags | OFlags::CLOEXEC, Mode::empty(), inside)?;
    tree.set(ONLY_DATA, None)?;
    Ok(device)
}

/// Opens a file, so that who gets the descriptor can do no more with it than `access` says: by a copy of the mount that, for one
/// who may only read, is read-only.
pub fn open_file(path: &Path, access: OFlags) -> Result<OwnedFd, Errno> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::ISDIR) };
    let tree = Tree(open_tree(CWD, dir, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?);
    let read_only = (access & OFlags::RWMODE == OFlags::RDONLY).then_some(MountAttrFlags::MOUNT_ATTR_RDONLY);
    tree.set(ONLY_DATA | read_only.unwrap_or(MountAttrFlags::empty()), None)?;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(&tree.0, name, access | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty(), inside)
}

/// A file or directory, whichever name or mount leads to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Inode {
    device: u64,
    number: u64,
}

/// A detached copy of a mount, or of the mounts below it as well.
pub struct Tree(OwnedFd);

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Tree {
    /// A mount that was made detached.
    fn from(mount: OwnedFd) -> Self {
        Self(mount)
    }
}

impl Tree {
    /// Copies what is at `source`, with nothing in it for the host but data.
    pub fn copy(source: &Path, recursive: bool, propagation: Propagation) -> Result<Self, Errno> {
        let all = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | all;
        let tree = Self(open_tree(CWD, source, flags)?);
        tree.set(ONLY_DATA, Some(propagation))?;
        Ok(tree)
    }

    /// Copies the one mount that is at `source`, and nothing below it.
    pub fn copy_mount(source: &Path) -> Result<Self, Errno> {
        // An automount that nobody has looked into yet is copied as it is, and not triggered.
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_NO_AUTOMOUNT;
        let tree = Self(open_tree(CWD, source, flags)?);
        tree.set(ONLY_DATA, Some(Propagation::Private))?;
        Ok(tree)
    }

    /// Makes it read-only, and all that was copied with it from below.
    pub fn make_read_only(&self) -> Result<(), Errno> {
        self.set(MountAttrFlags::MOUNT_ATTR_RDONLY, None)
    }

    /// Maps the ids of its files' owners as a user namespace does, whose file this is.
    pub fn map_ids(&self, namespace: &Path) -> Result<(), Errno> {
        let namespace = rustix::fs::open(namespace, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let userns_fd = u64::try_from(namespace.as_raw_fd()).map_err(|_| Errno::BADF)?;
        self.set_attributes(libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_IDMAP,
            attr_clr: 0,
            propagation: 0,
            userns_fd,
        })
    }

    /// What it is a mount of.
    pub fn inode(&self) -> Result<Inode, Errno> {
        let stat = rustix::fs::fstat(&self.0)?;
        Ok(Inode { device: stat.st_dev, number: stat.st_ino })
    }

    /// Whether it cannot be written to, for the mount's sake or the file system's.
    pub fn is_read_only(&self) -> Result<bool, Errno> {
        Ok(rustix::fs::fstatvfs(&self.0)?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
    }

    /// Shows it at `target`.
    pub fn attach(&self, target: &Path) -> Result<(), Errno> {
        move_mount(&self.0, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    }

    fn set(&self, attributes: MountAttrFlags, propagation: Option<Propagation>) -> Result<(), Errno> {
        self.set_attributes(libc::mount_attr {
            attr_set: attributes.bits().into(),
            attr_clr: 0,
            propagation: match propagation {
                Some(Propagation::Private) => libc::MS_PRIVATE,
                Some(Propagation::Slave) => libc::MS_SLAVE,
                None => 0,
            },
            userns_fd: 0,
        })
    }

    fn set_attributes(&self, attr: libc::mount_attr) -> Result<(), Errno> {
        // SAFETY: the path is empty and terminated, and the structure as large as said.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.0.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
                &raw const attr,
                size_of::<libc::mount_attr>(),
            )
        };
        if done == 0 {
            Ok(())
        } else {
            Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
        }
    }
}
