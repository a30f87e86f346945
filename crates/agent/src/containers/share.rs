//! What the guest's kernel has of the share for containers.
//!
//! Each mount of the share is one in the guest, which the kernel makes in the mount namespace of whoever comes upon it first
//! (FUSE_ATTR_SUBMOUNT), with inodes of its own. A volume that containers have in common must be mounted before they have
//! namespaces of their own.
//!
//! A file that the kernel still has a directory entry for is a descriptor that the VMM keeps open, and entries that nobody
//! uses stay until memory is short: each container would leave some twenty. The host takes a container's directory away
//! after the agent has deleted it, and the volumes that no other container has. A look at them then makes the kernel find
//! that they are gone, and drop all that it knows below (fuse_dentry_revalidate, d_invalidate; the entry's own time must be
//! over, one second).

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::guest::{ROOT_DIR, SHARE_DIR, SHARED_VOLUMES};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{UnmountFlags, unmount};

/// The share. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Share {
    dir: PathBuf,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    /// The directories of each container that is there.
    present: HashMap<String, Vec<PathBuf>>,
    /// What containers had that are deleted, and the host had not taken away when it was last looked at.
    departed: BTreeSet<PathBuf>,
}

impl Default for Share {
    fn default() -> Self {
        Self::at(Path::new(SHARE_DIR))
    }
}

impl Share {
    fn at(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf(), seen: Arc::default() }
    }

    /// Mounts a container's volumes, which it has by these numbers. Asks the host.
    pub fn enter(&self, id: &str, volumes: &[u64]) {
        let own = self.dir.join(id);
        let volumes = volumes.iter().map(|number| self.dir.join(SHARED_VOLUMES).join(number.to_string()));
        let volumes: Vec<_> = volumes.collect();
        for volume in &volumes {
            // A file has no mount of its own. What else is wrong with a volume shows when it is bound.
            let _ = rustix::fs::open(volume, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        }
        self.seen().present.insert(id.to_owned(), volumes.into_iter().chain([own]).collect());
    }

    /// Unmounts the root file system of a container whose processes have ended, which writes back what the kernel keeps of it.
    /// It is mounted here if the agent came upon it before the container had mounts of its own. Asks the host.
    pub fn unmount_root(&self, id: &str) {
        // Where it is not mounted, the end of the container's mounts has written it back (EINVAL).
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        let _ = unmount(self.dir.join(id).join(ROOT_DIR), flags);
    }

    /// A container has been deleted.
    pub fn leave(&self, id: &str) {
        let mut seen = self.seen();
        let paths = seen.present.remove(id);
        seen.departed.extend(paths.into_iter().flatten());
    }

    /// Looks for what has departed. Asks the host.
    pub fn look(&self) {
        // Not held while the host answers.
        let paths = std::mem::take(&mut self.seen().departed);
        let there: Vec<_> = paths.into_iter().filter(|path| std::fs::symlink_metadata(path).is_ok()).collect();
        self.seen().departed.extend(there);
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_and_its_volumes_are_looked_for_until_they_are_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("c1")).unwrap();
        std::fs::create_dir_all(path(".volumes/7")).unwrap();
        let share = Share::at(dir.path());
        let left = || share.seen().departed.iter().cloned().collect::<Vec<_>>();
        share.enter("c1", &[7]);
        share.look();
        assert!(left().is_empty());
        share.leave("c1");
        share.look();
        assert_eq!(left(), [path(".volumes/7"), path("c1")]);
        std::fs::remove_dir_all(path("c1")).unwrap();
        share.look();
        assert_eq!(left(), [path(".volumes/7")], "another container has it");
        std::fs::remove_dir(path(".volumes/7")).unwrap();
        share.look();
        assert!(left().is_empty());
    }
}
