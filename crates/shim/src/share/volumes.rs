//! Volumes of a pod, each in the share once, whichever containers have it.
//!
//! Containers that have a volume in common must have its inodes in common in the guest: unix(7) sockets, fifos, locks,
//! mappings and cached pages are the guest kernel's, by inode. The file server takes what is reached through two mounts for
//! two inodes. So a volume is one mount, `.volumes/<n>`, and has no other name.
//!
//! What a container has to itself: a volume with mounts below it or that follows the host, where two copies need not be
//! the same, and a read-only one that another container later gets to write. A read-only volume that the pod may write
//! by another container's mount is read-only in the guest alone; the guest could write to it anyway. So is an emptyDir of
//! the pod's, which has its writers sooner or later.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::guest::SHARED_VOLUMES;
use rustix::io::Errno;

use super::ShareError;
use super::directories::{make_dir, remove_tree};
use super::follow::{Following, Watch};
use super::jail::Place;
use super::mountinfo::{mounts_below, place_in_file_system};
use super::tree::{Inode, Propagation, Tree};
use crate::spec::{Access, SCRATCH_DEPTH, Volume};

/// The volumes that the share shows.
#[derive(Clone, Debug, Default)]
pub struct Volumes(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    /// Numbers are not used again: the guest may still know what had one.
    next: u64,
    mounts: Vec<SharedMount>,
}

/// A volume, whichever mount of the host leads to it. The inode alone would do, but for file systems whose numbers are not
/// unique.
#[derive(Clone, Debug, Eq, PartialEq)]
struct VolumeIdentity {
    inode: Inode,
    place_in_file_system: PathBuf,
}

/// A mount in the share.
#[derive(Debug)]
struct SharedMount {
    number: u64,
    /// `None` if nobody else may have it.
    identity: Option<VolumeIdentity>,
    writable: bool,
    containers: BTreeSet<String>,
    /// What the host mounts in it later comes by this.
    _following: Option<Following>,
}

impl Volumes {
    /// Shows a container's volume in a share, and answers below which number.
    pub fn add(&self, share: &Place, container: &str, volume: &Volume) -> Result<u64, ShareError> {
        let failed = |error: Errno| ShareError::volume(&volume.source, error.into());
        let place = volume.source.canonicalize().map_err(|error| ShareError::volume(&volume.source, error))?;
        let watch = (volume.follows_host && volume.access == Access::ReadOnly).then(|| Watch::begin(&place));
        let watch = watch.transpose().map_err(ShareError::MountTable)?;
        let tree = copy(volume)?;
        let alone = volume.follows_host || (volume.recursive && has_mounts_below(&place)?);
        let identity = if alone { None } else { identity(&tree, &place).map_err(failed)? };
        let source_writable = match tree.is_read_only() {
            // A file system in user space may not say.
            Err(Errno::NOSYS) => true,
            said => !said.map_err(failed)?,
        };
        if let Some(number) = self.lock().join(container, volume.access, identity.as_ref(), source_writable) {
            return Ok(number);
        }
        let access = if !alone && is_scratch(volume, &place) { Access::ReadWrite } else { volume.access };
        restrict(&tree, access).map_err(failed)?;
        // Nothing that may wait for a file system of the host happens under the lock.
        let number = self.lock().number();
        let target = share.dir.join(SHARED_VOLUMES).join(number.to_string());
        let attach = || share.attach(&tree, &target).map_err(|error| ShareError::attach(&target, error));
        let attached = make_target(&volume.source, &target).and_then(|()| attach());
        let followed = attached.and_then(|()| {
            let follow = |watch: Watch| watch.follow(share.jail.clone(), share.inside(&target));
            watch.map(follow).transpose().map_err(ShareError::Thread)
        });
        if followed.is_err() {
            // Nobody else knows of it.
            let _ = remove_tree(&target);
        }
        let following = followed?;
        let writable = access == Access::ReadWrite && source_writable;
        let containers = BTreeSet::from([container.to_owned()]);
        let mut table = self.lock();
        // Another container may have come with it meanwhile.
        if let Some(other) = table.join(container, volume.access, identity.as_ref(), source_writable) {
            drop(table);
            let _ = remove_tree(&target);
            return Ok(other);
        }
        table.mounts.push(SharedMount { number, identity, writable, containers, _following: following });
        Ok(number)
    }

    /// A container has gone: removes what nobody has any more. What cannot be removed is tried again with the next one.
    pub fn leave(&self, dir: &Path, container: &str) -> Result<(), ShareError> {
        let unused = self.lock().leave(container);
        let mut outcome = Ok(());
        for number in unused {
            let removed = remove_tree(&dir.join(SHARED_VOLUMES).join(number.to_string()));
            if removed.is_ok() {
                self.lock().mounts.retain(|mount| mount.number != number);
            }
            outcome = outcome.and(removed);
        }
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Takes a container out, and answers what has none now. Nobody can join that any more.
    fn leave(&mut self, container: &str) -> Vec<u64> {
        for mount in &mut self.mounts {
            mount.containers.remove(container);
        }
        let unused = self.mounts.iter_mut().filter(|mount| mount.containers.is_empty());
        let forget = |mount: &mut SharedMount| {
            mount.identity = None;
            mount.number
        };
        unused.map(forget).collect()
    }

    /// Finds what is shown already, preferably where it can be written, and takes part in it.
    fn join(
        &mut self,
        container: &str,
        access: Access,
        identity: Option<&VolumeIdentity>,
        source_writable: bool,
    ) -> Option<u64> {
        let same = self.mounts.iter_mut().filter(|mount| identity.is_some() && mount.identity.as_ref() == identity);
        // A container that may write must meet what its own mount on the host would do.
        let fits = same.filter(|mount| access != Access::ReadWrite || mount.writable == source_writable);
        let mount = fits.max_by_key(|mount| mount.writable)?;
        mount.containers.insert(container.to_owned());
        Some(mount.number)
    }
}

fn copy(volume: &Volume) -> Result<Tree, ShareError> {
    let failed = |error: Errno| ShareError::volume(&volume.source, error.into());
    // What comes to a read-only one later has to be made read-only first ([`super::follow`]).
    let slave = volume.follows_host && volume.access == Access::ReadWrite;
    let propagation = if slave { Propagation::Slave } else { Propagation::Private };
    let tree = Tree::copy(&volume.source, volume.recursive, propagation).map_err(failed)?;
    if let Some(namespace) = &volume.mapped_by {
        tree.map_ids(namespace).map_err(|error| match error {
            Errno::INVAL => ShareError::Unmappable(volume.source.clone()),
            other => failed(other),
        })?;
    }
    Ok(tree)
}

fn restrict(tree: &Tree, access: Access) -> Result<(), Errno> {
    match access {
        Access::ReadWrite => Ok(()),
        Access::ReadOnly => tree.make_read_only(),
    }
}

/// Makes what a volume is mounted on: it has the kind of its source.
fn make_target(source: &Path, target: &Path) -> Result<(), ShareError> {
    let kind = std::fs::metadata(source).map_err(|error| ShareError::volume(source, error))?.file_type();
    let failed = |path: &Path, error| ShareError::at("make", path, error);
    if let Some(parent) = target.parent() {
        make_dir(parent).map_err(|error| failed(parent, error))?;
    }
    if kind.is_dir() {
        make_dir(target).map_err(|error| failed(target, error))
    } else if kind.is_file() {
        File::create_new(target).map(drop).map_err(|error| failed(target, error))
    } else if kind.is_socket() {
        Err(ShareError::Socket(source.to_path_buf()))
    } else {
        Err(ShareError::Device(source.to_path_buf()))
    }
}

fn identity(tree: &Tree, place: &Path) -> Result<Option<VolumeIdentity>, Errno> {
    let inode = tree.inode()?;
    // Without it the container has the volume to itself.
    let place_in_file_system = place_in_file_system(place).unwrap_or_default();
    Ok(place_in_file_system.map(|place_in_file_system| VolumeIdentity { inode, place_in_file_system }))
}

fn has_mounts_below(place: &Path) -> Result<bool, ShareError> {
    let mounts = mounts_below(place).map_err(ShareError::MountTable)?;
    Ok(mounts.iter().any(|mount| mount != place))
}

/// Whether it is one of the pod's own directories, and no link of the host's that has the name of one.
fn is_scratch(volume: &Volume, place: &Path) -> bool {
    let ends = place.components().rev().zip(volume.source.components().rev());
    volume.scratch && ends.take(SCRATCH_DEPTH).all(|(there, named)| there == named)
}
