//! The device's side of the transport's registers: interrupt status, configuration generation and DEVICE_NEEDS_RESET.
//! Everything here is shared between the vCPUs (through the registers) and the device's worker, hence atomic.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::Interrupt;

/// InterruptStatus: the device has used a buffer.
const USED_BUFFER: u32 = 1;
/// InterruptStatus: the configuration has changed.
const CONFIG_CHANGE: u32 = 2;

/// An interrupt line of the I/O APIC, raised through an irqfd.
pub struct MmioInterrupt {
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    line: EventFd,
}

impl MmioInterrupt {
    /// An interrupt with nothing pending.
    pub fn new(line: EventFd) -> Self {
        Self { status: AtomicU32::new(0), generation: AtomicU32::new(0), needs_reset: AtomicBool::new(false), line }
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// ConfigGeneration.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether the device asked for a reset.
    pub fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// Device reset: nothing is pending.
    pub fn reset(&self) {
        self.needs_reset.store(false, Ordering::SeqCst);
        self.status.store(0, Ordering::SeqCst);
    }

    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // KVM drains the counter when it injects the interrupt; a full one would mean that it is pending anyway.
        let _ = self.line.write(1);
    }
}

impl Interrupt for MmioInterrupt {
    fn notify_queue(&self, _index: u16) {
        self.raise(USED_BUFFER);
    }

    fn notify_config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }
}
