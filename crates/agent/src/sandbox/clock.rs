//! The guest's clock follows the host's.
//!
//! A guest begins with the host's time, which KVM tells its kernel. Later the two go apart: the host's clock is steered (NTP)
//! or set, and the guest counts on without knowing. Where KVM offers the host's clock as a PTP clock, it is read from time to
//! time; where it does not, the shim compares the two by SyncClock. After the host's clock was set the shim asks in any case.
//! Small differences are slewed, so that the clock does not jump for programs; others are stepped, as they were on the host.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::time::{ClockId, DynamicClockId, Timespec, clock_gettime, clock_gettime_dynamic};
use tokio::sync::Notify;

use crate::sys;

/// A guest that is behind by more is stepped: files that the host stamps would be newer than the clock that programs see.
const MAX_BEHIND_NS: i64 = 5_000_000;

/// A guest that is ahead by more is stepped back. Below that programs keep a clock that never goes back, and files are older
/// by as much as a busy file server makes them.
const MAX_AHEAD_NS: i64 = 100_000_000;

/// Time between two looks at the host's clock, at first and later. A quartz is off by 100 ppm at most, 6.4 ms in the longer
/// one, and after a few looks the guest knows by how much.
const FIRST_INTERVAL: Duration = Duration::from_secs(8);
const LONGEST_INTERVAL: Duration = Duration::from_secs(64);

/// Looks of which the best counts: the guest may be interrupted in one.
const READINGS: usize = 5;

const NS_PER_S: i64 = 1_000_000_000;

/// What the kernel slews a second at most (`MAX_TICKADJ`), and the largest frequency that it takes (`MAXFREQ`), in ppm.
const MAX_PPM: i64 = 500;

/// Units of adjtimex(2)'s frequency in a ppm.
const FREQUENCY_OF_A_PPM: i64 = 1 << 16;

/// The clock of this guest.
#[derive(Debug, Default)]
pub struct Clock {
    /// KVM's PTP clock, if the host's can be read so.
    host: Option<OwnedFd>,
    discipline: Mutex<Discipline>,
    /// The shim has asked.
    asked: Notify,
}

/// By how much the host is ahead, in nanoseconds, and the most by which that may be wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Offset {
    /// Negative if the guest is.
    pub ahead: i64,
    /// Never negative.
    pub error: i64,
}

impl Clock {
    /// That of a guest, for which the host's is looked for.
    pub fn of_guest() -> Self {
        Self { host: open_host_clock(), ..Self::default() }
    }

    /// Corrects the clock by the host's if it can be read from here, else by what is known of it. Answers whether it was read.
    pub fn sync(&self, told: Option<Offset>) -> io::Result<bool> {
        self.asked.notify_one();
        // It can be read no longer when the host has changed its clock source.
        let read = self.host.as_ref().and_then(|host| compare(host).ok());
        read.or(told).map_or(Ok(()), |offset| self.correct(offset))?;
        Ok(read.is_some())
    }

    /// Looks at the host's clock from time to time, for ever, if it can be read from here: nothing tells of its drift.
    pub async fn follow(&self) {
        let Some(host) = &self.host else { return };
        let mut wait = FIRST_INTERVAL;
        loop {
            match tokio::time::timeout(wait, self.asked.notified()).await {
                // The host's clock was set, and may have another speed from now on.
                Ok(()) => wait = FIRST_INTERVAL,
                Err(_) => {
                    if let Err(error) = compare(host).and_then(|offset| self.correct(offset)) {
                        tracing::warn!(%error, "cannot follow the host's clock");
                    }
                    wait = LONGEST_INTERVAL.min(wait * 2);
                }
            }
        }
    }

    fn correct(&self, offset: Offset) -> io::Result<()> {
        let mut discipline = self.discipline.lock().unwrap_or_else(PoisonError::into_inner);
        discipline.correct(offset, sys::since_boot()).apply()
    }
}

/// The guest's clock, nanoseconds since the epoch.
pub fn now() -> i64 {
    nanoseconds(clock_gettime(ClockId::Realtime))
}

fn nanoseconds(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(NS_PER_S).saturating_add(time.tv_nsec)
}

/// KVM's is the only PTP clock that our kernel has a driver for, and it has none if the host's clock cannot be had. Another kernel
/// may have a network card's.
fn open_host_clock() -> Option<OwnedFd> {
    let name = std::fs::read_to_string("/sys/class/ptp/ptp0/clock_name").ok()?;
    let open = || rustix::fs::open("/dev/ptp0", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok();
    (name.trim() == "KVM virtual PTP").then(open)?
}

/// Reads the host's clock between two looks at the guest's (ptp(4)).
fn compare(host: &OwnedFd) -> io::Result<Offset> {
    let mut best = None::<Offset>;
    for _ in 0..READINGS {
        let before = now();
        let theirs = nanoseconds(clock_gettime_dynamic(DynamicClockId::Dynamic(host.as_fd()))?);
        let offset = between(before, theirs, now());
        if best.is_none_or(|best| offset.error < best.error) {
            best = Some(offset);
        }
    }
    best.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn between(before: i64, theirs: i64, after: i64) -> Offset {
    let error = after.saturating_sub(before).max(0) / 2;
    Offset { ahead: theirs.saturating_sub(before.saturating_add(error)), error }
}

/// What is known of the guest's clock beside the host's.
#[derive(Debug, Default)]
struct Discipline {
    /// What keeps the clock beside the host's, in adjtimex(2)'s units: positive for a guest that is too slow.
    frequency: i64,
    /// When (CLOCK_BOOTTIME) it was corrected last, and until when that slews.
    last: Option<(Duration, Duration)>,
}

/// What is to be done about a difference.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Correction {
    /// Nothing: it is no more than the error of looking.
    None,
    /// Set the clock forward, nanoseconds.
    Step(i64),
    /// Make it faster, until it is ahead by as many nanoseconds more, with a frequency to keep.
    Slew { ahead: i64, frequency: i64 },
}

impl Discipline {
    fn correct(&mut self, Offset { ahead, error }: Offset, now: Duration) -> Correction {
        let certain = ahead.saturating_abs().saturating_sub(error.max(0));
        if certain <= 0 {
            return Correction::None;
        }
        if certain > if ahead > 0 { MAX_BEHIND_NS } else { MAX_AHEAD_NS } {
            // Nothing can be learnt of the clock's speed from it.
            self.last = None;
            return Correction::Step(ahead);
        }
        if let Some((corrected, slewed)) = self.last
            && now >= slewed
            && let Some(drift) = drift(ahead, now.saturating_sub(corrected))
        {
            // Half of it: what is seen in a single look is the error of two.
            self.frequency =
                (self.frequency + drift / 2).clamp(-MAX_PPM * FREQUENCY_OF_A_PPM, MAX_PPM * FREQUENCY_OF_A_PPM);
        }
        let slew = Duration::from_nanos(ahead.unsigned_abs()) * u32::try_from(1_000_000 / MAX_PPM).unwrap_or(2000);
        self.last = Some((now, now + slew));
        Correction::Slew { ahead, frequency: self.frequency }
    }
}

/// The speed, in adjtimex(2)'s units, at which a difference has come to be. None for a time in which nothing shows.
fn drift(ahead: i64, elapsed: Duration) -> Option<i64> {
    let elapsed = i128::try_from(elapsed.as_nanos()).ok()?;
    if elapsed < i128::from(NS_PER_S) {
        return None;
    }
    i64::try_from(i128::from(ahead) * 1_000_000 * i128::from(FREQUENCY_OF_A_PPM) / elapsed).ok()
}

impl Correction {
    fn apply(self) -> io::Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Step(ahead) => {
                sys::slew_clock(0)?;
                sys::step_clock(ahead)
            }
            Self::Slew { ahead, frequency } => {
                sys::set_clock_frequency(frequency)?;
                sys::slew_clock(ahead / 1000)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn step_of_the_host_is_made_at_once_and_both_ways() {
        let mut clock = Discipline::default();
        assert_eq!(clock.correct(Offset { ahead: 600 * NS_PER_S, error: MS }, at(9)), Correction::Step(600 * NS_PER_S));
        assert_eq!(
            clock.correct(Offset { ahead: -600 * NS_PER_S, error: MS }, at(9)),
            Correction::Step(-600 * NS_PER_S)
        );
        assert_eq!(clock.correct(Offset { ahead: 7 * MS, error: MS }, at(9)), Correction::Step(7 * MS));
    }

    #[test]
    fn difference_that_may_be_none_is_left() {
        let mut clock = Discipline::default();
        assert_eq!(clock.correct(Offset { ahead: 20 * MS, error: 20 * MS }, at(9)), Correction::None);
        assert_eq!(clock.correct(Offset { ahead: i64::MIN, error: i64::MAX }, at(9)), Correction::None);
    }

    #[test]
    fn clock_that_is_a_little_ahead_never_goes_back() {
        let ahead = -50 * MS;
        assert_eq!(
            Discipline::default().correct(Offset { ahead, error: 0 }, at(9)),
            Correction::Slew { ahead, frequency: 0 }
        );
    }

    #[test]
    fn speed_is_learnt_until_nothing_is_left_to_correct() {
        // A guest that loses 80 ppm. Each slew ends before the next look.
        let (mut clock, mut frequency, mut left) = (Discipline::default(), 0, 0);
        for look in 1..=20_u64 {
            left = (80 * FREQUENCY_OF_A_PPM - frequency) * 32_000 / FREQUENCY_OF_A_PPM;
            match clock.correct(Offset { ahead: left, error: 0 }, at(look * 32)) {
                Correction::Slew { frequency: new, .. } => frequency = new,
                Correction::None => {}
                step @ Correction::Step(_) => panic!("{step:?}"),
            }
        }
        assert!(left.abs() < 10_000, "{left} ns, {} ppm", frequency / FREQUENCY_OF_A_PPM);
    }

    #[test]
    fn reading_lies_in_the_middle_of_two() {
        assert_eq!(between(100, 1150, 200), Offset { ahead: 1000, error: 50 });
        assert_eq!(between(i64::MAX, i64::MIN, i64::MIN).error, 0);
    }
}
