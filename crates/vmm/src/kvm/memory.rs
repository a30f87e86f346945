//! The guest's memory: private anonymous mappings, reserved but not allocated until the guest touches them.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::layout::{GAP_END, GAP_START};
use crate::virtio::Memory;

/// Less cannot hold a kernel and its initramfs.
const MIN_MIB: u64 = 16;
/// More than any node has; bounds the arithmetic.
const MAX_MIB: u64 = 16 << 20;

/// Maps `mib` MiB for a guest: below the gap as much as fits, the rest above 4 GiB.
pub fn create_memory(mib: u64) -> Result<Memory, MemoryError> {
    if !(MIN_MIB..=MAX_MIB).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    let ranges = ranges(mib << 20).ok_or(MemoryError::Size(mib))?;
    // Private, anonymous and MAP_NORESERVE, see `MmapRegionBuilder`.
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MemoryError::Map { mib, source })?;
    Ok(Arc::new(memory))
}

/// The regions of `bytes` of memory.
fn ranges(bytes: u64) -> Option<Vec<(GuestAddress, usize)>> {
    let low = bytes.min(GAP_START);
    let mut ranges = vec![(GuestAddress(0), usize::try_from(low).ok()?)];
    if bytes > low {
        ranges.push((GuestAddress(GAP_END), usize::try_from(bytes - low).ok()?));
    }
    Some(ranges)
}

/// The guest's memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Out of bounds.
    #[error("a guest of {0} MiB is not possible; give it {MIN_MIB} to {MAX_MIB} MiB")]
    Size(u64),
    /// mmap(2) failed.
    #[error("cannot map {mib} MiB for the guest; the host's address space or overcommit limit is too small")]
    Map {
        /// Size.
        mib: u64,
        /// Why.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_larger_than_the_gap_start_continues_above_4_gib() {
        assert_eq!(ranges(128 << 20).unwrap(), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(ranges(3 << 30).unwrap(), [(GuestAddress(0), 3 << 30)]);
        let split = ranges(5 << 30).unwrap();
        assert_eq!(split, [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for mib in [0, MIN_MIB - 1, MAX_MIB + 1, u64::MAX] {
            assert!(matches!(create_memory(mib), Err(MemoryError::Size(_))), "{mib}");
        }
    }
}
