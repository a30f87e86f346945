//! A machine from its spec: memory, kernel, devices, vCPUs.

mod error;
mod slot;
mod slots;

use std::fs::File;
use std::sync::{Arc, Mutex};

use bulkhead_protocol::counters::DeviceCounters;
use bulkhead_protocol::vmspec::{DeviceSpec, Image, MAX_VCPUS, VmSpec};

use crate::boot;
use crate::bus::Bus;
use crate::descriptors::Descriptors;
use crate::devices::{DeviceBuilder, OnBuilt, OnReady};
use crate::exit::ExitSignal;
use crate::kvm::{self, Buses, ExitCounts, Vcpu, VcpuThread, Vm};
use crate::layout::{self, SLOTS};
use crate::legacy::{I8042, I8042_PORTS, SERIAL_PORTS, SerialPort};
use crate::memory::create_memory;
use crate::virtio::VirtioDevice;
use crate::virtio::console::output::Output;
use crate::virtio::mem::MemHandle;
use crate::virtio::vsock::VsockHandle;
pub use error::MachineError;
pub use slot::{Slot, SlotError};
use slots::Slots;

/// A machine. Its vCPUs run from [`start`](Self::start) to [`stop`](Self::stop).
pub struct Machine {
    // Before `vm`: no vCPU may outlive the memory that `vm` owns.
    threads: Vec<VcpuThread>,
    vcpus: Vec<Vcpu>,
    buses: Buses,
    exit: Arc<ExitSignal>,
    slots: Slots,
    builder: DeviceBuilder,
    vm: Vm,
}

impl Machine {
    /// Builds the machine. `on_ready` is called when the guest says that its agent listens.
    pub fn build(spec: &VmSpec, mut fds: Descriptors, on_ready: OnReady) -> Result<Self, MachineError> {
        validate(spec)?;
        let memory = create_memory(spec.memory_mib, spec.hotplug_mib)?;
        let hotplug_start = layout::hotplug_start(spec.memory_mib);
        let vm = Vm::new(fds.take(spec.kvm, "KVM")?, memory, hotplug_start)?;
        let kernel = File::from(fds.take(spec.kernel, "kernel")?);
        let initramfs = spec.initramfs.map(|index| fds.take(index, "initramfs")).transpose()?.map(File::from);
        let entry = boot::load(vm.memory(), spec, kernel, initramfs)?;
        let exit = Arc::new(ExitSignal::new().map_err(|error| MachineError::Host(error.into()))?);

        let images = vm.image_space(layout::images_start(spec.memory_mib, spec.hotplug_mib));
        let hotplug = vm.hotplug_memory(hotplug_start)?;
        let mut builder = DeviceBuilder::new(hotplug, Some(images.clone()), on_ready, most_disks(spec))?;
        let (slots, mmio) = Slots::build(&vm, &spec.devices, &mut builder, &mut fds)?;
        let pio = build_pio(&vm, spec, &mut fds, &exit)?;
        let buses = Buses { mmio: Arc::new(mmio), pio: Arc::new(pio), images };
        let vcpus = (0..spec.vcpus).map(|id| vm.create_vcpu(id, spec.vcpus, entry)).collect::<Result<_, _>>()?;
        Ok(Self { threads: Vec::new(), vcpus, buses, exit, slots, builder, vm })
    }

    /// Starts the vCPUs.
    pub fn start(&mut self) -> Result<(), MachineError> {
        kvm::register_kick_signal().map_err(MachineError::Host)?;
        for vcpu in self.vcpus.drain(..) {
            let thread = vcpu.spawn(self.buses.clone(), self.exit.clone()).map_err(MachineError::Host)?;
            self.threads.push(thread);
        }
        Ok(())
    }

    /// Raised when the guest ends.
    pub fn exit(&self) -> &ExitSignal {
        &self.exit
    }

    /// The vsock device, if there is one.
    pub fn vsock(&self) -> Option<&VsockHandle> {
        self.builder.vsock()
    }

    /// The virtio-mem device, if there is one.
    pub fn memory(&self) -> Option<&MemHandle> {
        self.builder.memory()
    }

    /// Builds a device over images, which may take long; `done` gets it in another thread, for [`Self::add_built`].
    pub fn build_pmem(&self, images: &[Image], mut fds: Descriptors, done: OnBuilt) -> Result<(), MachineError> {
        Ok(self.builder.build_pmem(images, &mut fds, done)?)
    }

    /// Puts a device that was built before into the first empty slot, as [`Self::add_device`] does.
    pub fn add_built(&mut self, device: Box<dyn VirtioDevice>) -> Result<u8, MachineError> {
        self.slots.add_built(&self.vm, device)
    }

    /// Puts a device into the first empty slot of the running machine and returns the slot's number. Not one over images, see
    /// [`Self::build_pmem`].
    pub fn add_device(&mut self, spec: &DeviceSpec, fds: Descriptors) -> Result<u8, MachineError> {
        self.slots.add(&self.vm, &mut self.builder, spec, fds)
    }

    /// Takes the device out of a slot, with no regard to what the guest does with it.
    pub fn remove_device(&mut self, number: u8) -> Result<(), MachineError> {
        self.slots.remove(&self.vm, number)
    }

    /// What the devices have counted.
    pub fn counters(&self) -> Vec<DeviceCounters> {
        self.slots.counters()
    }

    /// Stops the vCPUs and waits for their threads; returns what made them exit to the VMM.
    pub fn stop(&mut self) -> ExitCounts {
        for thread in &self.threads {
            if let Err(error) = thread.kick() {
                crate::vmm_log!("cannot signal a vCPU's thread: {error}");
            }
        }
        let vcpus = self.threads.drain(..).filter_map(VcpuThread::join);
        vcpus.fold(ExitCounts::default(), |sum, vcpu| sum + vcpu.exit_counts())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What can be said about a spec without looking at anything else.
fn validate(spec: &VmSpec) -> Result<(), MachineError> {
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        return Err(MachineError::Vcpus(spec.vcpus));
    }
    if !(1..=spec.vcpus).contains(&spec.boot_vcpus) {
        return Err(MachineError::BootVcpus { boot: spec.boot_vcpus, all: spec.vcpus });
    }
    if spec.devices.len() > SLOTS {
        return Err(MachineError::TooManyDevices(spec.devices.len()));
    }
    Ok(())
}

/// Slots that have a disk, or may come to have one.
fn most_disks(spec: &VmSpec) -> usize {
    let others = spec.devices.iter().filter(|device| !matches!(device, DeviceSpec::Block { .. })).count();
    SLOTS.saturating_sub(others)
}

/// The keyboard controller's reset, and the serial port if the spec has one.
fn build_pio(vm: &Vm, spec: &VmSpec, fds: &mut Descriptors, exit: &Arc<ExitSignal>) -> Result<Bus, MachineError> {
    let mut bus = Bus::new();
    bus.insert(layout::I8042_PORT, I8042_PORTS, Arc::new(Mutex::new(I8042::new(exit.clone()))))?;
    if let Some(index) = spec.serial {
        let output = Output::new(fds.take(index, "serial port")?).map_err(|error| MachineError::Host(error.into()))?;
        let irq = vm.irq_line(layout::SERIAL_IRQ);
        bus.insert(layout::SERIAL_PORT, SERIAL_PORTS, Arc::new(Mutex::new(SerialPort::new(irq, output))))?;
    }
    Ok(bus)
}
