//! What a guest can cause, bounded in number; log lines above all: a hostile guest must not be able to fill the host's log.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines from one place, or whatever else is limited, in one [`PERIOD`].
const BURST: u32 = 5;
/// Long enough that a guest that does nothing else writes a few lines a minute.
const PERIOD: Duration = Duration::from_secs(60);

/// Limits the lines from one place in the code, or something else; see [`guest_log`](crate::guest_log).
pub struct RateLimit {
    state: Mutex<Option<Window>>,
}

struct Window {
    since: Instant,
    written: u32,
    dropped: u64,
}

impl RateLimit {
    /// A limit that has seen nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { state: Mutex::new(None) }
    }

    /// Whether a line may be written now, or whatever it is; if so, how many were dropped since the last one.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let window = state.get_or_insert(Window { since: now, written: 0, dropped: 0 });
        if now.saturating_duration_since(window.since) >= PERIOD {
            window.since = now;
            window.written = 0;
        }
        if window.written == BURST {
            window.dropped = window.dropped.saturating_add(1);
            return None;
        }
        window.written += 1;
        Some(std::mem::take(&mut window.dropped))
    }

    /// Writes a line to standard error if the limit admits it.
    pub fn log(&self, line: fmt::Arguments<'_>) {
        match self.admit(Instant::now()) {
            Some(0) => crate::vmm_log!("guest: {line}"),
            Some(dropped) => crate::vmm_log!("guest: {line} ({dropped} lines like this were dropped)"),
            None => {}
        }
    }
}

impl Default for RateLimit {
    fn default() -> Self {
        Self::new()
    }
}

/// Logs something that the guest caused, with a rate limit for this place in the code.
#[macro_export]
macro_rules! guest_log {
    ($($arg:tt)*) => {{
        static LIMIT: $crate::ratelimit::RateLimit = $crate::ratelimit::RateLimit::new();
        LIMIT.log(format_args!($($arg)*));
    }};
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn hostile_14_flood_of_log_lines_is_cut_off_and_counted() {
        let limit = RateLimit::new();
        let start = Instant::now();
        let admitted = (0..100).filter(|_| limit.admit(start).is_some()).count();
        assert_eq!(admitted, BURST as usize);
        assert_eq!(limit.admit(start + PERIOD), Some(100 - u64::from(BURST)));
        assert_eq!(limit.admit(start + PERIOD), Some(0));
    }

    #[test]
    fn hostile_14_day_of_flood_is_bounded_by_the_minute() {
        let limit = RateLimit::new();
        let start = Instant::now();
        // A line every 10 ms.
        let day = (0..8_640_000_u64).map(|i| start + Duration::from_millis(10 * i));
        let admitted = day.filter(|now| limit.admit(*now).is_some()).count();
        assert_eq!(admitted, BURST as usize * 24 * 60);
    }

    /// What runs for the guest writes to the log by `guest_log!` alone, or the limit would be none.
    #[test]
    fn hostile_14_devices_and_buses_log_with_a_limit_only() {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut left =
            vec![source.join("virtio"), source.join("bus.rs"), source.join("legacy.rs"), source.join("kvm/cpuid.rs")];
        let mut seen = 0;
        while let Some(path) = left.pop() {
            if path.is_dir() {
                left.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
            } else if !path.components().any(|part| {
                ["tests", "tests.rs", "hostile", "hostile.rs"].contains(&part.as_os_str().to_str().unwrap())
            }) {
                let text = std::fs::read_to_string(&path).unwrap();
                let found =
                    ["println!", "print!", "dbg!", "stderr()", "vmm_log!"].into_iter().find(|word| text.contains(word));
                assert_eq!(found, None, "{path:?}");
                seen += 1;
            }
        }
        assert!(seen > 30);
    }
}
