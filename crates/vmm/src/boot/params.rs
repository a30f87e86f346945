//! What the kernel is told about the machine: the memory map, the command line and the initramfs.
//!
//! Start info of PVH: Xen's public/arch-x86/hvm/start_info.h. It is written as bytes at its documented offsets.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use super::BootError;
use super::initramfs::Initramfs;
use crate::layout::{BOOT_INFO, CMDLINE, HIGH_MEMORY_START, LOW_MEMORY_END, PVH_MEMMAP, PVH_MODULES};
use crate::memory::Memory;

/// A range of usable memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ram {
    address: u64,
    size: u64,
}

/// Type of usable memory.
const TYPE_RAM: u32 = 1;

/// What the guest may use: all of its memory below `end` but the hole between conventional and high memory.
pub fn memory_map(memory: &Memory, end: u64) -> Vec<Ram> {
    let mut map = vec![Ram { address: 0, size: LOW_MEMORY_END }];
    for region in memory.iter().filter(|region| region.start_addr().raw_value() < end) {
        let (start, size) = (region.start_addr().raw_value(), region.len());
        let skipped = HIGH_MEMORY_START.saturating_sub(start).min(size);
        map.push(Ram { address: start + skipped, size: size - skipped });
    }
    map
}

/// Little-endian fields in a row.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn write(&self, memory: &Memory, address: u64) -> Result<(), BootError> {
        memory.write_slice(&self.0, GuestAddress(address)).map_err(BootError::Write)
    }
}

/// Number of entries of a list that this module made; there are never more than a few.
fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Writes the start info, its memory map and its module list.
pub fn write_start_info(memory: &Memory, map: &[Ram], initramfs: Option<Initramfs>) -> Result<(), BootError> {
    const MAGIC: u32 = 0x336e_c578;
    const VERSION: u32 = 1;
    let entries = map.iter().fold(Fields::default(), |f, ram| f.u64(ram.address).u64(ram.size).u32(TYPE_RAM).u32(0));
    entries.write(memory, PVH_MEMMAP)?;
    if let Some(Initramfs { address, size }) = initramfs {
        Fields::default().u64(address).u64(size).u64(0).u64(0).write(memory, PVH_MODULES)?;
    }
    let modules = if initramfs.is_some() { PVH_MODULES } else { 0 };
    let info = Fields::default().u32(MAGIC).u32(VERSION).u32(0).u32(u32::from(initramfs.is_some()));
    let info = info.u64(modules).u64(CMDLINE).u64(0).u64(PVH_MEMMAP).u32(count(map.len())).u32(0);
    info.write(memory, BOOT_INFO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::hotplug_start;
    use crate::memory::create_memory;

    fn u32_at(memory: &Memory, address: u64) -> u32 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    fn u64_at(memory: &Memory, address: u64) -> u64 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn memory_map_leaves_out_the_bios_areas_and_the_gap() {
        let map = memory_map(&create_memory(4096, 128).unwrap(), hotplug_start(4096));
        let low = Ram { address: 0x10_0000, size: 0xbff0_0000 };
        let high = Ram { address: 0x1_0000_0000, size: 0x4000_0000 };
        assert_eq!(map, [Ram { address: 0, size: LOW_MEMORY_END }, low, high]);
    }

    #[test]
    fn start_info_points_to_its_lists() {
        let memory = create_memory(16, 0).unwrap();
        let map = memory_map(&memory, hotplug_start(16));
        write_start_info(&memory, &map, Some(Initramfs { address: 0x80_0000, size: 77 })).unwrap();
        assert_eq!(u32_at(&memory, BOOT_INFO), 0x336e_c578);
        assert_eq!(u32_at(&memory, BOOT_INFO + 12), 1);
        assert_eq!(u64_at(&memory, BOOT_INFO + 16), PVH_MODULES);
        assert_eq!(u64_at(&memory, BOOT_INFO + 24), CMDLINE);
        assert_eq!((u64_at(&memory, BOOT_INFO + 40), u32_at(&memory, BOOT_INFO + 48)), (PVH_MEMMAP, 2));
        assert_eq!((u64_at(&memory, PVH_MODULES), u64_at(&memory, PVH_MODULES + 8)), (0x80_0000, 77));
        assert_eq!(u64_at(&memory, PVH_MEMMAP + 24), 0x10_0000);
    }
}
