//! Making the guest's kernel forget the files of containers that are gone.
//!
//! A file of the share that the kernel still has a directory entry for is a descriptor that the VMM keeps open, and entries
//! that nobody uses stay until memory is short: each container would leave some twenty. The host takes a container's
//! directory away after the agent has deleted it. A look at the directory then makes the kernel find that it is gone, and
//! drop all that it knows below (fuse_dentry_revalidate, d_invalidate; the entry's own time must be over, one second).

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::guest::SHARE_DIR;

/// Deleted containers whose directories the host had not taken away when they were last looked at.
#[derive(Clone, Debug)]
pub struct Departed {
    share: PathBuf,
    ids: Arc<Mutex<Vec<String>>>,
}

impl Default for Departed {
    fn default() -> Self {
        Self::of(Path::new(SHARE_DIR))
    }
}

impl Departed {
    fn of(share: &Path) -> Self {
        Self { share: share.to_path_buf(), ids: Arc::default() }
    }

    /// A container has been deleted.
    pub fn add(&self, id: &str) {
        self.ids().push(id.to_owned());
    }

    /// Looks at the directories, which asks the host.
    pub fn look(&self) {
        // Not held while the host answers.
        let ids = std::mem::take(&mut *self.ids());
        let there = ids.into_iter().filter(|id| std::fs::symlink_metadata(self.share.join(id)).is_ok());
        let there: Vec<_> = there.collect();
        self.ids().extend(there);
    }

    fn ids(&self) -> MutexGuard<'_, Vec<String>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn container_is_looked_for_until_it_is_gone() {
        let share = tempfile::tempdir().unwrap();
        std::fs::create_dir(share.path().join("c1")).unwrap();
        let departed = Departed::of(share.path());
        departed.add("c1");
        departed.look();
        assert_eq!(*departed.ids.lock().unwrap(), ["c1"]);
        std::fs::remove_dir(share.path().join("c1")).unwrap();
        departed.look();
        assert!(departed.ids.lock().unwrap().is_empty());
    }
}
