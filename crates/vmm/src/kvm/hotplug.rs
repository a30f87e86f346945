//! The part of the memory that is not there at boot: KVM knows of a block of it only while something in it is plugged, so
//! that a guest has nothing there that it was not given.

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};

use super::{discard, set_slot};
use crate::layout::MEMORY_BLOCK;
use crate::virtio::Memory;
use crate::virtio::mem::Backing;

/// The last region of a machine's memory, as memory slots of a block each.
pub struct HotplugMemory {
    // Before `memory`, so that KVM lets go of the mapping first.
    fd: Arc<VmFd>,
    memory: Memory,
    /// KVM's number of the first block.
    first_slot: u32,
    start: u64,
    size: u64,
}

impl HotplugMemory {
    /// The region of `memory` at `start`; `None` if there is none. `first_slot` and those after it are not in use.
    pub(super) fn new(fd: Arc<VmFd>, memory: Memory, first_slot: u32, start: u64) -> Option<Self> {
        let size = memory.iter().find(|region| region.start_addr().raw_value() == start)?.len();
        Some(Self { fd, memory, first_slot, start, size })
    }

    fn set(&self, block: usize, len: u64) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let number = u32::try_from(block).map_err(|_| invalid())?;
        let address = u64::from(number) * MEMORY_BLOCK;
        if address >= self.size {
            return Err(invalid());
        }
        let slot = self.first_slot.checked_add(number).ok_or_else(invalid)?;
        set_slot(&self.fd, &self.memory, slot, self.start + address, len).map_err(io::Error::other)
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
        self.set(block, MEMORY_BLOCK)
    }

    fn detach(&mut self, block: usize) -> io::Result<()> {
        // A slot of size 0 is one that is deleted (api.rst, KVM_SET_USER_MEMORY_REGION).
        self.set(block, 0)
    }

    fn discard(&mut self, address: u64, len: u64) {
        discard(&self.memory, address, len);
    }
}
