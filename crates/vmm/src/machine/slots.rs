//! The machine's slots, and which of them have a device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::vmspec::DeviceSpec;

use super::MachineError;
use crate::bus::Bus;
use crate::descriptors::Descriptors;
use crate::devices::DeviceBuilder;
use crate::kvm::Vm;
use crate::layout::{self, SLOTS};
use crate::virtio::transport::{Slot, SlotError};

/// All slots by number. Whoever has this is the only one who fills and empties them.
pub struct Slots {
    /// Shared with the bus that they are on. A vCPU holds one's lock while it resets the device, which may take as long as what
    /// a disk is working on, so only the lock of the slot that is meant is ever waited for.
    shared: Vec<Arc<Mutex<Slot>>>,
    /// Those with a device.
    filled: [bool; SLOTS],
}

impl Slots {
    /// The slots and their bus. The first ones are filled with the devices in their order, at most [`SLOTS`].
    pub fn build(
        vm: &Vm,
        devices: &[DeviceSpec],
        builder: &mut DeviceBuilder,
        fds: &mut Descriptors,
    ) -> Result<(Self, Bus), MachineError> {
        let (mut bus, mut slots) = (Bus::new(), Self { shared: Vec::with_capacity(SLOTS), filled: [false; SLOTS] });
        let mut devices = devices.iter();
        for ((index, irq), filled) in layout::SLOT_IRQS.into_iter().enumerate().zip(&mut slots.filled) {
            let (mut slot, address) = (Slot::new(), layout::slot_address(index));
            if let Some(device) = devices.next() {
                slot.fill(vm, address, irq, builder.build(device, fds)?)?;
                *filled = true;
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
        let mut all = (0u8..).zip(self.shared.iter().zip(&mut self.filled));
        let (number, (slot, filled)) = all.find(|(_, (_, filled))| !**filled).ok_or(MachineError::NoSlot)?;
        let (address, irq) = place(number)?;
        let device = builder.build(spec, &mut fds)?;
        lock(slot).fill(vm, address, irq, device)?;
        *filled = true;
        Ok(number)
    }

    /// Takes the device out of a slot, with no regard to what the guest does with it.
    pub fn remove(&mut self, vm: &Vm, number: u8) -> Result<(), MachineError> {
        let (address, irq) = place(number)?;
        let index = usize::from(number);
        let unknown = || MachineError::UnknownSlot(number);
        let slot = self.shared.get(index).ok_or_else(unknown)?;
        let filled = self.filled.get_mut(index).ok_or_else(unknown)?;
        if !std::mem::take(filled) {
            return Err(SlotError::Empty.into());
        }
        let stopped = lock(slot).clear(vm, address, irq)?;
        // Outside of the lock: a request that the device is working on must not hold up the vCPU that looks at the slot.
        drop(stopped);
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
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::kvm::create_memory;

    #[test]
    fn hostile_07_slot_that_a_vcpu_is_busy_with_holds_up_no_other() {
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm").expect("needs a /dev/kvm");
        let vm = Vm::new(kvm.into(), create_memory(16, 0).unwrap(), layout::hotplug_start(16)).unwrap();
        let mut builder = DeviceBuilder::new(None, Box::new(|| {})).unwrap();
        let none = || Descriptors::new(Vec::new());
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
}
