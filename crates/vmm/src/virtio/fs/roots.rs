//! Whose locks are the guest's own: files that nobody else has.
//!
//! A container's root file system (`<container id>/rootfs` in the share) is no other pod's, so locks there need not be the
//! host's, and a request for each would cost a database many times what the lock does. The guest's kernel is told with the
//! attributes of the mount (guest-kernel/patches, fuse-submounts-may-have-local-locks). For a mount that it is not told of,
//! and everything below one, locks are the host's.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::guest::{ROOT_DIR, SHARED_VOLUMES};
use virtiofsd::fuse::{ATTR_SUBMOUNT, Attr};

/// FUSE_ROOT_ID, the share.
const SHARE: u64 = 1;

/// FUSE_ATTR_LOCAL_LOCKS of the patch.
pub const LOCAL_LOCKS: u32 = 1 << 31;

/// Directories of containers, by inode number of the guest.
#[derive(Default)]
pub struct Roots(Mutex<BTreeSet<u64>>);

impl Roots {
    /// The guest has looked up `name` in `parent`. The attributes may become those of a root file system.
    pub fn looked_up(&self, parent: u64, name: &CStr, inode: u64, attr: &mut Attr) {
        let is_mount = attr.flags & ATTR_SUBMOUNT != 0;
        if parent == SHARE && name.to_bytes() != SHARED_VOLUMES.as_bytes() && !is_mount {
            self.containers().insert(inode);
        } else if is_mount && name.to_bytes() == ROOT_DIR.as_bytes() && self.containers().contains(&parent) {
            attr.flags |= LOCAL_LOCKS;
        }
    }

    /// The guest has forgotten an inode.
    pub fn forget(&self, inode: u64) {
        self.containers().remove(&inode);
    }

    /// The guest has forgotten everything.
    pub fn clear(&self) {
        self.containers().clear();
    }

    fn containers(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        // What is in it is true whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(roots: &Roots, parent: u64, name: &CStr, inode: u64, flags: u32) -> u32 {
        let mut attr = Attr { flags, ..Attr::default() };
        roots.looked_up(parent, name, inode, &mut attr);
        attr.flags
    }

    #[test]
    fn root_file_systems_have_their_own_locks_and_nothing_else_has() {
        let roots = Roots::default();
        assert_eq!(flags(&roots, SHARE, c"c1", 2, 0), 0);
        assert_eq!(flags(&roots, SHARE, c".volumes", 3, 0), 0);
        assert_eq!(flags(&roots, 2, c"rootfs", 4, ATTR_SUBMOUNT), ATTR_SUBMOUNT | LOCAL_LOCKS);
        assert_eq!(flags(&roots, 2, c"mounts", 5, 0), 0);
        // What is called so in a volume, as on a node: that is another's.
        for (parent, inode) in [(3, 6), (5, 7), (4, 8), (6, 9)] {
            assert_eq!(flags(&roots, parent, c"rootfs", inode, ATTR_SUBMOUNT), ATTR_SUBMOUNT, "{parent}");
        }
        assert_eq!(flags(&roots, 2, c"rootfs", 4, 0), 0, "no mount");
        assert_eq!(flags(&roots, 2, c"other", 4, ATTR_SUBMOUNT), ATTR_SUBMOUNT);
    }

    #[test]
    fn forgotten_directories_take_no_memory() {
        let roots = Roots::default();
        flags(&roots, SHARE, c"c1", 2, 0);
        roots.forget(2);
        assert_eq!(flags(&roots, 2, c"rootfs", 4, ATTR_SUBMOUNT), ATTR_SUBMOUNT);
        flags(&roots, SHARE, c"c2", 5, 0);
        roots.clear();
        assert!(roots.containers().is_empty());
    }
}
