//! Directories of which the guest has two names and nothing else.
//!
//! A container whose image comes as layers has an overlay that the guest makes. Its upper and work directory have to be in one
//! mount, which is that of the snapshot's directory (`<container id>/.bulkhead-upper` in the share). What else is there is
//! containerd's: a file with the name of an image would be taken for one when the snapshot is committed, and mounted on the node.
//! So in that directory nothing is found but the two, and nothing is made, removed or renamed.
//!
//! It is known by its name, wherever that is: there is no path to it on which it could be missed. As long as the guest holds its
//! inode, it is one.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::guest::{UPPER_DIR, UPPER_NAMES};

/// The windows that the guest knows: their inode numbers, and how often it was told of each.
#[derive(Default)]
pub struct Windows(Mutex<BTreeMap<u64, u64>>);

impl Windows {
    /// The guest is told of a name, and of the inode that has it.
    pub fn entered(&self, name: &CStr, inode: u64) {
        if name.to_bytes() == UPPER_DIR.as_bytes() {
            *self.known().entry(inode).or_default() += 1;
        }
    }

    /// Whether `name` may be looked up in `parent`.
    pub fn may_find(&self, parent: u64, name: &CStr) -> io::Result<()> {
        if !UPPER_NAMES.iter().any(|known| known.as_bytes() == name.to_bytes()) && self.known().contains_key(&parent) {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        Ok(())
    }

    /// Whether a directory, or its attributes, may be changed, and its names listed.
    pub fn may_use(&self, inode: u64) -> io::Result<()> {
        if self.known().contains_key(&inode) { Err(io::Error::from_raw_os_error(libc::EPERM)) } else { Ok(()) }
    }

    /// The guest forgets `count` of the times that it was told of an inode.
    pub fn forget(&self, inode: u64, count: u64) {
        let mut windows = self.known();
        if let Some(known) = windows.get_mut(&inode) {
            *known = known.saturating_sub(count);
            if *known == 0 {
                windows.remove(&inode);
            }
        }
    }

    /// The guest has forgotten everything.
    pub fn clear(&self) {
        self.known().clear();
    }

    fn known(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        // What is in it is true whoever panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &CStr = c".bulkhead-upper";

    #[test]
    fn hostile_11_window_shows_two_names_and_can_be_changed_by_nobody() {
        let windows = Windows::default();
        windows.entered(NAME, 7);
        for name in [c".bulkhead-upper2", c"upper", c"fs"] {
            windows.entered(name, 8);
        }
        for name in [c"fs", c"work"] {
            assert!(windows.may_find(7, name).is_ok());
        }
        for name in [c"layer.erofs", c".erofslayer", c"FS", c"rwlayer.img", NAME] {
            assert_eq!(windows.may_find(7, name).unwrap_err().raw_os_error(), Some(libc::ENOENT));
            assert!(windows.may_find(8, name).is_ok());
        }
        assert_eq!(windows.may_use(7).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(windows.may_use(8).is_ok());
    }

    #[test]
    fn hostile_11_window_is_one_as_long_as_the_guest_holds_it() {
        let windows = Windows::default();
        for _ in 0..3 {
            windows.entered(NAME, 7);
        }
        windows.forget(7, 1);
        windows.forget(8, 100);
        windows.forget(7, 1);
        assert!(windows.may_use(7).is_err());
        windows.forget(7, u64::MAX);
        assert!(windows.may_use(7).is_ok());
        windows.forget(7, 1);
        windows.entered(NAME, 9);
        windows.clear();
        assert!(windows.known().is_empty());
    }
}
