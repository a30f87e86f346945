//! What the kernel is told about the machine: the memory map, the command line and the initramfs.
//!
//! Start info of PVH: Xen's public/arch-x86/hvm/start_info.h. Boot parameters of the 64-bit entry:
//! Documentation/arch/x86/zero-page.rst and boot.rst. Both are written as bytes at their documented offsets.

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

/// E820 and PVH type of usable memory.
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
pub fn write_pvh(memory: &Memory, map: &[Ram], initramfs: Option<Initramfs>) -> Result<(), BootError> {
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

/// Writes the "zero page".
pub fn write_boot_params(
    memory: &Memory,
    map: &[Ram],
    initramfs: Option<Initramfs>,
    cmdline_len: usize,
) -> Result<(), BootError> {
    /// Offset of `e820_table`.
    const E820_TABLE: u64 = 0x2d0;
    /// A loader without an id of its own.
    const LOADER_UNDEFINED: u8 = 0xff;
    let put = |offset: u64, bytes: &[u8]| {
        memory.write_slice(bytes, GuestAddress(BOOT_INFO + offset)).map_err(BootError::Write)
    };
    put(0, &[0; 0x1000])?;
    put(0x1e8, &[u8::try_from(map.len()).unwrap_or(u8::MAX)])?;
    put(0x1fe, &0xaa55_u16.to_le_bytes())?;
    put(0x202, b"HdrS")?;
    put(0x206, &0x20c_u16.to_le_bytes())?; // boot protocol 2.12
    put(0x210, &[LOADER_UNDEFINED])?;
    if let Some(Initramfs { address, size }) = initramfs {
        // Below 4 GiB, since the first region ends at the gap.
        put(0x218, &u32::try_from(address).unwrap_or(0).to_le_bytes())?;
        put(0x21c, &u32::try_from(size).unwrap_or(0).to_le_bytes())?;
    }
    put(0x228, &u32::try_from(CMDLINE).unwrap_or(0).to_le_bytes())?;
    put(0x238, &count(cmdline_len).to_le_bytes())?;
    let table = map.iter().fold(Fields::default(), |f, ram| f.u64(ram.address).u64(ram.size).u32(TYPE_RAM));
    table.write(memory, BOOT_INFO + E820_TABLE)
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
        write_pvh(&memory, &map, Some(Initramfs { address: 0x80_0000, size: 77 })).unwrap();
        assert_eq!(u32_at(&memory, BOOT_INFO), 0x336e_c578);
        assert_eq!(u32_at(&memory, BOOT_INFO + 12), 1);
        assert_eq!(u64_at(&memory, BOOT_INFO + 16), PVH_MODULES);
        assert_eq!(u64_at(&memory, BOOT_INFO + 24), CMDLINE);
        assert_eq!((u64_at(&memory, BOOT_INFO + 40), u32_at(&memory, BOOT_INFO + 48)), (PVH_MEMMAP, 2));
        assert_eq!((u64_at(&memory, PVH_MODULES), u64_at(&memory, PVH_MODULES + 8)), (0x80_0000, 77));
        assert_eq!(u64_at(&memory, PVH_MEMMAP + 24), 0x10_0000);
    }

    #[test]
    fn boot_params_have_signature_and_map() {
        let memory = create_memory(16, 0).unwrap();
        let map = memory_map(&memory, hotplug_start(16));
        write_boot_params(&memory, &map, None, 9).unwrap();
        assert_eq!(u32_at(&memory, BOOT_INFO + 0x202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!(u32_at(&memory, BOOT_INFO + 0x238), 9);
        assert_eq!(u64_at(&memory, BOOT_INFO + 0x2d0 + 20), 0x10_0000);
    }
}
