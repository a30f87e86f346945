//! virtio over MMIO, version 2 (Virtual I/O Device 1.2, section 4.2).
//!
//! The driver is hostile. The rules of section 3.1 (initialization) and 2.1 (status) are enforced, not assumed: features
//! can be written only between DRIVER and FEATURES_OK, queues only between FEATURES_OK and DRIVER_OK, a status bit goes
//! away only by a reset. A write that breaks a rule is dropped. So from DRIVER_OK on, nothing that the device was given
//! can change under it.

use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::{INTERRUPT_STATUS, MmioInterrupt};
use super::queue::QueueRegisters;
use crate::bus::BusDevice;
use crate::guest_log;
use crate::layout::READABLE_REGISTERS;
use crate::memory::Memory;
use crate::virtio::counts::Counts;
use crate::virtio::ring::OWN_KICK;
use crate::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice};

/// "virt".
pub const MAGIC: u32 = 0x7472_6976;
/// Not the legacy interface.
pub const VERSION: u32 = 2;
/// "BLKH".
const VENDOR: u32 = 0x484b_4c42;

// Table 4.1: register offsets.
/// MagicValue.
pub const REG_MAGIC: u64 = 0x000;
/// Version.
pub const REG_VERSION: u64 = 0x004;
const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_NUM_MAX: u64 = 0x034;
const QUEUE_NUM: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// QueueNotify, the doorbell of all queues.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// InterruptACK.
const INTERRUPT_ACK: u64 = 0x064;
const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
const SHM_SEL: u64 = 0x0ac;
const SHM_LEN_LOW: u64 = 0x0b0;
const SHM_BASE_HIGH: u64 = 0x0bc;
const CONFIG_GENERATION: u64 = 0x0fc;
const CONFIG: u64 = 0x100;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device behind its registers.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    interrupt: Arc<MmioInterrupt>,
    /// Of all activations.
    counts: Arc<Counts>,
    /// One for each queue.
    kicks: Vec<EventFd>,
    /// One for each queue.
    queues: Vec<QueueRegisters>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

impl MmioTransport {
    /// A device after reset. There is a kick for each of its queues.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: Arc<MmioInterrupt>,
        kicks: Vec<EventFd>,
    ) -> Self {
        let queues = Self::initial_queues(device.as_ref());
        let new = Self {
            device,
            memory,
            interrupt,
            counts: Arc::default(),
            kicks,
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        };
        new.show();
        new
    }

    /// Shows the driver the registers that it reads as memory. They change by its own writes only, but for InterruptStatus, which
    /// is the interrupt's.
    fn show(&self) {
        for register in (0..READABLE_REGISTERS).step_by(size_of::<u32>()).filter(|at| *at != INTERRUPT_STATUS) {
            self.interrupt.page().store(register, self.read_register(register));
        }
    }

    fn initial_queues(device: &dyn VirtioDevice) -> Vec<QueueRegisters> {
        vec![QueueRegisters::default(); device.queue_sizes().len()]
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | VERSION_1 | EVENT_IDX | INDIRECT_DESC
    }

    fn selected_queue(&self) -> Option<usize> {
        usize::try_from(self.queue_sel).ok().filter(|index| *index < self.queues.len())
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            REG_MAGIC => MAGIC,
            REG_VERSION => VERSION,
            DEVICE_ID => self.device.device_type(),
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => word(self.offered_features(), self.device_features_sel),
            QUEUE_NUM_MAX => {
                let size = self.selected_queue().and_then(|index| self.device.queue_sizes().get(index));
                size.copied().map_or(0, u32::from)
            }
            QUEUE_READY => {
                let queue = self.selected_queue().and_then(|index| self.queues.get(index));
                queue.map_or(0, |queue| u32::from(queue.ready))
            }
            INTERRUPT_STATUS => self.interrupt.page().load(INTERRUPT_STATUS),
            STATUS if self.is_resetting() => NEEDS_RESET,
            STATUS => self.status | if self.interrupt.is_reset_needed() { NEEDS_RESET } else { 0 },
            // No device has shared memory: a length and a base of all ones (section 4.2.2).
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => self.interrupt.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => self.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            DRIVER_FEATURES => self.write_driver_features(value),
            QUEUE_SEL => self.queue_sel = value,
            QUEUE_NOTIFY => self.notify(value),
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            STATUS => self.write_status(value),
            // Every one is absent, whichever is selected.
            SHM_SEL => {}
            QUEUE_NUM | QUEUE_READY | QUEUE_DESC_LOW..=QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            _ => guest_log!("write to register {offset:#x}, which is not there or read-only"),
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            guest_log!("features written out of order, status {:#x}", self.status);
            return;
        }
        match self.driver_features_sel {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | u64::from(value),
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | (u64::from(value) << 32),
            // No feature bits there; acknowledging one is caught nowhere else.
            _ if value != 0 => guest_log!("features beyond bit 63 written"),
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        if self.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            guest_log!("queue register {offset:#x} written out of order, status {:#x}", self.status);
            return;
        }
        let Some(queue) = self.selected_queue().and_then(|index| self.queues.get_mut(index)) else {
            guest_log!("register of queue {}, which is not there, written", self.queue_sel);
            return;
        };
        if queue.ready && offset != QUEUE_READY {
            guest_log!("register {offset:#x} of a queue that is ready written");
            return;
        }
        match offset {
            QUEUE_NUM => queue.size = value,
            QUEUE_READY => queue.ready = value & 1 != 0,
            QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            QUEUE_DRIVER_LOW => set_low(&mut queue.available, value),
            QUEUE_DRIVER_HIGH => set_high(&mut queue.available, value),
            QUEUE_DEVICE_LOW => set_low(&mut queue.used, value),
            QUEUE_DEVICE_HIGH => set_high(&mut queue.used, value),
            _ => {}
        }
    }

    /// A doorbell that KVM did not take: one for a queue that is not there. Linux never rings it.
    fn notify(&mut self, queue: u32) {
        let kick = usize::try_from(queue).ok().and_then(|index| self.kicks.get(index));
        if let Some(kick) = kick.filter(|_| self.status & DRIVER_OK != 0) {
            let _ = kick.write(1);
        }
    }

    /// Whether a request from before the last reset is still in the host (see [`crate::virtio::stop`]). The reset is over when
    /// the status reads as 0 (section 2.4.1), and until then the driver can do nothing with the device.
    fn is_resetting(&self) -> bool {
        self.status == 0 && !self.device.is_stopped()
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        if self.is_resetting() {
            guest_log!(
                "status {value:#x} before the reset is over: the device's file or disk on the host does not answer"
            );
            return;
        }
        let added = value & !self.status & !NEEDS_RESET;
        if value & self.status != self.status || self.status & FAILED != 0 {
            guest_log!("status {:#x} cannot become {value:#x} without a reset", self.status);
            return;
        }
        match added {
            0 => {}
            FAILED => self.status |= FAILED,
            ACKNOWLEDGE => self.status |= ACKNOWLEDGE,
            DRIVER if self.status & ACKNOWLEDGE != 0 => self.status |= DRIVER,
            FEATURES_OK if self.status & DRIVER != 0 => self.accept_features(),
            DRIVER_OK if self.status & FEATURES_OK != 0 => self.start(),
            // Several steps in one write, as some drivers do for the first two.
            _ if added == ACKNOWLEDGE | DRIVER => self.status |= added,
            _ => guest_log!("status {:#x} cannot become {value:#x}: steps are missing", self.status),
        }
    }

    /// Section 3.1.1, step 5: FEATURES_OK stays clear if the driver's choice is not possible.
    fn accept_features(&mut self) {
        let unknown = self.driver_features & !self.offered_features();
        if unknown != 0 || self.driver_features & VERSION_1 == 0 {
            guest_log!("features {:#x} refused", self.driver_features);
            return;
        }
        self.status |= FEATURES_OK;
    }

    /// DRIVER_OK: hands the queues to the device, or asks for a reset if it cannot start.
    fn start(&mut self) {
        self.status |= DRIVER_OK;
        let Some(queues) = self.active_queues() else {
            self.interrupt.needs_reset();
            return;
        };
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
            counts: Arc::clone(&self.counts),
        };
        if let Err(error) = self.device.activate(activation) {
            guest_log!("device of type {} cannot start: {error}", self.device.device_type());
            self.interrupt.needs_reset();
        }
    }

    fn active_queues(&self) -> Option<Vec<Option<ActiveQueue>>> {
        let event_idx = self.driver_features & EVENT_IDX != 0;
        let mut active = Vec::with_capacity(self.queues.len());
        for ((registers, max_size), kick) in self.queues.iter().zip(self.device.queue_sizes()).zip(&self.kicks) {
            if !registers.ready {
                active.push(None);
                continue;
            }
            let queue = registers
                .to_queue(*max_size, &self.memory, event_idx)
                .inspect_err(|error| guest_log!("queue {}: {error}", active.len()))
                .ok()?;
            let kick = kick.try_clone().inspect_err(|error| guest_log!("no descriptor for a queue: {error}")).ok()?;
            // The worker looks at the queue once in any case: buffers may have been put there before it existed.
            let _ = kick.write(OWN_KICK);
            active.push(Some(ActiveQueue { queue, kick }));
        }
        Some(active)
    }

    /// What the device is, and what it has counted.
    pub fn counters(&self) -> (u32, &Counts) {
        (self.device.device_type(), &self.counts)
    }

    /// See [`VirtioDevice::withdraw`].
    pub fn withdraw(&mut self) -> bool {
        self.device.withdraw()
    }

    fn reset(&mut self) {
        self.device.reset();
        self.interrupt.reset();
        self.queues = Self::initial_queues(self.device.as_ref());
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.device.read_config(offset, data);
        } else if let (true, Ok(register)) = (offset.is_multiple_of(4), <&mut [u8; 4]>::try_from(data)) {
            *register = self.read_register(offset).to_le_bytes();
        } else {
            // Section 4.2.2.2: registers are read and written as aligned words of 32 bits.
            guest_log!("register {offset:#x} not read as an aligned word of 32 bits");
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            if self.status & DRIVER != 0 {
                self.device.write_config(offset, data);
            }
        } else if let (true, Ok(value)) = (offset.is_multiple_of(4), <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(value));
            self.show();
        } else {
            guest_log!("register {offset:#x} not written as an aligned word of 32 bits");
        }
    }
}

/// 32 of 64 feature bits.
fn word(features: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(shifted & 0xffff_ffff).unwrap_or(0)
}

fn set_low(register: &mut u64, value: u32) {
    *register = (*register & !0xffff_ffff) | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = (*register & 0xffff_ffff) | (u64::from(value) << 32);
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
