//! Places the initramfs: as high as it fits below the gap, so that the kernel below it can grow.

use std::fs::File;
use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryRegion};

use crate::memory::Memory;

/// Linux moves an initramfs that is not page-aligned.
const ALIGN: u64 = 0x1000;

/// Where the initramfs is.
#[derive(Clone, Copy, Debug)]
pub struct Initramfs {
    /// Guest-physical address.
    pub address: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Copies the file to the end of the first memory region, above `floor`.
pub fn load(memory: &Memory, mut file: File, floor: u64) -> Result<Initramfs, InitramfsError> {
    let size = file.metadata().map_err(InitramfsError::Stat)?.len();
    let end = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let too_large = InitramfsError::TooLarge { size, room: end.saturating_sub(floor) };
    let address = match end.checked_sub(size).map(|address| address & !(ALIGN - 1)) {
        Some(address) if address >= floor => address,
        _ => return Err(too_large),
    };
    let count = usize::try_from(size).map_err(|_| too_large)?;
    io::Seek::rewind(&mut file).map_err(InitramfsError::Stat)?;
    memory.read_exact_volatile_from(GuestAddress(address), &mut file, count).map_err(InitramfsError::Read)?;
    Ok(Initramfs { address, size })
}

/// An initramfs that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// It does not fit.
    #[error(
        "initramfs of {size} bytes does not fit; the guest's memory has room for {room} beside the kernel: give it more memory"
    )]
    TooLarge {
        /// Its size.
        size: u64,
        /// Room in bytes.
        room: u64,
    },
    /// Not a regular file, perhaps.
    #[error("cannot tell the initramfs's size; is it a regular file?")]
    Stat(#[source] io::Error),
    /// It could not be read as far as its size.
    #[error("cannot read the initramfs into the guest's memory")]
    Read(#[source] GuestMemoryError),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::create_memory;
    use std::io::Write;

    fn file(size: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; size]).unwrap();
        file
    }

    #[test]
    fn initramfs_ends_up_page_aligned_below_the_end() {
        let memory = create_memory(16, 0).unwrap();
        let placed = load(&memory, file(0x1001), 0x20_0000).unwrap();
        assert_eq!((placed.address, placed.size), ((16 << 20) - 0x2000, 0x1001));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(placed.address + 0x1000)).unwrap(), 7);
    }

    #[test]
    fn hostile_15_initramfs_larger_than_the_room_is_refused() {
        let memory = create_memory(16, 0).unwrap();
        assert!(matches!(load(&memory, file(0x1001), (16 << 20) - 0x1000), Err(InitramfsError::TooLarge { .. })));
        assert!(matches!(load(&memory, file(17 << 20), 0), Err(InitramfsError::TooLarge { .. })));
    }

    #[test]
    fn hostile_15_initramfs_that_is_no_file_or_claims_more_than_it_has_is_refused() {
        let memory = create_memory(16, 0).unwrap();
        // Larger than any memory, without a byte in it.
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(1 << 42).unwrap();
        assert!(matches!(load(&memory, sparse, 0), Err(InitramfsError::TooLarge { .. })));
        assert!(load(&memory, File::open("/").unwrap(), 0).is_err());
        // Not open for reading.
        let write_only = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(write_only.path(), "x").unwrap();
        let write_only = File::options().write(true).open(write_only.path()).unwrap();
        assert!(matches!(load(&memory, write_only, 0), Err(InitramfsError::Read(_))));
        assert!(matches!(load(&memory, file(1), u64::MAX), Err(InitramfsError::TooLarge { .. })));
        // Nothing is little, but no error.
        assert_eq!(load(&memory, file(0), 0).unwrap().size, 0);
    }
}
