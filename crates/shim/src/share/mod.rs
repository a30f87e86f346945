//! The pod's share: the one directory of the host that the guest sees, through virtio-fs (ARCHITECTURE.md, D5).
//!
//! `share/<container id>/rootfs` is the container's root, `share/<container id>/mounts/<n>` its volumes, most of them as links
//! to what containers have in common ([`volumes`]). Nothing is copied. The mounts are in the VMM's mount namespace and not in
//! the node's ([`jail`]), where the share is a tree of empty directories, and removing a container is removing its part of it.
//! What the pod may only read is mounted read-only, never only in the guest; [`tree`] says why mounts are finished before they
//! are attached.

mod follow;
mod jail;
mod mountinfo;
mod rootfs;
mod tree;
mod volumes;

use std::fs::DirBuilder;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use containerd_shim_protos::types::mount::Mount;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use bulkhead_protocol::guest::{ROOT_DIR, SHARED_VOLUMES};

use crate::paths::RunDir;
use crate::spec::{Access, Volume};
use jail::{Jail, Place};
pub use tree::open_device;
use tree::{Propagation, Tree};
use volumes::Volumes;

/// A pod's share. Its methods block: mount(2) on a slow file system does.
#[derive(Clone, Debug)]
pub struct Share {
    place: Place,
    volumes: Volumes,
}

impl Share {
    /// Makes the directory.
    pub fn create(run_dir: &RunDir) -> Result<Self, ShareError> {
        let share = Self::of(run_dir);
        let failed = |what| move |source: std::io::Error| ShareError::at(what, &run_dir.share(), source);
        run_dir.create().map_err(failed("make the pod's directory"))?;
        make_dir(&share.place.dir).map_err(failed("make"))?;
        Ok(share)
    }

    /// The share of a pod whose shim is gone, for cleaning up.
    pub fn of(run_dir: &RunDir) -> Self {
        Self { place: Place { dir: run_dir.share(), jail: Jail::default() }, volumes: Volumes::default() }
    }

    /// Mounts go to this VMM from now on, which has locked itself into the share: a pidfd, or its mount namespace.
    pub fn is_jail_of(&self, vmm: OwnedFd) {
        self.place.jail.set(vmm);
    }

    /// The directory as a descriptor, for the VMM.
    pub fn open(&self) -> Result<OwnedFd, ShareError> {
        rustix::fs::open(&self.place.dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| ShareError::at("open", &self.place.dir, error.into()))
    }

    /// Mounts a container's root file system: what containerd describes, else the bundle's own directory.
    pub fn add_rootfs(&self, id: &str, mounts: &[Mount], prepared: &Path) -> Result<(), ShareError> {
        let target = self.place.dir.join(id).join(ROOT_DIR);
        make_dir(&target).map_err(|error| ShareError::at("make", &target, error))?;
        let attach = |tree: Tree| self.place.attach(&tree, &target).map_err(|error| ShareError::attach(&target, error));
        if mounts.is_empty() {
            let tree = Tree::copy(prepared, true, Propagation::Private);
            return attach(tree.map_err(|error| ShareError::Rootfs { path: prepared.into(), source: error.into() })?);
        }
        mounts.iter().try_for_each(|mount| attach(rootfs::make(mount, &target)?))
    }

    /// Shows the volumes of a container. Those that it may write come first, so that it has the same ones to read.
    pub fn add_volumes(&self, id: &str, volumes: &[Volume]) -> Result<(), ShareError> {
        let (writable, others): (Vec<_>, Vec<_>) =
            volumes.iter().enumerate().partition(|(_, volume)| volume.access == Access::ReadWrite);
        writable.into_iter().chain(others).try_for_each(|(index, volume)| self.add_volume(id, index, volume))
    }

    fn add_volume(&self, id: &str, index: usize, volume: &Volume) -> Result<(), ShareError> {
        let place = self.place.dir.join(id).join("mounts").join(index.to_string());
        if volume.copied {
            return volumes::show(&self.place, volume, &place);
        }
        let number = self.volumes.add(&self.place, id, volume)?;
        let failed = |error| ShareError::at("make", &place, error);
        place.parent().map_or(Ok(()), make_dir).map_err(failed)?;
        symlink(Path::new("../..").join(SHARED_VOLUMES).join(number.to_string()), &place).map_err(failed)
    }

    /// Removes what a container had, and with that its mounts. What is already gone is no error.
    pub fn remove_container(&self, id: &str) -> Result<(), ShareError> {
        let own = remove_tree(&self.place.dir.join(id));
        own.and(self.volumes.leave(&self.place.dir, id))
    }

    /// Removes the share and the pod's directory.
    pub fn destroy(run_dir: &RunDir) -> Result<(), ShareError> {
        remove_tree(&run_dir.share())?;
        let done = std::fs::remove_dir_all(run_dir.path());
        ignore_absent(done).map_err(|error| ShareError::at("remove", run_dir.path(), error))?;
        // The namespace's directory stays for the other pods; it goes with the last one.
        if let Some(namespace) = run_dir.path().parent() {
            let _ = std::fs::remove_dir(namespace);
        }
        Ok(())
    }
}

fn make_dir(path: &Path) -> std::io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// How often the mounts below a path are looked at until there are none. One round takes all of them away; more are for what
/// the host mounts meanwhile in a volume that follows it.
const ROUNDS: u32 = 8;

/// Removes directories of a share, and what they are mounted on in the VMM's namespace is detached with them.
fn remove_tree(path: &Path) -> Result<(), ShareError> {
    // Only after nothing is mounted there for the node: removing must never reach into a volume. A shim of a version that
    // mounted there may have been replaced while its pod ran.
    detach_mounts(path)?;
    let removed = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    ignore_absent(removed).map_err(|error| ShareError::at("remove", path, error))
}

/// The outermost mounts are detached, and take with them what is mounted below: a path that leads through a volume may have no
/// end, when whoever serves that volume does not answer any more.
fn detach_mounts(path: &Path) -> Result<(), ShareError> {
    for _ in 0..ROUNDS {
        let mounts = outermost(mountinfo::mounts_below(path).map_err(ShareError::MountTable)?);
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in &mounts {
            match unmount(mount, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                // Another one may be removing the same.
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
                Err(error) => return Err(ShareError::at("unmount", mount, error.into())),
            }
        }
    }
    Err(ShareError::at("unmount", path, Errno::BUSY.into()))
}

/// Those that are below no other one. Of several at one place all are: what is below one of them may be hidden by another.
fn outermost(mut mounts: Vec<PathBuf>) -> Vec<PathBuf> {
    // By component, so what is below a place comes straight after it.
    mounts.sort();
    mounts.dedup_by(|next, outer| next != outer && next.starts_with(&*outer));
    mounts
}

fn ignore_absent(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The share cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A step on a path of the share.
    #[error("cannot {what} {path}")]
    Step {
        /// Which step.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A volume cannot be bound.
    #[error("cannot give the volume {path} to the pod")]
    Volume {
        /// Its source on the host.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The VMM's mount namespace cannot be had, or takes no mount.
    #[error("cannot mount {path} for the VMM; has it ended?")]
    Attach {
        /// Where in the share.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The root file system cannot be mounted.
    #[error("cannot mount the container's root file system {path}")]
    Rootfs {
        /// Its source.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file system type of a rootfs mount that we do not mount.
    #[error(
        "rootfs type {0:?} is not supported; configure containerd's overlayfs or native snapshotter for this runtime"
    )]
    RootfsType(String),
    /// Options that the kernel's interface cannot take.
    #[error("the image has too many layers for this kernel's mount interface; squash the image or use Linux 6.8")]
    TooManyLayers(#[source] std::io::Error),
    /// A socket as a volume.
    #[error("the volume {0} is a socket of the host, which has no peer inside the guest; remove it from the pod")]
    Socket(PathBuf),
    /// A volume without idmapped mounts.
    #[error(
        "the owners of the volume {0} cannot be mapped as the pod's user namespace has them, which its file system, or one below it, cannot do; use another volume, or remove the user namespace from the pod"
    )]
    Unmappable(PathBuf),
    /// A device as a volume.
    #[error("the volume {0} is a device or fifo of the host, which a guest cannot open; remove it from the pod")]
    Device(PathBuf),
    /// A thread for what may block.
    #[error("cannot run a thread for the pod's mounts; is the node out of threads?")]
    Thread(#[source] std::io::Error),
    /// /proc/self/mountinfo.
    #[error("cannot read the mount table; is /proc mounted?")]
    MountTable(#[source] std::io::Error),
}

impl ShareError {
    fn at(what: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Step { what, path: path.to_path_buf(), source }
    }

    fn attach(path: &Path, source: std::io::Error) -> Self {
        Self::Attach { path: path.to_path_buf(), source }
    }

    fn volume(path: &Path, source: std::io::Error) -> Self {
        Self::Volume { path: path.to_path_buf(), source }
    }
}

#[cfg(test)]
pub mod tests;
