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
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bulkhead_protocol::guest::{UPPER_DIR, UPPER_NAMES};

/// The windows that the guest knows: their inode numbers, and how often each was looked up.
#[derive(Default)]
pub struct Windows(RwLock<BTreeMap<u64, u64>>);

/// Whether a name is that of a window.
pub fn is_name(name: &CStr) -> bool {
    name.to_bytes() == UPPER_DIR.as_bytes()
}

impl Windows {
    /// Looks up a window. Until it is known as one, nobody is told what may be done with any inode: the guest may guess its number.
    pub fn look_up<T>(&self, look_up: impl FnOnce() -> io::Result<(u64, T)>) -> io::Result<T> {
        let mut windows = self.write();
        let (inode, found) = look_up()?;
        let count = windows.entry(inode).or_default();
        *count = count.saturating_add(1);
        Ok(found)
    }

    /// Whether `name` may be looked up in `parent`.
    pub fn may_find(&self, parent: u64, name: &CStr) -> io::Result<()> {
        let known = UPPER_NAMES.iter().any(|known| known.as_bytes() == name.to_bytes());
        if known || !self.read().contains_key(&parent) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOENT))
        }
    }

    /// Whether a directory, or its attributes, may be changed, and its names listed.
    pub fn may_use(&self, inode: u64) -> io::Result<()> {
        if self.read().contains_key(&inode) { Err(io::Error::from_raw_os_error(libc::EPERM)) } else { Ok(()) }
    }

    /// The guest has forgotten so many look-ups of an inode.
    pub fn forget(&self, inode: u64, count: u64) {
        if !self.read().contains_key(&inode) {
            return;
        }
        let mut windows = self.write();
        if let Some(known) = windows.get_mut(&inode) {
            *known = known.saturating_sub(count);
            if *known == 0 {
                windows.remove(&inode);
            }
        }
    }

    /// The guest has forgotten everything.
    pub fn clear(&self) {
        self.write().clear();
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<u64, u64>> {
        // What is in it is true whoever panicked.
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, u64>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_up(windows: &Windows, inode: u64) {
        windows.look_up(|| Ok((inode, ()))).unwrap();
    }

    #[test]
    fn hostile_11_window_shows_two_names_and_can_be_changed_by_nobody() {
        let windows = Windows::default();
        assert!(is_name(c".bulkhead-upper") && !is_name(c".bulkhead-upper2") && !is_name(c"upper"));
        look_up(&windows, 7);
        assert!(windows.look_up(|| Err::<(u64, ()), _>(io::ErrorKind::NotFound.into())).is_err());
        for name in [c"fs", c"work"] {
            assert!(windows.may_find(7, name).is_ok());
        }
        for name in [c"layer.erofs", c".erofslayer", c"FS", c"rwlayer.img", c".bulkhead-upper"] {
            assert_eq!(windows.may_find(7, name).unwrap_err().raw_os_error(), Some(libc::ENOENT));
            assert!(windows.may_find(8, name).is_ok());
        }
        assert_eq!(windows.may_use(7).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert!(windows.may_use(8).is_ok());
    }

    #[test]
    fn hostile_11_window_is_one_as_long_as_the_guest_holds_it() {
        let windows = Windows::default();
        look_up(&windows, 7);
        look_up(&windows, 7);
        look_up(&windows, 7);
        windows.forget(7, 1);
        windows.forget(8, 100);
        windows.forget(7, 1);
        assert!(windows.may_use(7).is_err());
        windows.forget(7, u64::MAX);
        assert!(windows.may_use(7).is_ok());
        windows.forget(7, 1);
        look_up(&windows, 9);
        windows.clear();
        assert!(windows.read().is_empty());
    }
}
