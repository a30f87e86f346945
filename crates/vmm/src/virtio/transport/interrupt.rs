//! The device's side of the transport's registers: interrupt status, configuration generation and DEVICE_NEEDS_RESET.
//! Everything here is shared between the vCPUs (through the registers) and the device's worker, hence atomic.
//!
//! An interrupt costs no exit. The driver reads InterruptStatus as memory ([`RegisterPage`]), and the guest kernel's does not
//! acknowledge used buffers where the vendor ID is ours (guest-kernel/patches). An acknowledgement that comes all the same tells
//! us nothing: the line is edge-triggered, so there is nothing to lower, and the bit for used buffers stays set from the first
//! interrupt to the reset. It makes the driver look at its rings in each interrupt, where it finds what there is.
//!
//! A change of the configuration is rare, and the driver has no other way to see it. Its bit is set and cleared as the
//! specification has it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::irq::IrqLine;
use crate::register_page::RegisterPage;
use crate::virtio::Interrupt;

/// InterruptStatus.
pub const INTERRUPT_STATUS: u64 = 0x060;
/// InterruptStatus: the device has used a buffer.
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus: the configuration has changed.
const CONFIG_CHANGE: u32 = 2;

/// A device's interrupt.
pub struct MmioInterrupt {
    page: Arc<RegisterPage>,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    line: Box<dyn IrqLine>,
}

impl MmioInterrupt {
    /// An interrupt with nothing pending. Its status is in the page.
    pub fn new(line: Box<dyn IrqLine>, page: Arc<RegisterPage>) -> Self {
        let new = Self { page, generation: AtomicU32::new(0), needs_reset: AtomicBool::new(false), line };
        new.reset();
        new
    }

    /// Where the driver reads the status, and other registers.
    pub fn page(&self) -> &RegisterPage {
        &self.page
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.page.clear(INTERRUPT_STATUS, bits & CONFIG_CHANGE);
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
        self.page.store(INTERRUPT_STATUS, 0);
    }

    fn raise(&self, bit: u32) {
        self.page.set(INTERRUPT_STATUS, bit);
        self.line.pulse();
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
