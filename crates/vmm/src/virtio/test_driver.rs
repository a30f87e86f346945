//! A driver for the tests of devices: memory, one ring, and an interrupt that remembers.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, Interrupt, Memory};

pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;
const MEMORY_SIZE: usize = 1 << 20;

/// The driver's side of one queue.
pub struct Driver {
    memory: Memory,
    size: u16,
    next_descriptor: AtomicU16,
}

/// A buffer of a chain.
#[derive(Clone, Copy)]
pub struct Buffer {
    address: u64,
    len: u32,
    flags: u32,
}

impl Driver {
    pub fn new(size: u16) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap();
        Self { memory: Arc::new(memory), size, next_descriptor: AtomicU16::new(0) }
    }

    pub fn memory(&self) -> Memory {
        self.memory.clone()
    }

    pub fn readable(&self, address: u64, len: u32) -> Buffer {
        Buffer { address, len, flags: 0 }
    }

    pub fn writable(&self, address: u64, len: u32) -> Buffer {
        Buffer { address, len, flags: VRING_DESC_F_WRITE }
    }

    /// Makes a chain of the buffers available.
    pub fn add(&self, buffers: &[Buffer]) {
        let head = self.next_descriptor.load(Ordering::SeqCst);
        for (i, buffer) in buffers.iter().enumerate() {
            let index = self.next_descriptor.fetch_add(1, Ordering::SeqCst);
            let next = if i + 1 < buffers.len() { VRING_DESC_F_NEXT } else { 0 };
            self.write_descriptor(index, *buffer, next, index + 1);
        }
        self.make_available(head);
    }

    pub fn write_descriptor(&self, index: u16, buffer: Buffer, flags: u32, next: u16) {
        let flags = u16::try_from(buffer.flags | flags).unwrap();
        let descriptor = RawDescriptor::from(Descriptor::new(buffer.address, buffer.len, flags, next));
        self.memory.write_obj(descriptor, GuestAddress(DESCRIPTORS + 16 * u64::from(index))).unwrap();
    }

    pub fn make_available(&self, head: u16) {
        let index: u16 = self.memory.read_obj(GuestAddress(AVAILABLE + 2)).unwrap();
        let slot = u64::from(index % self.size);
        self.memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * slot)).unwrap();
        self.set_avail_index(index.wrapping_add(1));
    }

    pub fn set_avail_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    /// The queue as the device gets it, from its start.
    pub fn queue(&self) -> ActiveQueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(DESCRIPTORS)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        ActiveQueue { queue, kick: EventFd::new(EFD_NONBLOCK).unwrap() }
    }

    /// Head and length of each used chain.
    pub fn used(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let element = |i| GuestAddress(USED + 4 + 8 * u64::from(i));
        (0..count)
            .map(|i| {
                let at = element(i);
                let len = GuestAddress(at.0 + 4);
                (self.memory.read_obj(at).unwrap(), self.memory.read_obj(len).unwrap())
            })
            .collect()
    }
}

/// An interrupt that remembers.
#[derive(Default)]
pub struct RecordingInterrupt {
    queues: Mutex<Vec<u16>>,
    config_changes: AtomicUsize,
    needs_reset: AtomicBool,
}

impl RecordingInterrupt {
    pub fn queues(&self) -> Vec<u16> {
        self.queues.lock().unwrap().clone()
    }

    pub fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }
}

impl Interrupt for RecordingInterrupt {
    fn notify_queue(&self, index: u16) {
        self.queues.lock().unwrap().push(index);
    }

    fn notify_config(&self) {
        self.config_changes.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }
}
