//! The part of the memory that is not there at boot. KVM knows of a block only while a part of it is plugged, so a guest cannot
//! touch a block that it was not given. It can still touch the unplugged parts of a block that stays.
//!
//! A guest could also tell a device to read or write there. All devices share one memory mapping, and it must not have holes,
//! on which a device's copy would fault. So every block that is not attached maps the same block of the host, a decoy. Writing
//! there costs the host one block at most, and a block that is attached later shows nothing of it.
#![allow(unsafe_code)] // reason: mmap(2) over a part of the guest's memory

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::{Address, GuestAddress, GuestMemory, GuestMemoryRegion};

use super::memory_slot::{PLUGGED_MEMORY, set_slot};
use crate::layout::MEMORY_BLOCK;
use crate::memory::{Backing, Memory, discard, leave_out_of_dumps};

/// The last region of a machine's memory, as memory slots of a block each.
pub struct HotplugMemory {
    // Before `memory`, so that KVM lets go of the mapping first.
    fd: Arc<VmFd>,
    memory: Memory,
    start: u64,
    size: u64,
    /// What is mapped where no block is attached.
    decoy: OwnedFd,
}

/// What a block is backed by.
#[derive(Clone, Copy)]
enum Block {
    /// Memory of its own, zeros at first.
    Own,
    /// The decoy.
    Decoy,
}

impl HotplugMemory {
    /// The region of `memory` at `start`; `None` if there is none.
    pub(super) fn new(fd: Arc<VmFd>, memory: Memory, start: u64) -> io::Result<Option<Self>> {
        let region = memory.iter().find(|region| region.start_addr().raw_value() == start);
        let Some(size) = region.map(GuestMemoryRegion::len) else { return Ok(None) };
        let decoy = memfd_create(c"decoy", MemfdFlags::CLOEXEC)?;
        ftruncate(&decoy, MEMORY_BLOCK)?;
        let all = Self { fd, memory, start, size, decoy };
        for block in (0..size).step_by(usize::try_from(MEMORY_BLOCK).unwrap_or(usize::MAX)) {
            all.map(start + block, Block::Decoy)?;
        }
        Ok(Some(all))
    }

    /// The guest's address of a block, and KVM's number of its slot.
    fn place(&self, block: usize) -> io::Result<(u64, u32)> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let number = u32::try_from(block).map_err(|_| invalid())?;
        let offset = u64::from(number) * MEMORY_BLOCK;
        if offset >= self.size {
            return Err(invalid());
        }
        Ok((self.start + offset, PLUGGED_MEMORY.checked_add(number).ok_or_else(invalid)?))
    }

    /// Changes what the block at `address` is backed by, in one step for whoever accesses it meanwhile.
    fn map(&self, address: u64, backing: Block) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(MEMORY_BLOCK).map_err(|_| invalid())?;
        let slice = self.memory.get_slice(GuestAddress(address), len).map_err(|_| invalid())?;
        let (flags, fd) = match backing {
            Block::Own => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1),
            Block::Decoy => (libc::MAP_SHARED, self.decoy.as_raw_fd()),
        };
        let at = slice.ptr_guard_mut().as_ptr().cast();
        // SAFETY: the range is a part of the mapping that `memory` owns and stays one: it is replaced in one step by a
        // mapping of the same length and protection, and everything here accesses it as volatile memory that may change at
        // any time. The decoy is as long as a block, and nobody shortens it.
        let mapped = unsafe {
            libc::mmap(
                at,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED | libc::MAP_NORESERVE,
                fd,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // A mapping of its own, which has nothing of what the one before it was told.
        leave_out_of_dumps(&slice)
    }

    fn set_slot(&self, slot: u32, address: u64, len: u64) -> io::Result<()> {
        set_slot(&self.fd, &self.memory, slot, address, len).map_err(io::Error::other)
    }
}

impl Backing for HotplugMemory {
    fn start(&self) -> u64 {
        self.start
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn attach(&mut self, block: usize) -> io::Result<()> {
        let (address, slot) = self.place(block)?;
        let mapped = self.map(address, Block::Own);
        mapped.and_then(|()| self.set_slot(slot, address, MEMORY_BLOCK)).inspect_err(|_| {
            // Memory that nobody uses yet costs nothing, should this fail too.
            let _ = self.map(address, Block::Decoy);
        })
    }

    fn detach(&mut self, block: usize) -> io::Result<()> {
        let (address, slot) = self.place(block)?;
        // A slot of size 0 is one that is deleted (api.rst, KVM_SET_USER_MEMORY_REGION).
        self.set_slot(slot, address, 0)?;
        self.map(address, Block::Decoy)
    }

    fn discard(&mut self, address: u64, len: u64) {
        discard(&self.memory, address, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Vm;
    use crate::layout;
    use crate::memory::create_memory;
    use vm_memory::Bytes;

    /// Whether each block's mapping is left out of core dumps (proc_pid_smaps(5), VmFlags).
    fn left_out(memory: &Memory, start: u64) -> [bool; 4] {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mappings: Vec<_> = smaps.split_inclusive("VmFlags:").zip(smaps.split("VmFlags:").skip(1)).collect();
        [0, 1, 2, 3].map(|block| {
            let slice = memory.get_slice(GuestAddress(start + block * MEMORY_BLOCK), 1).unwrap();
            let address = slice.ptr_guard().as_ptr() as usize;
            let holds = |mapping: &str| {
                mapping.lines().any(|line| {
                    let range = line.split(' ').next().and_then(|range| range.split_once('-'));
                    let number = |hex| usize::from_str_radix(hex, 16);
                    range.is_some_and(|(from, to)| {
                        matches!((number(from), number(to)), (Ok(from), Ok(to)) if (from..to).contains(&address))
                    })
                })
            };
            let (_, flags) = mappings.iter().find(|(mapping, _)| holds(mapping)).unwrap();
            flags.lines().next().unwrap().split(' ').any(|flag| flag == "dd")
        })
    }

    #[test]
    fn hostile_19_memory_that_comes_and_goes_is_left_out_of_core_dumps() {
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").expect("needs a /dev/kvm");
        let (memory, start) = (create_memory(16, 512).unwrap(), layout::hotplug_start(16));
        assert_eq!(left_out(&memory, start), [true; 4], "at first");
        let vm = Vm::new(kvm.into(), memory.clone(), start).unwrap();
        let mut hotplug = vm.hotplug_memory(start).unwrap().unwrap();
        assert_eq!(left_out(&memory, start), [true; 4], "decoys");
        hotplug.attach(1).unwrap();
        hotplug.attach(2).unwrap();
        assert_eq!(left_out(&memory, start), [true; 4], "plugged");
        hotplug.detach(1).unwrap();
        assert_eq!(left_out(&memory, start), [true; 4], "unplugged");
    }

    #[test]
    fn hostile_13_what_a_device_does_to_memory_that_is_not_plugged_costs_one_block_and_is_in_no_other() {
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").expect("needs a /dev/kvm");
        let (memory, start) = (create_memory(16, 512).unwrap(), layout::hotplug_start(16));
        let vm = Vm::new(kvm.into(), memory.clone(), start).unwrap();
        let mut hotplug = vm.hotplug_memory(start).unwrap().unwrap();
        let at = |block: u64| GuestAddress(start + block * MEMORY_BLOCK);
        let read = |block| memory.read_obj::<u64>(at(block)).unwrap();
        for block in 0..4 {
            memory.write_obj(block + 1, at(block)).unwrap();
        }
        assert_eq!([0, 1, 2, 3].map(read), [4; 4], "one page for all four");
        hotplug.attach(1).unwrap();
        assert_eq!([0, 1, 2, 3].map(read), [4, 0, 4, 4], "a block that is given is empty");
        memory.write_obj(9u64, at(1)).unwrap();
        assert_eq!([0, 1].map(read), [4, 9]);
        hotplug.detach(1).unwrap();
        hotplug.attach(1).unwrap();
        assert_eq!(read(1), 0);
        assert!(hotplug.attach(4).is_err());
    }
}
