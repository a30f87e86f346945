//! A place on the bus where a device is, or may come to be (ARCHITECTURE.md, D3).
//!
//! Every slot is declared on the guest's command line. An empty one has a device ID of 0, which makes a driver leave it
//! alone (section 4.2.2.2) until the slot has been filled and the guest is told to look again.

use std::sync::Arc;

use bulkhead_protocol::counters::DeviceCounters;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::kvm::{KvmError, Vm};
use crate::layout::READABLE_REGISTERS;
use crate::register_page::RegisterPage;
use crate::virtio::VirtioDevice;
use crate::virtio::transport::{MAGIC, MmioInterrupt, MmioTransport, QUEUE_NOTIFY, REG_MAGIC, REG_VERSION, VERSION};

/// A slot.
pub struct Slot {
    page: Arc<RegisterPage>,
    device: Option<Filled>,
}

/// What is in a slot.
struct Filled {
    transport: MmioTransport,
    /// The device's doorbells, for disconnecting them from KVM.
    kicks: Vec<EventFd>,
}

impl Slot {
    /// A slot without a device. The guest reads the first registers in the page.
    #[must_use]
    pub fn new(page: Arc<RegisterPage>) -> Self {
        let new = Self { page, device: None };
        new.show_empty();
        new
    }

    fn show_empty(&self) {
        (0..READABLE_REGISTERS).step_by(size_of::<u32>()).for_each(|register| self.page.store(register, 0));
        self.page.store(REG_MAGIC, MAGIC);
        self.page.store(REG_VERSION, VERSION);
    }

    /// Puts a device into the slot at `address` and connects its interrupt and doorbells.
    pub fn fill(&mut self, vm: &Vm, address: u64, irq: u8, device: Box<dyn VirtioDevice>) -> Result<(), SlotError> {
        if !self.is_empty() {
            return Err(SlotError::Taken);
        }
        let mut kicks = Vec::new();
        for (index, _) in (0u32..).zip(device.queue_sizes()) {
            let kick = event()?;
            vm.register_doorbell(&kick, address + QUEUE_NOTIFY, index)?;
            kicks.push(kick);
        }
        let interrupt = Arc::new(MmioInterrupt::new(vm.irq_line(u32::from(irq)), self.page.clone()));
        let theirs = kicks.iter().map(copy).collect::<Result<_, _>>()?;
        let transport = MmioTransport::new(device, vm.memory().clone(), interrupt, theirs);
        self.device = Some(Filled { transport, kicks });
        Ok(())
    }

    /// Whether a device fits in.
    pub fn is_empty(&self) -> bool {
        self.device.is_none()
    }

    /// What the device of this slot, the one of this number, has counted.
    pub fn counters(&self, slot: u8) -> Option<DeviceCounters> {
        let (device, counts) = self.device.as_ref()?.transport.counters();
        Some(counts.told(slot, device))
    }

    /// Takes the device out, with no regard to the driver: from now on the slot at `address` reads as empty. Only while a
    /// request of the device's is in the host it stays, though with nothing more to work on
    /// ([`VirtioDevice::withdraw`]): the driver gets an answer to each request, and can let go. Then there is nothing to return,
    /// and this has to be called again. Never waits; what it returns waits, when it is dropped, for the loop of a device that
    /// never waits for the host.
    ///
    /// # Errors
    ///
    /// [`SlotError::Empty`], or those of KVM.
    pub fn clear(&mut self, vm: &Vm, address: u64) -> Result<Option<impl Sized + use<>>, SlotError> {
        if self.is_empty() {
            return Err(SlotError::Empty);
        }
        let leaving = self.device.take_if(|filled| filled.transport.withdraw());
        let Some(Filled { transport, kicks }) = leaving else { return Ok(None) };
        self.show_empty();
        for (index, kick) in (0u32..).zip(&kicks) {
            vm.unregister_doorbell(kick, address + QUEUE_NOTIFY, index)?;
        }
        Ok(Some(transport))
    }
}

fn copy(event: &EventFd) -> Result<EventFd, SlotError> {
    event.try_clone().map_err(SlotError::Event)
}

fn event() -> Result<EventFd, SlotError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(SlotError::Event)
}

impl BusDevice for Slot {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (&mut self.device, offset, <&mut [u8; 4]>::try_from(&mut *data)) {
            (Some(filled), ..) => filled.transport.read(offset, data),
            (None, REG_MAGIC, Ok(word)) => *word = MAGIC.to_le_bytes(),
            (None, REG_VERSION, Ok(word)) => *word = VERSION.to_le_bytes(),
            (None, ..) => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(filled) = &mut self.device {
            filled.transport.write(offset, data);
        }
    }
}

/// A device that cannot be put into its slot.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is one already.
    #[error("slot is taken")]
    Taken,
    /// There is none.
    #[error("slot is empty")]
    Empty,
    /// eventfd(2).
    #[error("cannot create an event descriptor; is the limit of open files too low?")]
    Event(#[source] std::io::Error),
    /// ioeventfd.
    #[error("cannot connect or disconnect the device's doorbells")]
    Kvm(#[from] KvmError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_02_empty_slot_is_a_transport_without_a_device_in_any_access() {
        let page = Arc::new(RegisterPage::new().unwrap());
        let mut slot = Slot::new(page.clone());
        for width in [1, 2, 4, 8] {
            for offset in (0..0x1000).chain([u64::MAX]) {
                slot.write(offset, &vec![0xff; width]);
                let mut data = vec![0; width];
                slot.read(offset, &mut data);
                let expected = match (offset, width) {
                    (REG_MAGIC, 4) => MAGIC,
                    (REG_VERSION, 4) => VERSION,
                    _ => 0,
                };
                assert!(expected.to_le_bytes().iter().chain([&0; 4]).zip(&data).all(|(a, b)| a == b), "{offset:#x}");
            }
        }
        assert!(slot.is_empty());
        let shown: Vec<_> = (0..READABLE_REGISTERS).step_by(4).map(|register| page.load(register)).collect();
        assert_eq!((&shown[..2], &shown[2..]), (&[MAGIC, VERSION][..], &[0; 23][..]));
    }
}
