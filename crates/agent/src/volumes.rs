//! Volumes of which the guest keeps a copy: ConfigMaps, Secrets, projected and downward API volumes.
//!
//! The kubelet changes such a volume by putting a directory, the version, beside the old one and moving the link `..data`
//! over to it. Through a shared file system a program here would see the new files but hear nothing of it, since inotify(7)
//! reports only what the guest's own kernel did. So the agent copies each version from the share to a tmpfs and makes the
//! same steps there in the same order (kubernetes: pkg/volume/util/atomic_writer.go): a watch sees what it would see on the
//! kubelet's own node. A volume that is too large, or has not that layout, is bound from the share instead.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::agent::CopiedVolume;
use bulkhead_protocol::guest::{SHARE_DIR, VOLUMES_DIR};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind_recursive, unmount};

/// The link to the current version.
const DATA: &str = "..data";
/// Its successor, for as long as it takes to rename it.
const NEXT_DATA: &str = "..data_tmp";

/// Bounds of a container's copies. A ConfigMap or Secret holds at most 1 MiB, a projected volume several of them, and two
/// versions exist at a time. What does not fit is bound from the share.
const LIMITS: &std::ffi::CStr = c"mode=0755,size=32m,nr_inodes=8k";

/// Directories within each other, as deep as a path of a key can be made by the kubelet's `items`.
const MAX_DEPTH: usize = 64;

/// Copies of one container's volumes.
#[derive(Clone, Debug)]
pub struct Volumes {
    /// The container's mounts in the share.
    source: PathBuf,
    target: PathBuf,
}

impl Volumes {
    /// Those of a container.
    pub fn of(id: &str) -> Self {
        Self { source: Path::new(SHARE_DIR).join(id).join("mounts"), target: Path::new(VOLUMES_DIR).join(id) }
    }

    /// Makes the copies with which the container starts. Blocks.
    pub fn create(&self, volumes: &[CopiedVolume]) -> Result<(), VolumeError> {
        if volumes.is_empty() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.target).map_err(|source| VolumeError::at(&self.target, source))?;
        mount("volumes", &self.target, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, LIMITS)
            .map_err(|errno| VolumeError::at(&self.target, errno.into()))?;
        volumes.iter().try_for_each(|volume| self.create_one(volume))
    }

    fn create_one(&self, volume: &CopiedVolume) -> Result<(), VolumeError> {
        let (source, target) = self.paths(volume);
        if !volume.version.is_empty() {
            let version = version(volume)?;
            let copied = make_like(&source, &target).and_then(|()| switch(&source, &target, version));
            match copied {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!(%error, ?source, "a volume is bound instead of copied, its updates raise no events")
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
        use rustix::io::Errno;
        match unmount(&self.target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => std::fs::remove_dir(&self.target).map_err(|source| VolumeError::at(&self.target, source)),
            Err(Errno::NOENT | Errno::INVAL) => Ok(()),
            Err(errno) => Err(VolumeError::at(&self.target, errno.into())),
        }
    }

    fn paths(&self, volume: &CopiedVolume) -> (PathBuf, PathBuf) {
        let name = volume.index.to_string();
        (self.source.join(&name), self.target.join(&name))
    }
}

/// The version's name, which must be one component of a path.
fn version(volume: &CopiedVolume) -> Result<&OsStr, VolumeError> {
    let mut parts = Path::new(&volume.version).components();
    match (parts.next(), parts.next()) {
        (Some(Component::Normal(name)), None) if name != DATA && name != NEXT_DATA => Ok(name),
        _ => Err(VolumeError::Version(volume.version.clone())),
    }
}

/// Copies a version and makes it the current one, by the kubelet's steps.
fn switch(source: &Path, target: &Path, version: &OsStr) -> io::Result<()> {
    let copy = target.join(version);
    let current = std::fs::read_link(target.join(DATA)).ok();
    if current.as_deref() == Some(Path::new(version)) {
        return Ok(());
    }
    // Of a copy that was broken off.
    ignore_absent(std::fs::remove_dir_all(&copy))?;
    if let Err(error) = copy_dir(&source.join(version), &copy, MAX_DEPTH) {
        let _ = std::fs::remove_dir_all(&copy);
        return Err(error);
    }
    let next = target.join(NEXT_DATA);
    ignore_absent(std::fs::remove_file(&next))?;
    std::os::unix::fs::symlink(version, &next)?;
    std::fs::rename(&next, target.join(DATA))?;
    let names = names(&copy)?;
    for name in names.iter().filter(|name| !target.join(name).is_symlink()) {
        std::os::unix::fs::symlink(Path::new(DATA).join(name), target.join(name))?;
    }
    for gone in self::names(target)?.into_iter().filter(|name| !names.contains(name)) {
        let path = target.join(&gone);
        if path.is_symlink() && gone != DATA {
            std::fs::remove_file(path)?;
        }
    }
    match current {
        Some(old) => ignore_absent(std::fs::remove_dir_all(target.join(old))),
        None => Ok(()),
    }
}

fn names(dir: &Path) -> io::Result<HashSet<OsString>> {
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect()
}

/// Copies a tree of directories, files and links with modes and owners.
fn copy_dir(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    let depth = depth.checked_sub(1).ok_or(io::ErrorKind::InvalidInput)?;
    make_like(from, to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let (from, to, kind) = (entry.path(), to.join(entry.file_name()), entry.file_type()?);
        if kind.is_dir() {
            copy_dir(&from, &to, depth)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(std::fs::read_link(&from)?, &to)?;
        } else if kind.is_file() {
            std::fs::copy(&from, &to)?;
            take_owner(&from, &to)?;
        }
    }
    Ok(())
}

/// Makes a directory with another's mode and owner.
fn make_like(like: &Path, dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    take_owner(like, dir)
}

/// The owner first: a change of it clears set-id bits.
fn take_owner(like: &Path, path: &Path) -> io::Result<()> {
    let found = like.metadata()?;
    std::os::unix::fs::chown(path, Some(found.uid()), Some(found.gid()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(found.mode() & 0o7777))
}

fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
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
