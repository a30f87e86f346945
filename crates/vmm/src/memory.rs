//! The guest's memory: private anonymous mappings, reserved but not allocated until the guest touches them, and given
//! back to the host where the guest has no more use for them. Loader, KVM and devices stand on this, and know each other no
//! further.
#![allow(unsafe_code)] // reason: madvise(2)

use std::io;
use std::sync::Arc;

use bulkhead_protocol::vmspec::HOTPLUG_UNIT_MIB;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

use crate::layout::{self, GAP_END, GAP_START};

/// The guest's memory. Regions never move or vanish while the machine runs.
pub type Memory = Arc<GuestMemoryMmap>;

/// Memory that comes and goes while the machine runs: where it is, and how.
pub trait Backing: Send {
    /// Guest-physical address of the region, a multiple of [`MEMORY_BLOCK`](crate::layout::MEMORY_BLOCK).
    fn start(&self) -> u64;

    /// Size of the region in bytes, a multiple of the same.
    fn size(&self) -> u64;

    /// Gives the guest the memory block with this number.
    fn attach(&mut self, block: usize) -> io::Result<()>;

    /// Takes it away.
    fn detach(&mut self, block: usize) -> io::Result<()>;

    /// Gives a range of guest-physical memory back to the host; it reads as zeros if the guest ever gets it again.
    fn discard(&mut self, address: u64, len: u64);
}

/// Memory that a guest can only read. It is none of [`Memory`]'s; when it is dropped the guest has it no more.
pub trait ImageRegion: Send {
    /// Guest-physical address, a multiple of [`MEMORY_BLOCK`](crate::layout::MEMORY_BLOCK).
    fn start(&self) -> u64;

    /// Size in bytes, a multiple of [`DEVICE_ALIGN`](bulkhead_protocol::images::DEVICE_ALIGN).
    fn size(&self) -> u64;
}

/// Less cannot hold a kernel and its initramfs.
const MIN_MIB: u64 = 16;
/// More than any node has; bounds the arithmetic.
const MAX_MIB: u64 = 16 << 20;

/// Maps `mib` MiB for a guest: below the gap as much as fits, the rest above 4 GiB. Behind that comes what can be plugged
/// into it, which costs nothing before.
pub fn create_memory(mib: u64, hotplug_mib: u64) -> Result<Memory, MemoryError> {
    if !(MIN_MIB..=MAX_MIB).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    if hotplug_mib > MAX_MIB || !hotplug_mib.is_multiple_of(HOTPLUG_UNIT_MIB) {
        return Err(MemoryError::Hotplug(hotplug_mib));
    }
    let mut ranges = ranges(mib << 20).ok_or(MemoryError::Size(mib))?;
    if hotplug_mib > 0 {
        let bytes = usize::try_from(hotplug_mib << 20).map_err(|_| MemoryError::Hotplug(hotplug_mib))?;
        ranges.push((GuestAddress(layout::hotplug_start(mib)), bytes));
    }
    // Private, anonymous and MAP_NORESERVE, see `MmapRegionBuilder`.
    let memory = GuestMemoryMmap::from_ranges(&ranges).map_err(|source| MemoryError::Map { mib, source })?;
    for region in memory.iter() {
        let whole = region.as_volatile_slice().map_err(io::Error::other);
        whole.and_then(|slice| leave_out_of_dumps(&slice)).map_err(MemoryError::Undumped)?;
    }
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

/// No core dump of the VMM holds these pages (madvise(2), MADV_DONTDUMP), whatever the host makes of a process that crashes.
pub fn leave_out_of_dumps(memory: &VolatileSlice<'_>) -> io::Result<()> {
    // SAFETY: whoever has the slice keeps the range mapped, and this changes neither what is there nor who may access it.
    match unsafe { libc::madvise(memory.ptr_guard_mut().as_ptr().cast(), memory.len(), libc::MADV_DONTDUMP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the pages of a range back to the host; the guest reads zeros there from then on (madvise(2), MADV_DONTNEED).
/// `false` if the range is not whole pages of one region, and then nothing has happened.
pub fn discard(memory: &GuestMemoryMmap, address: u64, len: u64) -> bool {
    const PAGE: u64 = 4096;
    if !address.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
        return false;
    }
    let Ok(size) = usize::try_from(len) else { return false };
    let Ok(slice) = memory.get_slice(GuestAddress(address), size) else { return false };
    // SAFETY: the range is in a private anonymous mapping that `memory` owns, which everything here accesses as volatile
    // memory that may change at any time; it stays mapped.
    unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), size, libc::MADV_DONTNEED) == 0 }
}

/// The guest's memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Out of bounds.
    #[error("a guest of {0} MiB is not possible; give it {MIN_MIB} to {MAX_MIB} MiB")]
    Size(u64),
    /// Not whole memory blocks, or out of bounds.
    #[error("{0} MiB to plug is not possible; give a multiple of {HOTPLUG_UNIT_MIB} MiB up to {MAX_MIB}")]
    Hotplug(u64),
    /// mmap(2) failed.
    #[error("cannot map {mib} MiB for the guest; the host's address space or overcommit limit is too small")]
    Map {
        /// Size.
        mib: u64,
        /// Why.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    /// madvise(2) failed.
    #[error("cannot leave the guest's memory out of core dumps")]
    Undumped(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

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
            assert!(matches!(create_memory(mib, 0), Err(MemoryError::Size(_))), "{mib}");
        }
        assert!(matches!(create_memory(16, 100), Err(MemoryError::Hotplug(100))));
    }

    #[test]
    fn discarded_memory_reads_as_zeros_and_what_is_no_memory_is_left_alone() {
        let memory = create_memory(16, 128).unwrap();
        let start = layout::hotplug_start(16);
        for address in [0x1000, start] {
            memory.write_obj(7u64, GuestAddress(address)).unwrap();
            assert!(discard(&memory, address, 0x1000));
            assert_eq!(memory.read_obj::<u64>(GuestAddress(address)).unwrap(), 0);
        }
        for (address, len) in [(1, 4096), (0, 1), (15 << 20, 2 << 20), (1 << 30, 4096), (u64::MAX - 4095, 4096)] {
            assert!(!discard(&memory, address, len), "{address:#x}");
        }
    }
}
