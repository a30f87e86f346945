//! The machine's slots, and which of them have a device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::counters::DeviceCounters;
use bulkhead_protocol::vmspec::DeviceSpec;

use super::error::MachineError;
use super::slot::{Slot, SlotError};
use crate::bus::Bus;
use crate::descriptors::Descriptors;
use crate::devices::DeviceBuilder;
use crate::kvm::Vm;
use crate::layout::{self, SLOTS};
use crate::virtio::VirtioDevice;

/// All slots by number. Whoever has this is the only one who fills and empties them.
pub struct Slots {
    /// Shared with the bus that they are on. A vCPU holds one's lock during an access, so only the lock of the slot that is meant
    /// is ever waited for.
    shared: Vec<Arc<Mutex<Slot>>>,
    states: [State; SLOTS],
}

/// What is in a slot.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Empty,
    Filled,
    /// A device that was taken out while a request of its was in the host, and is looked at again before the next one comes.
    Leaving,
}

impl Slots {
    /// The slots and their bus. The first ones are filled with the devices in their order, at most [`SLOTS`].
    pub fn build(
        vm: &Vm,
        devices: &[DeviceSpec],
        builder: &mut DeviceBuilder,
        fds: &mut Descriptors,
    ) -> Result<(Self, Bus), MachineError> {
        let (mut bus, mut slots) =
            (Bus::new(), Self { shared: Vec::with_capacity(SLOTS), states: [State::Empty; SLOTS] });
        let mut devices = devices.iter();
        let places = layout::SLOT_IRQS.into_iter().enumerate().zip(vm.register_pages());
        for (((index, irq), page), state) in places.zip(&mut slots.states) {
            let (mut slot, address) = (Slot::new(page.clone()), layout::slot_address(index));
            if let Some(device) = devices.next() {
                slot.fill(vm, address, irq, builder.build(device, fds)?)?;
                *state = State::Filled;
            }
            let slot = Arc::new(Mutex::new(slot));
            bus.insert(address, layout::SLOT_SIZE, slot.clone())?;
            slots.shared.push(slot);
        }
        Ok((slots, bus))
    }

    /// Puts a device into the first empty slot and returns the slot's number.
    pub fn add(
        &mut self,
        vm: &Vm,
        builder: &mut DeviceBuilder,
        spec: &DeviceSpec,
        mut fds: Descriptors,
    ) -> Result<u8, MachineError> {
        let number = self.first_empty(vm)?;
        self.fill(vm, number, builder.build(spec, &mut fds)?)
    }

    /// The same with a device that was built before.
    pub fn add_built(&mut self, vm: &Vm, device: Box<dyn VirtioDevice>) -> Result<u8, MachineError> {
        let number = self.first_empty(vm)?;
        self.fill(vm, number, device)
    }

    fn first_empty(&mut self, vm: &Vm) -> Result<u8, MachineError> {
        self.clear_leaving(vm);
        let mut all = (0u8..).zip(&self.states);
        all.find(|(_, state)| **state == State::Empty).map(|(number, _)| number).ok_or(MachineError::NoSlot)
    }

    fn fill(&mut self, vm: &Vm, number: u8, device: Box<dyn VirtioDevice>) -> Result<u8, MachineError> {
        let (address, irq) = place(number)?;
        let (index, unknown) = (usize::from(number), || MachineError::UnknownSlot(number));
        lock(self.shared.get(index).ok_or_else(unknown)?).fill(vm, address, irq, device)?;
        *self.states.get_mut(index).ok_or_else(unknown)? = State::Filled;
        Ok(number)
    }

    /// Takes the device out of a slot, with no regard to what the guest does with it. Does not wait for what the host does for
    /// the device: until that is done the slot is no other's.
    pub fn remove(&mut self, vm: &Vm, number: u8) -> Result<(), MachineError> {
        let state = self.states.get_mut(usize::from(number)).ok_or(MachineError::UnknownSlot(number))?;
        if *state != State::Filled {
            return Err(SlotError::Empty.into());
        }
        *state = State::Leaving;
        self.clear(vm, number)
    }

    /// What the devices have counted.
    pub fn counters(&self) -> Vec<DeviceCounters> {
        (0u8..).zip(&self.shared).filter_map(|(number, slot)| lock(slot).counters(number)).collect()
    }

    /// Looks at the slots again that could not be emptied.
    fn clear_leaving(&mut self, vm: &Vm) {
        let leaving = |(number, state): (u8, &State)| (*state == State::Leaving).then_some(number);
        for number in (0u8..).zip(&self.states).filter_map(leaving).collect::<Vec<_>>() {
            if let Err(error) = self.clear(vm, number) {
                crate::vmm_log!("slot {number} is lost: {}", bulkhead_protocol::error::chain(&error));
            }
        }
    }

    /// Empties a slot whose device is leaving, if it can go.
    fn clear(&mut self, vm: &Vm, number: u8) -> Result<(), MachineError> {
        let (address, _) = place(number)?;
        let (index, unknown) = (usize::from(number), || MachineError::UnknownSlot(number));
        let slot = self.shared.get(index).ok_or_else(unknown)?;
        let cleared = lock(slot).clear(vm, address)?;
        if let (Some(_), Some(state)) = (&cleared, self.states.get_mut(index)) {
            *state = State::Empty;
        }
        // Outside of the lock, which a vCPU may be waiting for.
        drop(cleared);
        Ok(())
    }
}

fn lock(slot: &Mutex<Slot>) -> MutexGuard<'_, Slot> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Address and interrupt of a slot.
fn place(number: u8) -> Result<(u64, u8), MachineError> {
    let irq = layout::SLOT_IRQS.get(usize::from(number)).ok_or(MachineError::UnknownSlot(number))?;
    Ok((layout::slot_address(number.into()), *irq))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::memory::create_memory;
    use crate::virtio::{ActivateError, Activation};

    fn vm() -> Vm {
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").expect("needs a /dev/kvm");
        Vm::new(kvm.into(), create_memory(16, 0).unwrap(), layout::hotplug_start(16)).unwrap()
    }

    fn builder() -> DeviceBuilder {
        DeviceBuilder::new(None, None, Box::new(|| {}), 0).unwrap()
    }

    fn none() -> Descriptors {
        Descriptors::new(Vec::new())
    }

    #[test]
    fn hostile_07_slot_that_a_vcpu_is_busy_with_holds_up_no_other() {
        let (vm, mut builder) = (vm(), builder());
        let first = [DeviceSpec::Rng, DeviceSpec::Rng];
        let (mut slots, _bus) = Slots::build(&vm, &first, &mut builder, &mut none()).unwrap();
        let busy = slots.shared[0].clone();
        thread::scope(|scope| {
            let guard = lock(&busy);
            let (tell, told) = mpsc::channel();
            scope.spawn(move || {
                let mut add = |slots: &mut Slots| slots.add(&vm, &mut builder, &DeviceSpec::Rng, none()).unwrap();
                let added = add(&mut slots);
                slots.remove(&vm, 1).unwrap();
                assert!(slots.remove(&vm, 1).is_err(), "taken out already");
                tell.send([added, add(&mut slots)]).unwrap();
            });
            // It takes milliseconds, and some hundred times as long on a machine under heavy load.
            let added = told.recv_timeout(Duration::from_secs(20));
            drop(guard);
            assert_eq!(added, Ok([2, 1]));
        });
    }

    /// A device with a request in the host, or without.
    struct Stub(Arc<AtomicBool>);

    impl VirtioDevice for Stub {
        fn device_type(&self) -> u32 {
            42
        }
        fn queue_sizes(&self) -> &[u16] {
            &[8]
        }
        fn features(&self) -> u64 {
            0
        }
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn activate(&mut self, _activation: Activation) -> Result<(), ActivateError> {
            Ok(())
        }
        fn reset(&mut self) {}
        fn withdraw(&mut self) -> bool {
            !self.0.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn hostile_08_slot_of_a_device_that_waits_for_the_host_is_no_others_until_that_answers() {
        const DEVICE_ID: u64 = 8;
        let (vm, mut builder) = (vm(), builder());
        let (mut slots, bus) = Slots::build(&vm, &[], &mut builder, &mut none()).unwrap();
        let in_host = Arc::new(AtomicBool::new(true));
        let (address, irq) = place(0).unwrap();
        lock(&slots.shared[0]).fill(&vm, address, irq, Box::new(Stub(in_host.clone()))).unwrap();
        slots.states[0] = State::Filled;

        slots.remove(&vm, 0).unwrap();
        assert!(slots.remove(&vm, 0).is_err(), "it is on its way out already");
        let device_id = || {
            let mut id = [0; 4];
            bus.read(address + DEVICE_ID, &mut id);
            u32::from_le_bytes(id)
        };
        assert_eq!(device_id(), 42, "its driver can still let go");
        let mut add = |slots: &mut Slots| slots.add(&vm, &mut builder, &DeviceSpec::Rng, none()).unwrap();
        assert_eq!(add(&mut slots), 1);
        in_host.store(false, Ordering::Relaxed);
        assert_eq!((add(&mut slots), device_id()), (0, 4));
    }
}
