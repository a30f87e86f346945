//! The driver's side of a virtqueue, and an interrupt to wait for, for the devices' tests and the fuzz targets.
#![allow(clippy::unwrap_used)] // reason: what fails here has failed the test

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::ring::event_fd;
use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::memory::Memory;

/// Far more than any step of a test takes; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

/// Descriptor flag: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag: for the device to write.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// 16 MiB of guest memory.
pub fn memory() -> Memory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap())
}

/// Waits for the end of a device's reset, as a driver does that reads the status until it is 0.
pub fn wait_stopped(device: &dyn VirtioDevice) {
    let begin = Instant::now();
    while !device.is_stopped() {
        assert!(begin.elapsed() < PATIENCE, "the device does not stop");
        std::thread::yield_now();
    }
}

/// Sets a flag that a second thread looks at when the test is through, or has failed.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Counts interrupts.
#[derive(Default)]
pub struct TestInterrupt {
    state: Mutex<(Vec<u16>, bool)>,
    changed: Condvar,
}

impl TestInterrupt {
    /// Waits until `done` has a result; looks again after every interrupt.
    pub fn wait<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(value) = done() {
                return value;
            }
            let (next, timeout) = self.changed.wait_timeout(state, PATIENCE).unwrap();
            assert!(!timeout.timed_out(), "no interrupt came");
            state = next;
        }
    }

    /// Waits for DEVICE_NEEDS_RESET.
    pub fn wait_reset(&self) {
        let mut state = self.state.lock().unwrap();
        while !state.1 {
            let (next, timeout) = self.changed.wait_timeout(state, PATIENCE).unwrap();
            assert!(!timeout.timed_out(), "device did not ask for a reset");
            state = next;
        }
    }

    /// Waits until `done` has a result, or for DEVICE_NEEDS_RESET, which makes it `None`.
    pub fn wait_or_reset<T>(&self, mut done: impl FnMut() -> Option<T>) -> Option<T> {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(value) = done() {
                return Some(value);
            }
            if state.1 {
                return None;
            }
            let (next, timeout) = self.changed.wait_timeout(state, PATIENCE).unwrap();
            assert!(!timeout.timed_out(), "neither an interrupt nor a wish for a reset came");
            state = next;
        }
    }

    /// Interrupts of a queue so far.
    pub fn count(&self, index: u16) -> usize {
        self.state.lock().unwrap().0.iter().filter(|i| **i == index).count()
    }
}

impl Interrupt for TestInterrupt {
    fn notify_queue(&self, index: u16) {
        self.state.lock().unwrap().0.push(index);
        self.changed.notify_all();
    }

    fn notify_config(&self) {}

    fn needs_reset(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

/// A virtqueue as its driver has it. Rings at `base`, descriptors handed out in a circle.
pub struct DriverQueue {
    memory: Memory,
    base: u64,
    size: u16,
    kick: EventFd,
    next_descriptor: u16,
    avail: u16,
    used: u16,
    event_idx: bool,
}

impl DriverQueue {
    /// A queue of `size` without descriptors.
    pub fn new(memory: &Memory, base: u64, size: u16) -> Self {
        memory.write_slice(&vec![0; 0x4000], GuestAddress(base)).unwrap();
        let kick = event_fd().unwrap();
        Self { memory: memory.clone(), base, size, kick, next_descriptor: 0, avail: 0, used: 0, event_idx: false }
    }

    /// With VIRTIO_RING_F_EVENT_IDX.
    #[must_use]
    pub fn with_event_idx(mut self) -> Self {
        self.event_idx = true;
        self
    }

    /// The guest memory that it is in.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The same queue in the hands of a second thread.
    pub fn twin(&self) -> Self {
        Self { memory: self.memory.clone(), kick: self.kick.try_clone().unwrap(), ..*self }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 0x2000
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x3000
    }

    /// The descriptor that [`Self::add`] takes next.
    pub fn next_descriptor(&self) -> u16 {
        self.next_descriptor
    }

    /// The device's side.
    pub fn active(&self) -> Option<ActiveQueue> {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(self.base), Some(0));
        queue.set_avail_ring_address(low(self.avail_ring()), Some(0));
        queue.set_used_ring_address(low(self.used_ring()), Some(0));
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        Some(ActiveQueue { queue, kick: self.kick.try_clone().unwrap() })
    }

    /// Writes a descriptor.
    pub fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(self.base + 16 * u64::from(index));
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Makes a chain of (address, length, writable) available; its head.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_descriptor;
        for (i, (address, len, write)) in buffers.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let next = if i + 1 < buffers.len() { NEXT } else { 0 };
            let flags = next | if *write { WRITE } else { 0 };
            self.descriptor(index, *address, *len, flags, self.next_descriptor);
        }
        self.offer(head);
        head
    }

    /// Makes whatever is at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }

    /// Sets the available index.
    pub fn set_avail(&mut self, index: u16) {
        self.avail = index;
        let at = GuestAddress(self.avail_ring() + 2);
        self.memory.store(index.to_le(), at, Ordering::Release).unwrap();
    }

    /// Notifies the device.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// The next chain that the device returned: head and bytes written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let at = GuestAddress(self.used_ring() + 2);
        let index: u16 = self.memory.load(at, Ordering::Acquire).unwrap();
        if index == self.used {
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        if self.event_idx {
            let event = GuestAddress(self.avail_ring() + 4 + 2 * u64::from(self.size));
            self.memory.write_obj(self.used, event).unwrap();
        }
        let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// As [`Self::wait_used`]; `None` if the device asks for a reset instead.
    pub fn wait_used_or_reset(&mut self, interrupt: &TestInterrupt) -> Option<(u16, u32)> {
        interrupt.wait_or_reset(|| self.take_used())
    }

    /// Keeps the ring full of what is in its slots, as fast as the device empties it, until `stop` is set.
    pub fn flood(&mut self, stop: &AtomicBool) {
        let mut last = None;
        while !stop.load(Ordering::Relaxed) {
            let used: u16 = self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).unwrap();
            self.set_avail(used.wrapping_add(self.size));
            // A device that does not move waits for a kick, perhaps; one that does has no time to be lost by it.
            if last.replace(used) == Some(used) {
                self.kick();
            }
        }
    }

    /// Waits for the next chain that the device returns.
    pub fn wait_used(&mut self, interrupt: &TestInterrupt) -> (u16, u32) {
        interrupt.wait(|| self.take_used())
    }
}

/// An activation over queues.
pub fn activation(
    memory: &Memory,
    features: u64,
    queues: &[&DriverQueue],
    interrupt: &Arc<TestInterrupt>,
) -> Activation {
    Activation {
        memory: memory.clone(),
        features,
        queues: queues.iter().map(|queue| queue.active()).collect(),
        interrupt: interrupt.clone(),
        counts: Arc::default(),
    }
}
