//! Address ranges to devices, for the exits of a vCPU: one bus for memory-mapped and one for port I/O.
//!
//! A bus is filled before the first vCPU runs and never changes afterwards, so a look-up takes no lock; each device has
//! one of its own. Accesses that no device answers read as all ones and are dropped when they write, as on a PC.

use std::sync::{Arc, Mutex, PoisonError};

/// A device on a bus. Called on a vCPU's thread: must not block.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `offset`. `data` is zero on entry.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Writes `data.len()` bytes (1, 2, 4 or 8) at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Devices by address.
#[derive(Default)]
pub struct Bus {
    /// Sorted, disjoint.
    ranges: Vec<Range>,
}

struct Range {
    base: u64,
    last: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

impl Bus {
    /// A bus without devices.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `len` bytes from `base`.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|more| base.checked_add(more)).ok_or(BusError::Range { base, len })?;
        let at = self.ranges.partition_point(|range| range.base < base);
        let before = at.checked_sub(1).and_then(|i| self.ranges.get(i));
        let after = self.ranges.get(at);
        if before.is_some_and(|r| r.last >= base) || after.is_some_and(|r| r.base <= last) {
            return Err(BusError::Overlap { base, len });
        }
        self.ranges.insert(at, Range { base, last, device });
        Ok(())
    }

    /// Reads from the device at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                data.fill(0);
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    /// The device that has all `len` bytes at `address`; an access across an edge belongs to nobody.
    fn find(&self, address: u64, len: usize) -> Option<(&Mutex<dyn BusDevice>, u64)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let at = self.ranges.partition_point(|range| range.base <= address).checked_sub(1)?;
        let range = self.ranges.get(at)?;
        (last <= range.last).then(|| (range.device.as_ref(), address - range.base))
    }
}

/// A range that cannot be on the bus.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// It is empty or wraps.
    #[error("bus range of {len:#x} bytes at {base:#x} is empty or wraps around")]
    Range {
        /// Start.
        base: u64,
        /// Length.
        len: u64,
    },
    /// It overlaps one that is there.
    #[error("bus range of {len:#x} bytes at {base:#x} overlaps another device's")]
    Overlap {
        /// Start.
        base: u64,
        /// Length.
        len: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Probe {
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data[0] = u8::try_from(offset).unwrap();
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.writes.push((offset, data.to_vec()));
        }
    }

    fn bus() -> (Bus, Arc<Mutex<Probe>>) {
        let probe = Arc::new(Mutex::new(Probe::default()));
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x100, probe.clone()).unwrap();
        bus.insert(0x3000, 0x100, Arc::new(Mutex::new(Probe::default()))).unwrap();
        (bus, probe)
    }

    #[test]
    fn access_inside_reaches_the_device() {
        let (bus, probe) = bus();
        let mut data = [0xaa; 4];
        bus.read(0x1010, &mut data);
        assert_eq!(data, [0x10, 0, 0, 0]);
        bus.write(0x10fc, &[1, 2, 3, 4]);
        assert_eq!(probe.lock().unwrap().writes, [(0xfc, vec![1, 2, 3, 4])]);
    }

    #[test]
    fn hostile_02_access_outside_reads_ones_and_writes_nothing() {
        let (bus, probe) = bus();
        for address in [0, 0xfff, 0x10fe, 0x1100, 0x2000, 0x4000, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "at {address:#x}");
            bus.write(address, &[0; 4]);
        }
        bus.read(0x1000, &mut []);
        assert!(probe.lock().unwrap().writes.is_empty());
    }

    #[test]
    fn overlapping_range_is_refused() {
        let (mut bus, probe) = bus();
        for (base, len) in [(0x1000, 1), (0x10ff, 1), (0xfff, 2), (0x2000, 0x1001), (0, 0x10000)] {
            assert!(matches!(bus.insert(base, len, probe.clone()), Err(BusError::Overlap { .. })), "{base:#x}");
        }
        assert!(matches!(bus.insert(0x2000, 0, probe.clone()), Err(BusError::Range { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, probe.clone()), Err(BusError::Range { .. })));
        bus.insert(0x2000, 0x1000, probe).unwrap();
    }
}
