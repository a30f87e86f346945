//! When the guest may keep the pages of a file that it opens again.
//!
//! Without the server's leave a guest drops a file's pages at every open (close-to-open consistency), which for a program
//! means to read it again for each exec, and to take it from under those who run it. Leave is given while the file is
//! unchanged since an open at which the pages were dropped. Unchanged is what has the same change time, which nobody can
//! set; but two changes within the clock's grain have the same one, so it says nothing until it is some time ago. Until
//! then what was read a moment ago is as fresh as the guest is promised.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long the guest trusts a name or attributes of what others may change (see [`super::private`]). What the host changes in
/// the share (a ConfigMap's link, a rotated log) is seen that late at most; 0 would make every step of every path a request.
pub const CACHE_TIMEOUT: Duration = Duration::from_secs(1);

/// How old a change must be to be the last of its change time, on a file system whose times are those of the kernel's tick: a
/// tick has 10 ms at most.
const FINE_GRAIN: Duration = Duration::from_millis(40);

/// The same where it may have whole seconds, or hundredths. The coarsest is FAT's, 2 s.
const COARSE_GRAIN: Duration = Duration::from_secs(3);

/// A time that is no multiple of this was not made by a coarse clock, in nanoseconds.
const COARSE_TIMES: u32 = 10_000_000;

/// Change times at which guest and host agreed, by inode number of the guest.
#[derive(Default)]
pub struct Pages {
    /// No more entries than inodes that the guest knows, since [`Self::forget`] is called for each.
    agreed: Mutex<HashMap<u64, Agreed>>,
}

/// An open at which the guest dropped its pages.
struct Agreed {
    /// The change time that the file had then.
    changed: Duration,
    /// When that was, if the file may have changed since and have the same change time.
    unsettled: Option<Duration>,
}

impl Pages {
    /// An open of `inode`, last changed at `changed` (since the epoch): `true` if the guest may keep what it has. If not,
    /// it reads afresh.
    pub fn may_keep(&self, inode: u64, changed: Duration, now: Duration) -> bool {
        let mut agreed = self.agreed();
        let is_fresh = |since| now.checked_sub(since).is_some_and(|age| age < CACHE_TIMEOUT);
        if let Some(last) = agreed.get(&inode)
            && last.changed == changed
            && last.unsettled.is_none_or(is_fresh)
        {
            return true;
        }
        let grain = if changed.subsec_nanos().is_multiple_of(COARSE_TIMES) { COARSE_GRAIN } else { FINE_GRAIN };
        // virtiofsd makes of a time before the epoch one at the end of all times.
        let is_settled = changed.saturating_add(grain) < now;
        agreed.insert(inode, Agreed { changed, unsettled: (!is_settled).then_some(now) });
        false
    }

    /// The guest has forgotten an inode.
    pub fn forget(&self, inode: u64) {
        self.agreed().remove(&inode);
    }

    /// The guest has forgotten everything.
    pub fn clear(&self) {
        self.agreed().clear();
    }

    fn agreed(&self) -> MutexGuard<'_, HashMap<u64, Agreed>> {
        // What is in it is true whoever panicked.
        self.agreed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Duration = Duration::from_secs(1000);
    const NOW: Duration = Duration::from_secs(2000);

    #[test]
    fn unchanged_file_is_kept_from_the_second_open_on() {
        let pages = Pages::default();
        assert!(!pages.may_keep(7, OLD, NOW));
        assert!(pages.may_keep(7, OLD, NOW));
        assert!(!pages.may_keep(8, OLD, NOW));
    }

    #[test]
    fn changed_file_is_read_again() {
        let pages = Pages::default();
        pages.may_keep(7, OLD, NOW);
        let changed = OLD + Duration::from_nanos(1);
        assert!(!pages.may_keep(7, changed, NOW));
        assert!(pages.may_keep(7, changed, NOW));
    }

    #[test]
    fn change_that_may_not_be_the_last_of_its_time_is_trusted_for_a_moment_only() {
        let pages = Pages::default();
        let just_now = NOW - Duration::from_millis(10);
        assert!(!pages.may_keep(7, just_now, NOW));
        assert!(pages.may_keep(7, just_now, NOW + CACHE_TIMEOUT / 2));
        assert!(!pages.may_keep(7, just_now, NOW + CACHE_TIMEOUT));
        // What was read in between may be older than a change of the same time: once more.
        assert!(!pages.may_keep(7, just_now, NOW + COARSE_GRAIN));
        assert!(pages.may_keep(7, just_now, NOW + COARSE_GRAIN + CACHE_TIMEOUT));
        // A clock that was set back says nothing.
        let pages = Pages::default();
        pages.may_keep(7, just_now, NOW);
        assert!(!pages.may_keep(7, just_now, NOW - Duration::from_millis(1)));
    }

    #[test]
    fn time_of_a_fine_clock_is_soon_over() {
        let pages = Pages::default();
        let fine = NOW - FINE_GRAIN - Duration::from_nanos(1);
        assert!(!pages.may_keep(7, fine, NOW));
        assert!(pages.may_keep(7, fine, NOW + Duration::from_secs(100)));
    }

    #[test]
    fn hostile_11_change_before_the_epoch_is_a_time_like_others() {
        // -1 s, as a network file system may say, in virtiofsd's unsigned seconds.
        let changed = Duration::from_secs(u64::MAX);
        let pages = Pages::default();
        assert!(!pages.may_keep(7, changed, NOW));
        assert!(!pages.may_keep(7, changed, NOW + CACHE_TIMEOUT));
    }

    #[test]
    fn forgotten_inodes_take_no_memory() {
        let pages = Pages::default();
        for inode in 0..100 {
            pages.may_keep(inode, OLD, NOW);
            pages.forget(inode);
        }
        assert!(pages.agreed().is_empty());
    }
}
