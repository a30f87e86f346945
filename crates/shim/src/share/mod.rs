//! The pod's share: the one directory of the host that the guest sees, through virtio-fs (ARCHITECTURE.md, D5).
//!
//! `share/<container id>/rootfs` is the container's root, `share/.volumes/<n>` a volume, which containers may have in common
//! ([`volumes`]). Nothing is copied. The mounts are in the VMM's mount namespace and not in
//! the node's ([`jail`]), where the share is a tree of empty directories, and removing a container is removing its part of it.
//! What the pod may only read is mounted read-only, never only in the guest; [`tree`] says why mounts are finished before they
//! are attached.

mod directories;
mod error;
mod follow;
mod jail;
mod mountinfo;
mod rootfs;
mod tree;
mod volumes;

use std::os::fd::OwnedFd;
use std::path::Path;

use containerd_shim_protos::types::mount::Mount;
use rustix::fs::{Mode, OFlags};

use bulkhead_protocol::guest::{ROOT_DIR, UPPER_DIR, UPPER_NAMES};

use crate::layers::{Layered, Top};
use crate::paths::RunDir;
use crate::spec::{Access, GuestVolume, Volume};
use directories::{ignore_absent, make_dir, remove_tree};
pub use error::ShareError;
use jail::{Jail, Place};
use tree::{Propagation, Tree};
pub use tree::{open_device, open_file};
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

    /// Makes the place of a root file system that the guest mounts, with the directory where the container writes, if there is one.
    pub fn add_layered_root(&self, id: &str, layered: &Layered) -> Result<(), ShareError> {
        let own = self.place.dir.join(id);
        let make = |path: &Path| make_dir(path).map_err(|error| ShareError::at("make", path, error));
        make(&own.join(ROOT_DIR))?;
        let Some(Top::Directory { dir, mapped_root }) = &layered.top else { return Ok(()) };
        let [upper, _] = UPPER_NAMES;
        rootfs::own_upper_directory(&dir.join(upper), *mapped_root)?;
        let tree = Tree::copy(dir, false, Propagation::Private);
        let tree = tree.map_err(|error| ShareError::Rootfs { path: dir.clone(), source: error.into() })?;
        let target = own.join(UPPER_DIR);
        make(&target)?;
        self.place.attach(&tree, &target).map_err(|error| ShareError::attach(&target, error))
    }

    /// Shows the volumes of a container, and answers under which number each is in the share. Those that it may write come first,
    /// so that it has the same ones to read.
    pub fn add_volumes(&self, id: &str, volumes: Vec<Volume>) -> Result<Vec<GuestVolume>, ShareError> {
        let (writable, others): (Vec<_>, Vec<_>) =
            volumes.into_iter().partition(|volume| volume.access == Access::ReadWrite);
        let add = |host: Volume| Ok(GuestVolume { number: self.volumes.add(&self.place, id, &host)?, host });
        writable.into_iter().chain(others).map(add).collect()
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

#[cfg(test)]
pub mod tests;
