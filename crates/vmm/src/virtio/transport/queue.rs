//! A queue's registers, and the check that turns them into a queue that a device may work on.

use virtio_bindings::virtio_ring::{VRING_AVAIL_ALIGN_SIZE, VRING_DESC_ALIGN_SIZE, VRING_USED_ALIGN_SIZE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory};

use crate::memory::Memory;

/// What the driver has written for one queue. Nothing is judged before the device starts.
#[derive(Clone, Copy, Default)]
pub struct QueueRegisters {
    /// QueueNum.
    pub size: u32,
    /// QueueReady.
    pub ready: bool,
    /// QueueDesc.
    pub descriptors: u64,
    /// QueueDriver.
    pub available: u64,
    /// QueueDevice.
    pub used: u64,
}

/// Why a queue cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// Section 2.7: a power of two, at most QueueNumMax.
    #[error("size {0} is not a power of two up to the device's maximum")]
    Size(u32),
    /// Section 2.7: 16, 2 and 4 bytes.
    #[error("a ring at {0:#x} is not aligned")]
    Alignment(u64),
    /// Not in the guest's memory as a whole.
    #[error("a ring at {0:#x} is not in memory")]
    Address(u64),
    /// Two parts of the queue share memory.
    #[error("rings overlap")]
    Overlap,
}

/// A part of a queue in memory.
#[derive(Clone, Copy)]
struct Part {
    address: u64,
    len: u64,
    align: u32,
}

impl QueueRegisters {
    /// Checks everything and makes the queue.
    pub fn to_queue(self, max_size: u16, memory: &Memory, event_idx: bool) -> Result<Queue, QueueError> {
        let size = u16::try_from(self.size)
            .ok()
            .filter(|size| size.is_power_of_two() && *size <= max_size)
            .ok_or(QueueError::Size(self.size))?;
        self.check_parts(u64::from(size), memory)?;
        let mut queue = Queue::new(max_size).map_err(|_| QueueError::Size(self.size))?;
        queue.try_set_size(size).map_err(|_| QueueError::Size(self.size))?;
        let misaligned = |_| QueueError::Alignment(self.descriptors);
        queue.try_set_desc_table_address(GuestAddress(self.descriptors)).map_err(misaligned)?;
        queue.try_set_avail_ring_address(GuestAddress(self.available)).map_err(misaligned)?;
        queue.try_set_used_ring_address(GuestAddress(self.used)).map_err(misaligned)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(memory.as_ref()) {
            return Err(QueueError::Address(self.descriptors));
        }
        Ok(queue)
    }

    /// Table 2.7: alignment and size of each part.
    fn check_parts(self, size: u64, memory: &Memory) -> Result<(), QueueError> {
        let parts = [
            Part { address: self.descriptors, len: 16 * size, align: VRING_DESC_ALIGN_SIZE },
            Part { address: self.available, len: 6 + 2 * size, align: VRING_AVAIL_ALIGN_SIZE },
            Part { address: self.used, len: 6 + 8 * size, align: VRING_USED_ALIGN_SIZE },
        ];
        for part in parts {
            if part.address % u64::from(part.align) != 0 {
                return Err(QueueError::Alignment(part.address));
            }
            // Address 0 is what a driver leaves that has not set it; no Linux puts a ring there.
            let len = usize::try_from(part.len).map_err(|_| QueueError::Address(part.address))?;
            if part.address == 0 || !memory.check_range(GuestAddress(part.address), len) {
                return Err(QueueError::Address(part.address));
            }
        }
        let overlap = |a: Part, b: Part| a.address < b.address + b.len && b.address < a.address + a.len;
        let [descriptors, available, used] = parts;
        if overlap(descriptors, available) || overlap(descriptors, used) || overlap(available, used) {
            return Err(QueueError::Overlap);
        }
        Ok(())
    }
}
