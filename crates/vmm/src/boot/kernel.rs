//! Loads an ELF kernel and finds its entry.

use std::fs::File;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{self, KernelLoader};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryRegion};

use crate::layout::{self, Entry};
use crate::memory::Memory;

/// A kernel in the guest's memory.
#[derive(Debug)]
pub struct Kernel {
    /// Where it starts.
    pub entry: Entry,
    /// First address beyond it.
    pub end: u64,
}

/// Loads `vmlinux` to the addresses that it names. It must have a PVH entry.
pub fn load(memory: &Memory, mut vmlinux: File) -> Result<Kernel, KernelError> {
    let floor = Some(GuestAddress(layout::HIGH_MEMORY_START));
    let loaded = Elf::load(memory.as_ref(), None, &mut vmlinux, floor).map_err(KernelError::Load)?;
    let room = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    if loaded.kernel_end > room {
        // What is not in the file, the kernel clears itself; and would find no memory there.
        return Err(KernelError::Room { end: loaded.kernel_end, room });
    }
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => {
            Ok(Kernel { entry: Entry(entry.raw_value()), end: loaded.kernel_end })
        }
        _ => Err(KernelError::NoEntry),
    }
}

/// What the loader has to say, without the names of its layers.
fn reason(error: &loader::Error) -> String {
    let text = match error {
        loader::Error::Elf(error) => error.to_string(),
        other => other.to_string(),
    };
    text.trim_start_matches("Kernel Loader: ").to_lowercase()
}

/// A kernel that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The loader refused it.
    #[error(
        "cannot load the kernel, which must be an uncompressed ELF vmlinux for x86-64 that fits the guest's memory: {}",
        reason(.0)
    )]
    Load(loader::Error),
    /// No note says where PVH begins.
    #[error("the kernel has no PVH entry; build it with CONFIG_PVH=y")]
    NoEntry,
    /// It is larger in memory than in its file.
    #[error("the kernel needs memory up to {end:#x}, but the guest's ends at {room:#x}: give it more memory")]
    Room {
        /// Where it ends.
        end: u64,
        /// Where the memory does.
        room: u64,
    },
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use super::*;
    use crate::memory::create_memory;

    const LOAD: u32 = 1;
    const NOTE: u32 = 4;
    const KERNEL: u64 = 0x10_0000;

    /// struct elf64_phdr.
    fn segment(kind: u32, offset: u64, address: u64, file_size: u64, memory_size: u64) -> Vec<u8> {
        let mut bytes = [kind, 5].map(u32::to_le_bytes).concat();
        bytes.extend([offset, address, address, file_size, memory_size, 0x1000].map(u64::to_le_bytes).concat());
        bytes
    }

    /// An ELF file of these segments, with a PVH note and eight bytes of code at 0x200.
    fn elf(segments: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64
        bytes.extend([KERNEL, 64, 0].map(u64::to_le_bytes).concat());
        bytes.extend([0; 4]);
        let count = u16::try_from(segments.len()).unwrap();
        bytes.extend([64, 56, count, 0, 0, 0].map(u16::to_le_bytes).concat());
        bytes.extend(segments.concat());
        bytes.resize(0x1e0, 0);
        bytes.extend([4, 4, 18, u32::from_le_bytes(*b"Xen\0"), 0x10_0000].map(u32::to_le_bytes).concat());
        bytes.resize(0x200, 0);
        bytes.extend([0xf4; 8]);
        bytes
    }

    fn good() -> Vec<u8> {
        elf(&[segment(LOAD, 0x200, KERNEL, 8, 0x1000), segment(NOTE, 0x1e0, 0, 20, 20)])
    }

    fn try_load(memory: &Memory, bytes: &[u8]) -> Result<Kernel, KernelError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        load(memory, file)
    }

    #[test]
    fn kernel_with_a_pvh_note_is_entered_there() {
        let kernel = try_load(&create_memory(16, 0).unwrap(), &good()).unwrap();
        assert_eq!((kernel.entry, kernel.end), (Entry(KERNEL), KERNEL + 0x1000));
    }

    #[test]
    fn kernel_without_a_pvh_note_is_refused_with_the_remedy() {
        let bytes = elf(&[segment(LOAD, 0x200, KERNEL, 8, 0x1000)]);
        let error = try_load(&create_memory(16, 0).unwrap(), &bytes).unwrap_err().to_string();
        assert!(error.contains("CONFIG_PVH"), "{error}");
    }

    #[test]
    fn hostile_15_kernel_that_is_cut_off_anywhere_is_refused_or_whole() {
        let memory = create_memory(16, 0).unwrap();
        let bytes = good();
        for len in 0..bytes.len() {
            let error = try_load(&memory, &bytes[..len]).unwrap_err().to_string();
            assert!(error.starts_with("cannot load the kernel, which must be an uncompressed ELF"), "{len}: {error}");
        }
    }

    #[test]
    fn hostile_15_kernel_with_any_bit_flipped_is_loaded_into_memory_or_refused() {
        let memory = create_memory(16, 0).unwrap();
        let bytes = good();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for (offset, byte) in (0..).zip(&bytes) {
            for bit in 0..8 {
                file.seek(SeekFrom::Start(offset)).unwrap();
                file.write_all(&[byte ^ 1 << bit]).unwrap();
                if let Ok(kernel) = load(&memory, file.try_clone().unwrap()) {
                    assert!(kernel.end <= 16 << 20, "{offset:#x} {bit}");
                }
            }
            file.seek(SeekFrom::Start(offset)).unwrap();
            file.write_all(&[*byte]).unwrap();
        }
        load(&memory, file).unwrap();
    }

    #[test]
    fn hostile_15_segments_outside_of_memory_are_refused() {
        let memory = create_memory(16, 0).unwrap();
        for (offset, address, file_size, memory_size) in [
            (0x200, 16 << 20, 8, 8),
            (0x200, (16 << 20) - 4, 8, 8),
            (0x200, 1 << 40, 8, 8),
            (0x200, u64::MAX - 3, 8, 8),
            (0x200, KERNEL, 8, 16 << 20),
            (0x200, KERNEL, 8, u64::MAX),
            (0x200, KERNEL, u64::MAX, 8),
            (0x200, KERNEL, 9, 9),
            (0x208, KERNEL, 8, 8),
            (u64::MAX, KERNEL, 8, 8),
            (1 << 63, KERNEL, 8, 8),
        ] {
            let bytes = elf(&[segment(LOAD, offset, address, file_size, memory_size)]);
            let error = try_load(&memory, &bytes).unwrap_err().to_string();
            assert!(error.contains("memory"), "{address:#x} {memory_size:#x}: {error}");
        }
    }

    #[test]
    fn hostile_15_notes_that_lie_about_their_size_are_refused_or_skipped() {
        let memory = create_memory(16, 0).unwrap();
        let load_segment = segment(LOAD, 0x200, KERNEL, 8, 8);
        for (offset, size) in [(0x1e0, u64::MAX), (0x1e4, 20), (u64::MAX, 20), (0x207, 1), (0x1e0, 0), (0, 0x200)] {
            let bytes = elf(&[load_segment.clone(), segment(NOTE, offset, 0, size, size)]);
            if let Ok(kernel) = try_load(&memory, &bytes) {
                assert_eq!(kernel.end, KERNEL + 8);
            }
        }
        // Name and description of 4 GiB each.
        let mut bytes = good();
        bytes[0x1e0..0x1e8].fill(0xff);
        assert!(try_load(&memory, &bytes).is_err());
    }

    #[test]
    fn hostile_15_kernel_with_more_headers_than_bytes_is_refused() {
        let mut bytes = good();
        bytes[56..58].copy_from_slice(&u16::MAX.to_le_bytes());
        assert!(try_load(&create_memory(16, 0).unwrap(), &bytes).is_err());
    }
}
