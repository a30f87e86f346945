//! Volumes of which the guest keeps a copy: ConfigMaps, Secrets, projected and downward API volumes.
//!
//! The kubelet changes such a volume by putting a directory, the version, beside the old one and moving the link `..data`
//! over to it. Through a shared file system a program here would see the new files but hear nothing of it, since inotify(7)
//! reports only what the guest's own kernel did. So the agent copies each version from the share to a tmpfs and makes the
//! same steps there in the same order (kubernetes: pkg/volume/util/atomic_writer.go): a watch sees what it would see on the
//! kubelet's own node. A volume that is too large, or has not that layout, is bound from the share instead.
//!
//! A container with CAP_SYS_ADMIN can make its mount of a copy writable, put links there and go on doing so while the agent
//! works. So in a copy every step is one name below an open directory, and no link is followed.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::agent::CopiedVolume;
use bulkhead_protocol::guest::{DATA_LINK, SHARE_DIR, SHARED_VOLUMES, VOLUMES_DIR};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, fchmod, fchown, fstat, mkdirat, openat, readlinkat,
    renameat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind_recursive, unmount};

/// The successor of [`DATA_LINK`], for as long as it takes to rename it.
const NEXT_DATA: &str = "..data_tmp";

/// Begins the names of versions and of the links to them. No key of a volume begins so.
const VERSION_PREFIX: &[u8] = b"..";

/// Bounds of a container's copies. A ConfigMap or Secret holds at most 1 MiB, a projected volume several of them, and two
/// versions exist at a time. What does not fit is bound from the share.
const TMPFS_OPTIONS: &std::ffi::CStr = c"mode=0755,size=32m,nr_inodes=8k";

/// Directories within each other, as deep as a path of a key can be made by the kubelet's `items`.
const MAX_DEPTH: usize = 64;

/// Copies of one container's volumes.
#[derive(Clone, Debug)]
pub struct Volumes {
    /// The volumes in the share.
    source: PathBuf,
    target: PathBuf,
}

impl Volumes {
    /// Those of a container.
    pub fn of(id: &str) -> Self {
        Self { source: Path::new(SHARE_DIR).join(SHARED_VOLUMES), target: Path::new(VOLUMES_DIR).join(id) }
    }

    /// Makes the copies with which the container starts. Blocks.
    pub fn create(&self, volumes: &[CopiedVolume]) -> Result<(), VolumeError> {
        if volumes.is_empty() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.target).map_err(|source| VolumeError::at(&self.target, source))?;
        mount("volumes", &self.target, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, TMPFS_OPTIONS)
            .map_err(|errno| VolumeError::at(&self.target, errno.into()))?;
        volumes.iter().try_for_each(|volume| self.create_one(volume))
    }

    fn create_one(&self, volume: &CopiedVolume) -> Result<(), VolumeError> {
        let (source, target) = self.paths(volume);
        if !volume.version.is_empty() {
            let version = version(volume)?;
            match make_and_switch(&source, &target, version) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!(%error, ?source, "a volume cannot be copied into the guest and is shared instead: its updates raise no inotify events")
                }
            }
            let _ = std::fs::remove_dir_all(&target);
        }
        std::fs::create_dir_all(&target)
            .and_then(|()| mount_bind_recursive(&source, &target).map_err(Into::into))
            .map_err(|error| VolumeError::at(&target, error))
    }

    /// Goes on to a later version. Blocks.
    pub fn update(&self, volume: &CopiedVolume) -> Result<(), VolumeError> {
        let (source, target) = self.paths(volume);
        let device = |path: &Path| path.symlink_metadata().map(|found| found.dev());
        let failed = |source| VolumeError::at(&target, source);
        if device(&target).map_err(failed)? != device(&self.target).map_err(failed)? {
            return Ok(()); // Bound: the share shows the change by itself.
        }
        let version = version(volume)?;
        switch(&source, &target, version).map_err(failed)
    }

    /// Removes the copies. What is not there is no error.
    pub fn remove(&self) -> Result<(), VolumeError> {
        match unmount(&self.target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => std::fs::remove_dir(&self.target).map_err(|source| VolumeError::at(&self.target, source)),
            Err(Errno::NOENT | Errno::INVAL) => Ok(()),
            Err(errno) => Err(VolumeError::at(&self.target, errno.into())),
        }
    }

    fn paths(&self, volume: &CopiedVolume) -> (PathBuf, PathBuf) {
        let name = volume.number.to_string();
        (self.source.join(&name), self.target.join(&name))
    }
}

/// The version's name, which must be one component of a path.
fn version(volume: &CopiedVolume) -> Result<&OsStr, VolumeError> {
    component(OsStr::new(&volume.version)).ok_or_else(|| VolumeError::Version(volume.version.clone()))
}

/// A text that can name a version.
fn component(text: &OsStr) -> Option<&OsStr> {
    let mut parts = Path::new(text).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) if name != DATA_LINK && name != NEXT_DATA => Some(name),
        _ => None,
    }
}

/// Makes the volume's directory with its first version, and with what lies beside the versions.
fn make_and_switch(source: &Path, target: &Path, version: &OsStr) -> io::Result<()> {
    make_dir(CWD, target.as_os_str(), &rustix::fs::stat(source)?)?;
    switch(source, target, version)?;
    copy_beside(&open_dir(CWD, source.as_os_str())?, &open_dir(CWD, target.as_os_str())?)
}

/// Copies what is no version and leads to none: above all the directories that the kubelet makes for volumes within this one,
/// since a mount in a read-only volume needs its place there (kubernetes: MakeNestedMountpoints in pkg/volume/util).
fn copy_beside(source: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let there = names(target)?;
    let beside = |name: &OsString| !name.as_bytes().starts_with(VERSION_PREFIX) && !there.contains(name);
    names(source)?.iter().filter(|name| beside(name)).try_for_each(|name| copy(source, target, name, MAX_DEPTH))
}

/// Copies a version and makes it the current one, by the kubelet's steps. Both paths are the agent's and the host's own, only
/// what is below the target is not.
fn switch(source: &Path, target: &Path, version: &OsStr) -> io::Result<()> {
    let source = open_dir(CWD, source.as_os_str())?;
    let target = open_dir(CWD, target.as_os_str())?;
    let current = current(&target);
    if current.as_deref() == Some(version) {
        return Ok(());
    }
    // Of a copy that was broken off.
    remove(&target, version, MAX_DEPTH)?;
    let copy = match copy_version(&source, &target, version) {
        Ok(copy) => copy,
        Err(error) => {
            let _ = remove(&target, version, MAX_DEPTH);
            return Err(error);
        }
    };
    remove(&target, OsStr::new(NEXT_DATA), MAX_DEPTH)?;
    symlinkat(version, &target, NEXT_DATA)?;
    renameat(&target, NEXT_DATA, &target, DATA_LINK)?;
    let names = names(&copy)?;
    for name in names.iter().filter(|name| !is_link(&target, name)) {
        symlinkat(Path::new(DATA_LINK).join(name), &target, name)?;
    }
    for gone in self::names(&target)?.iter().filter(|name| !names.contains(*name)) {
        if is_link(&target, gone) && gone != DATA_LINK {
            unlinkat(&target, gone, AtFlags::empty())?;
        }
    }
    current.map_or(Ok(()), |old| remove(&target, &old, MAX_DEPTH))
}

/// The version that is current. A link that leads anywhere but to a name beside it is not the agent's.
fn current(dir: &OwnedFd) -> Option<OsString> {
    let link = OsString::from_vec(readlinkat(dir, DATA_LINK, Vec::new()).ok()?.into_bytes());
    component(&link).map(OsStr::to_owned)
}

fn copy_version(source: &OwnedFd, target: &OwnedFd, version: &OsStr) -> io::Result<OwnedFd> {
    let from = open_dir(source, version)?;
    let copy = make_dir(target, version, &fstat(&from)?)?;
    copy_dir(&from, &copy, MAX_DEPTH)?;
    Ok(copy)
}

/// Copies what a directory holds, a tree of directories, files and links, with modes and owners. What has one of the names in
/// the copy is an error.
fn copy_dir(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    let depth = depth.checked_sub(1).ok_or(io::ErrorKind::InvalidInput)?;
    names(from)?.iter().try_for_each(|name| copy(from, to, name, depth))
}

fn copy(from: &OwnedFd, to: &OwnedFd, name: &OsStr, depth: usize) -> io::Result<()> {
    let like = statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(like.st_mode) {
        FileType::Directory => copy_dir(&open_dir(from, name)?, &make_dir(to, name, &like)?, depth),
        FileType::Symlink => Ok(symlinkat(readlinkat(from, name, Vec::new())?, to, name)?),
        FileType::RegularFile => copy_file(from, to, name, &like),
        _ => Ok(()),
    }
}

fn copy_file(from: &OwnedFd, to: &OwnedFd, name: &OsStr, like: &Stat) -> io::Result<()> {
    let reading = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let making = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut from = File::from(openat(from, name, reading, Mode::empty())?);
    let mut to = File::from(openat(to, name, making, Mode::RUSR | Mode::WUSR)?);
    io::copy(&mut from, &mut to)?;
    Ok(take_owner(&to, like)?)
}

/// Makes a directory with another's mode and owner.
fn make_dir(parent: impl AsFd, name: &OsStr, like: &Stat) -> rustix::io::Result<OwnedFd> {
    mkdirat(&parent, name, Mode::RWXU)?;
    let dir = open_dir(parent, name)?;
    take_owner(&dir, like)?;
    Ok(dir)
}

fn open_dir(parent: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    openat(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// The owner first: a change of it clears set-id bits.
fn take_owner(fd: impl AsFd, like: &Stat) -> rustix::io::Result<()> {
    fchown(&fd, Some(Uid::from_raw(like.st_uid)), Some(Gid::from_raw(like.st_gid)))?;
    fchmod(&fd, Mode::from_raw_mode(like.st_mode))
}

fn names(dir: &OwnedFd) -> rustix::io::Result<HashSet<OsString>> {
    let names = Dir::read_from(dir)?.map(|entry| Ok(OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned()));
    names.filter(|name| name.as_ref().map_or(true, |name| name != "." && name != "..")).collect()
}

fn is_link(dir: &OwnedFd, name: &OsStr) -> bool {
    statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Symlink)
}

/// Removes a file, a link or a tree, as deep as a copy can be. What is not there is no error.
fn remove(dir: &OwnedFd, name: &OsStr, depth: usize) -> io::Result<()> {
    match unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let tree = open_dir(dir, name)?;
    for below in names(&tree)? {
        remove(&tree, &below, depth.checked_sub(1).ok_or(io::ErrorKind::InvalidInput)?)?;
    }
    Ok(unlinkat(dir, name, AtFlags::REMOVEDIR)?)
}

/// A volume cannot be copied.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A step on a path.
    #[error("cannot keep a copy of the volume at {path}")]
    Copy { path: PathBuf, source: io::Error },
    /// Not a name.
    #[error("{0:?} is no version of a volume: it must be the name of a directory")]
    Version(String),
}

impl VolumeError {
    fn at(path: &Path, source: io::Error) -> Self {
        Self::Copy { path: path.into(), source }
    }
}

#[cfg(test)]
mod tests;
