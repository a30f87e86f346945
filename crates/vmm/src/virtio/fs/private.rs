//! What nobody but the guest changes: the root file systems of its containers.
//!
//! A container's root file system is a mount of its own (`<container id>/rootfs` in the share), and no other pod, nor the node,
//! writes to it. The guest's kernel is told so with the attributes of the mount (guest-kernel/patches,
//! fuse-submounts-may-be-private). From then on it keeps what it knows without end, keeps what is written until it writes it
//! back, and has locks of its own. It does not open files either: a request names an inode, with a handle of zero, and the
//! file is opened here when it is first read, written, or opened to be written, of which alone the guest tells.
//!
//! Everything else may change under the guest, and nothing of this is so there.

use std::collections::{BTreeSet, HashMap};
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::guest::{ROOT_DIR, SHARED_VOLUMES};
use virtiofsd::filesystem::Entry;
use virtiofsd::fuse::ATTR_SUBMOUNT;

/// FUSE_ROOT_ID, the share.
const SHARE: u64 = 1;

/// FUSE_ATTR_PRIVATE of the patch.
pub const PRIVATE: u32 = 1 << 31;

/// How long names and attributes are true. FUSE has no word for "for ever".
pub const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Files that are open at once. Which are is not the guest's business, so this bounds descriptors and nothing else.
const MAX_OPEN: usize = 512;

/// Private inodes that the guest knows, and the files that are open for it.
pub struct Private {
    is_enabled: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Directories of containers, whose `rootfs` is private.
    containers: BTreeSet<u64>,
    /// How often the guest has been told of an inode, which is how often it will forget it.
    known: HashMap<u64, u64>,
    open: HashMap<u64, OpenFile>,
    /// Counts uses.
    clock: u64,
}

/// A file that is open for whoever in the guest has it open.
#[derive(Clone, Copy)]
struct OpenFile {
    handle: u64,
    may_write: bool,
    used: u64,
}

impl Private {
    /// Nothing is private if it is not enabled.
    pub fn new(is_enabled: bool) -> Self {
        Self { is_enabled, state: Mutex::default() }
    }

    /// Is it an inode of a private file system?
    pub fn has(&self, inode: u64) -> bool {
        self.state().known.contains_key(&inode)
    }

    /// The guest is told of `name` in `parent`: notes what is private, and makes its entry last.
    pub fn entered(&self, parent: u64, name: &CStr, entry: &mut Entry) {
        if !self.is_enabled {
            return;
        }
        let mut state = self.state();
        let is_mount = entry.attr.flags & ATTR_SUBMOUNT != 0;
        if parent == SHARE && name.to_bytes() != SHARED_VOLUMES.as_bytes() && !is_mount {
            state.containers.insert(entry.inode);
            return;
        }
        let is_root = is_mount && name.to_bytes() == ROOT_DIR.as_bytes() && state.containers.contains(&parent);
        if is_root {
            entry.attr.flags |= PRIVATE;
        }
        if is_root || (!is_mount && state.known.contains_key(&parent)) {
            *state.known.entry(entry.inode).or_default() += 1;
            // The mount point itself stands in the share, which changes.
            entry.attr_timeout = FOR_EVER;
            if !is_root {
                entry.entry_timeout = FOR_EVER;
            }
        }
    }

    /// The guest forgets `count` of the times that it was told of an inode. Returns the handle of its file, to be closed, if
    /// that was all.
    pub fn forget(&self, inode: u64, count: u64) -> Option<u64> {
        let mut state = self.state();
        state.containers.remove(&inode);
        let known = state.known.get_mut(&inode)?;
        *known = known.saturating_sub(count);
        if *known > 0 {
            return None;
        }
        state.known.remove(&inode);
        state.open.remove(&inode).map(|file| file.handle)
    }

    /// The guest has forgotten everything. The files are the server's to close.
    pub fn clear(&self) {
        *self.state() = State::default();
    }

    /// The handle of a file that is open, for writing if that is asked for.
    pub fn handle(&self, inode: u64, to_write: bool) -> Option<u64> {
        let mut state = self.state();
        state.clock += 1;
        let clock = state.clock;
        let file = state.open.get_mut(&inode).filter(|file| file.may_write || !to_write)?;
        file.used = clock;
        Some(file.handle)
    }

    /// A file has been opened. Returns handles to be closed: what it takes the place of, and one that there is no room for.
    /// A file that was open to be read shows what a lower layer has, even after a write has copied it up (overlayfs).
    pub fn opened(&self, inode: u64, handle: u64, may_write: bool) -> [Option<(u64, u64)>; 2] {
        let mut state = self.state();
        state.clock += 1;
        let used = state.clock;
        let replaced = state.open.insert(inode, OpenFile { handle, may_write, used }).map(|file| (inode, file.handle));
        let oldest = if state.open.len() > MAX_OPEN {
            state.open.iter().min_by_key(|(_, file)| file.used).map(|(inode, file)| (*inode, file.handle))
        } else {
            None
        };
        if let Some((inode, _)) = oldest {
            state.open.remove(&inode);
        }
        [replaced, oldest]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is in it is true whoever panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use virtiofsd::fuse::Attr;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn enter(private: &Private, parent: u64, name: &CStr, inode: u64, flags: u32) -> Entry {
        let attr = Attr { flags, ..Attr::default() };
        let mut entry = Entry { inode, generation: 0, attr, attr_timeout: SECOND, entry_timeout: SECOND };
        private.entered(parent, name, &mut entry);
        entry
    }

    fn with_root() -> Private {
        let private = Private::new(true);
        enter(&private, SHARE, c"c1", 2, 0);
        enter(&private, 2, c"rootfs", 4, ATTR_SUBMOUNT);
        private
    }

    #[test]
    fn root_file_systems_are_private_and_nothing_else_is() {
        let private = Private::new(true);
        assert_eq!(enter(&private, SHARE, c"c1", 2, 0).entry_timeout, SECOND);
        assert_eq!(enter(&private, SHARE, c".volumes", 3, 0).attr.flags, 0);
        let root = enter(&private, 2, c"rootfs", 4, ATTR_SUBMOUNT);
        assert_eq!(root.attr.flags, ATTR_SUBMOUNT | PRIVATE);
        assert_eq!((root.attr_timeout, root.entry_timeout), (FOR_EVER, SECOND));
        let file = enter(&private, 4, c"etc", 20, 0);
        assert_eq!((file.attr.flags, file.attr_timeout, file.entry_timeout), (0, FOR_EVER, FOR_EVER));
        assert_eq!(enter(&private, 20, c"passwd", 21, 0).attr_timeout, FOR_EVER);
        enter(&private, 2, c"mounts", 5, 0);
        // What is called so in a volume, as on a node: that is another's.
        for (parent, inode) in [(3, 6), (5, 7), (4, 8), (6, 9)] {
            let entry = enter(&private, parent, c"rootfs", inode, ATTR_SUBMOUNT);
            assert_eq!((entry.attr.flags, entry.attr_timeout), (ATTR_SUBMOUNT, SECOND), "{parent}");
            assert!(!private.has(inode));
        }
        assert_eq!(enter(&private, 2, c"rootfs", 10, 0).attr.flags, 0, "no mount");
        assert_eq!(enter(&private, 2, c"other", 11, ATTR_SUBMOUNT).attr.flags, ATTR_SUBMOUNT);
        assert_eq!([4, 20, 21].map(|inode| private.has(inode)), [true; 3]);
        assert_eq!([2, 3, 5, 10, 11].map(|inode| private.has(inode)), [false; 5]);
    }

    #[test]
    fn nothing_is_private_if_others_write_to_root_file_systems() {
        let private = Private::new(false);
        enter(&private, SHARE, c"c1", 2, 0);
        assert_eq!(enter(&private, 2, c"rootfs", 4, ATTR_SUBMOUNT).attr.flags, ATTR_SUBMOUNT);
        assert!(!private.has(4));
    }

    #[test]
    fn an_inode_is_known_until_it_is_forgotten_as_often_as_it_was_told() {
        let private = with_root();
        enter(&private, 4, c"file", 20, 0);
        enter(&private, 4, c"link", 20, 0);
        private.opened(20, 7, false);
        assert_eq!(private.forget(20, 1), None);
        assert!(private.has(20));
        assert_eq!(private.forget(20, 1), Some(7));
        assert!(!private.has(20) && private.handle(20, false).is_none());
        assert_eq!(private.forget(20, u64::MAX), None);
        private.forget(2, 1);
        assert!(private.state().containers.is_empty());
        private.clear();
        assert!(!private.has(4));
    }

    #[test]
    fn a_file_is_open_once_and_to_write_only_if_it_is_written() {
        let private = with_root();
        assert_eq!(private.handle(20, false), None);
        assert_eq!(private.opened(20, 7, false), [None, None]);
        assert_eq!((private.handle(20, false), private.handle(20, true)), (Some(7), None));
        assert_eq!(private.opened(20, 8, true), [Some((20, 7)), None]);
        assert_eq!((private.handle(20, false), private.handle(20, true)), (Some(8), Some(8)));
    }

    #[test]
    fn hostile_11_a_guest_that_reads_every_file_has_few_of_them_open() {
        let private = with_root();
        let mut open = 0;
        for inode in 100..2000 {
            private.handle(100, false);
            open += 1;
            open -= private.opened(inode, inode, false).iter().flatten().count();
        }
        assert_eq!(open, MAX_OPEN);
        assert_eq!(private.handle(100, false), Some(100), "the one that is used most stays");
    }
}
