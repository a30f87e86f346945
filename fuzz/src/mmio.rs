//! The registers of virtio-mmio, with accesses of any width at any place of a bus with a device and an empty slot.

use std::sync::{Arc, Mutex};

use bulkhead_vmm::bus::{Bus, BusDevice};
use bulkhead_vmm::layout::{SLOT_SIZE, SLOT_STRIDE, slot_address};
use bulkhead_vmm::machine::Slot;
use bulkhead_vmm::register_page::RegisterPage;
use bulkhead_vmm::virtio::ring::event_fd;
use bulkhead_vmm::virtio::testing::memory;
use bulkhead_vmm::virtio::transport::{MmioInterrupt, MmioTransport};
use bulkhead_vmm::virtio::{ActivateError, Activation, Interrupt, VirtioDevice};
use vm_memory::GuestMemory;

use crate::input::Input;

/// Steps of one input.
const MAX_STEPS: usize = 256;
const QUEUES: [u16; 3] = [256, 16, 1];
const FEATURES: u64 = 0x30_0000_0041;
/// VERSION_1, RING_EVENT_IDX and RING_INDIRECT_DESC, which the transport offers.
const TRANSPORT_FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28;

const DRIVER_OK: u32 = 4;
const STATUS: u64 = 0x70;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_READY: u64 = 0x44;
/// Every register, and some that are none.
const REGISTERS: [u64; 34] = [
    0x000, 0x004, 0x008, 0x00c, 0x010, 0x014, 0x018, 0x020, 0x024, 0x030, 0x034, 0x038, 0x03c, 0x044, 0x050, 0x060,
    0x064, 0x070, 0x080, 0x084, 0x090, 0x094, 0x0a0, 0x0a4, 0x0ac, 0x0b0, 0x0b4, 0x0b8, 0x0bc, 0x0c0, 0x0fc, 0x100,
    0x104, 0x10c,
];

/// A device that checks what it is given.
struct Probe {
    active: Arc<Mutex<Option<Activation>>>,
    config: [u8; 12],
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        bulkhead_vmm::virtio::read_config(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        self.config.iter_mut().skip(start).zip(data).for_each(|(to, from)| *to = *from);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        assert_eq!(activation.features & !(FEATURES | TRANSPORT_FEATURES), 0, "a feature that was not offered");
        assert_ne!(activation.features & 1 << 32, 0, "a driver of the legacy interface");
        assert_eq!(activation.queues.len(), QUEUES.len());
        for (active, most) in activation.queues.iter().zip(QUEUES) {
            let Some(active) = active else { continue };
            check(&active.queue, most, activation.memory.as_ref());
        }
        let mut slot = self.active.lock().unwrap();
        assert!(slot.is_none(), "activated twice without a reset");
        *slot = Some(activation);
        Ok(())
    }

    fn reset(&mut self) {
        *self.active.lock().unwrap() = None;
    }
}

/// A queue that a device may rely on.
fn check(queue: &impl QueueView, most: u16, memory: &impl GuestMemory) {
    let size = queue.size();
    assert!(size.is_power_of_two() && size <= most, "a queue of {size}");
    let size = usize::from(size);
    for (address, len) in queue.parts().into_iter().zip([16 * size, 6 + 2 * size, 6 + 8 * size]) {
        assert!(memory.check_range(vm_memory::GuestAddress(address), len), "a ring at {address:#x}");
    }
}

/// What [`check`] looks at.
trait QueueView {
    fn size(&self) -> u16;
    fn parts(&self) -> [u64; 3];
}

impl<Q: virtio_queue::QueueT> QueueView for Q {
    fn size(&self) -> u16 {
        virtio_queue::QueueT::size(self)
    }

    fn parts(&self) -> [u64; 3] {
        [self.desc_table(), self.avail_ring(), self.used_ring()]
    }
}

/// The registers, and what a driver may expect of them.
struct Machine {
    bus: Bus,
    base: u64,
    active: Arc<Mutex<Option<Activation>>>,
}

impl Machine {
    fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.bus.read(self.base + offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, offset: u64, value: u32) {
        self.bus.write(self.base + offset, &value.to_le_bytes());
    }

    /// Does something to the registers; status bits go by a reset only, and a device that works keeps its queues.
    fn watch(&self, act: impl FnOnce(&Self) -> bool) {
        let before = self.read(STATUS);
        let running = self.active.lock().unwrap().is_some();
        let reset = act(self);
        let after = self.read(STATUS);
        if !reset {
            assert_eq!(before & !after, 0, "status {before:#x} became {after:#x} without a reset");
            assert!(!running || self.active.lock().unwrap().is_some(), "a device was stopped without a reset");
        }
        if self.active.lock().unwrap().is_some() {
            assert_ne!(after & DRIVER_OK, 0, "a device works before DRIVER_OK");
        }
    }

    /// The rules of section 3.1.1, with a queue at a place of the input's choice.
    fn initialize(&self, input: &mut Input<'_>) {
        self.write(STATUS, 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        let features = (FEATURES | TRANSPORT_FEATURES) & !input.u64();
        for (select, shift) in [(0, 0), (1, 32)] {
            self.write(0x24, select);
            self.write(0x20, u32::try_from(features >> shift & 0xffff_ffff).unwrap());
        }
        self.write(STATUS, 0xb);
        self.write(QUEUE_SEL, u32::from(input.u8()));
        self.write(0x38, u32::from(input.u16()));
        for register in [0x80, 0x90, 0xa0] {
            self.write(register, input.u32());
        }
        self.write(QUEUE_READY, 1);
        self.write(STATUS, 0xf);
    }
}

fn page() -> Arc<RegisterPage> {
    Arc::new(RegisterPage::new().unwrap())
}

/// The target.
pub fn mmio_registers(data: &[u8]) {
    let active = Arc::new(Mutex::new(None));
    let interrupt = Arc::new(MmioInterrupt::new(Box::new(event_fd().unwrap()), page()));
    let kicks = QUEUES.iter().map(|_| event_fd().unwrap()).collect();
    let probe = Box::new(Probe { active: active.clone(), config: [7; 12] });
    let transport: Arc<Mutex<dyn BusDevice>> =
        Arc::new(Mutex::new(MmioTransport::new(probe, memory(), interrupt.clone(), kicks)));
    let mut machine = Machine { bus: Bus::new(), base: slot_address(1), active };
    machine.bus.insert(slot_address(0), SLOT_SIZE, Arc::new(Mutex::new(Slot::new(page())))).unwrap();
    machine.bus.insert(slot_address(1), SLOT_SIZE, transport).unwrap();

    let mut input = Input::new(data);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        match input.choice(6) {
            0 => {
                let mut data = vec![0xaa; 1 << input.choice(4)];
                machine.bus.read(slot_address(0) + u64::from(input.u16()), &mut data);
            }
            1 => {
                let (len, offset) = (1 << input.choice(4), u64::from(input.u16()));
                let mut data = [0; 8];
                data.iter_mut().zip(input.bytes(len)).for_each(|(to, from)| *to = *from);
                let resets = offset == SLOT_STRIDE + STATUS && data[..len].iter().all(|byte| *byte == 0);
                machine.watch(|machine| {
                    machine.bus.write(slot_address(0) + offset, &data[..len]);
                    resets
                });
            }
            2 => {
                let (register, value) = (REGISTERS[input.choice(REGISTERS.len())], input.u32());
                machine.watch(|machine| {
                    machine.write(register, value);
                    register == STATUS && value == 0
                });
            }
            3 => drop(machine.read(REGISTERS[input.choice(REGISTERS.len())])),
            4 => machine.initialize(&mut input),
            _ => match input.choice(3) {
                0 => interrupt.notify_queue(0),
                1 => interrupt.notify_config(),
                _ => interrupt.needs_reset(),
            },
        }
    }
}
