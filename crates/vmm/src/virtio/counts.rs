//! What a device has had to do with its driver, in numbers ([`bulkhead_protocol::counters`]). The device's worker counts, and the
//! main thread reads at any time: each number is right by itself, and nothing is decided by any of them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bulkhead_protocol::counters::{DeviceCounters, RequestCounters};

/// More than FUSE has opcodes. What is beyond counts as 0, which is none.
const KINDS: usize = 64;

/// The counters of one device.
pub struct Counts {
    kicks: AtomicU64,
    interrupts: AtomicU64,
    requests: [Requests; KINDS],
}

#[derive(Default)]
struct Requests {
    count: AtomicU64,
    received: AtomicU64,
    replied: AtomicU64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            kicks: AtomicU64::default(),
            interrupts: AtomicU64::default(),
            requests: std::array::from_fn(|_| Requests::default()),
        }
    }
}

impl Counts {
    /// The driver has kicked so many times.
    pub fn kicked(&self, times: u64) {
        self.kicks.fetch_add(times, Relaxed);
    }

    /// The driver was interrupted.
    pub fn interrupted(&self) {
        self.interrupts.fetch_add(1, Relaxed);
    }

    /// A request of this kind had so many bytes, and the reply so many.
    pub fn request(&self, kind: u32, received: usize, replied: usize) {
        let kind = usize::try_from(kind).ok().filter(|kind| *kind < KINDS).unwrap_or(0);
        let Some(requests) = self.requests.get(kind) else { return };
        requests.count.fetch_add(1, Relaxed);
        requests.received.fetch_add(received as u64, Relaxed);
        requests.replied.fetch_add(replied as u64, Relaxed);
    }

    /// The numbers as they are now, for the device of this ID in this slot.
    pub fn told(&self, slot: u8, device: u32) -> DeviceCounters {
        let requests = (0u32..).zip(&self.requests).map(|(kind, requests)| RequestCounters {
            kind,
            count: requests.count.load(Relaxed),
            received: requests.received.load(Relaxed),
            replied: requests.replied.load(Relaxed),
        });
        DeviceCounters {
            slot,
            device,
            kicks: self.kicks.load(Relaxed),
            interrupts: self.interrupts.load(Relaxed),
            requests: requests.filter(|requests| requests.count > 0).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_by_kind_and_unknown_kinds_as_none() {
        let counts = Counts::default();
        counts.kicked(3);
        counts.interrupted();
        for kind in [1, 1, 64, u32::MAX] {
            counts.request(kind, 10, 20);
        }
        let told = counts.told(7, 26);
        let request = |kind| RequestCounters { kind, count: 2, received: 20, replied: 40 };
        let expected =
            DeviceCounters { slot: 7, device: 26, kicks: 3, interrupts: 1, requests: vec![request(0), request(1)] };
        assert_eq!(told, expected);
    }
}
