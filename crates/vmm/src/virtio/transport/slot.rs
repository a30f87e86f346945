//! A place on the bus where a device is, or may come to be (DESIGN D3).
//!
//! Every slot is declared on the guest's command line. An empty one has a device ID of 0, which makes a driver leave it
//! alone (section 4.2.2.2) until the slot has been filled and the guest is told to look again.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::interrupt::MmioInterrupt;
use super::mmio::{MAGIC, MmioTransport, QUEUE_NOTIFY, REG_MAGIC, REG_VERSION, VERSION};
use crate::bus::BusDevice;
use crate::kvm::{KvmError, Vm};
use crate::virtio::VirtioDevice;

/// A slot.
#[derive(Default)]
pub struct Slot {
    transport: Option<MmioTransport>,
}

impl Slot {
    /// A slot without a device.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device into the slot at `address` and connects its interrupt and doorbells.
    pub fn fill(&mut self, vm: &Vm, address: u64, irq: u8, device: Box<dyn VirtioDevice>) -> Result<(), SlotError> {
        if self.transport.is_some() {
            return Err(SlotError::Taken);
        }
        let line = event()?;
        vm.register_irq(&line, u32::from(irq))?;
        let mut kicks = Vec::new();
        for (index, _) in (0u32..).zip(device.queue_sizes()) {
            let kick = event()?;
            vm.register_doorbell(&kick, address + QUEUE_NOTIFY, index)?;
            kicks.push(kick);
        }
        let interrupt = Arc::new(MmioInterrupt::new(line));
        self.transport = Some(MmioTransport::new(device, vm.memory().clone(), interrupt, kicks));
        Ok(())
    }
}

fn event() -> Result<EventFd, SlotError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(SlotError::Event)
}

impl BusDevice for Slot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (&mut self.transport, offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            (Some(transport), ..) => transport.read(offset, data),
            (None, REG_MAGIC, Ok(word)) => *word = MAGIC.to_le_bytes(),
            (None, REG_VERSION, Ok(word)) => *word = VERSION.to_le_bytes(),
            (None, ..) => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(transport) = &mut self.transport {
            transport.write(offset, data);
        }
    }
}

/// A device that cannot be put into its slot.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is one already.
    #[error("slot is taken")]
    Taken,
    /// eventfd(2).
    #[error("cannot create an event descriptor; is the limit of open files too low?")]
    Event(#[source] std::io::Error),
    /// irqfd or ioeventfd.
    #[error("cannot connect the device's interrupt and doorbells")]
    Kvm(#[from] KvmError),
}
