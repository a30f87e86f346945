//! The virtual machine as KVM has it: memory slots, interrupt controllers, vCPUs. All of the VMM's dealings with
//! /dev/kvm are in this module (Documentation/virt/kvm/api.rst).
#![allow(unsafe_code)] // reason: descriptors become KVM's, and KVM is given host addresses; the modules below say theirs

mod cpuid;
mod error;
mod hotplug;
mod images;
mod memory_slot;
mod registers;
#[cfg(test)]
mod tests;
mod vcpu;

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_CAP_X86_NOTIFY_VMEXIT, KVM_MAX_CPUID_ENTRIES,
    KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, KVM_X86_NOTIFY_VMEXIT_ENABLED, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

pub use error::KvmError;
use error::call;
pub use hotplug::HotplugMemory;
pub use images::{ImageError, ImageMemory, ImageSpace};
use memory_slot::{set_read_only, set_slot};
pub use vcpu::{Buses, ExitCounts, Vcpu, VcpuThread, register_kick_signal};

use crate::irq::IrqLine;
use crate::layout::{self, Entry, SLOTS};
use crate::memory::Memory;
use crate::register_page::RegisterPage;

/// What a machine cannot do without.
const NEEDED: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// A virtual machine without vCPUs.
pub struct Vm {
    // Declared before `memory` and `register_pages`, so that KVM lets go of the mappings first.
    fd: Arc<VmFd>,
    kvm: Kvm,
    cpuid: CpuId,
    memory: Memory,
    /// One for each virtio-mmio slot.
    register_pages: Vec<Arc<RegisterPage>>,
}

impl Vm {
    /// Creates a machine with in-kernel interrupt controllers and timer from an open /dev/kvm. Memory from `hotplug_start`
    /// on is not the guest's yet, see [`Self::hotplug_memory`].
    pub fn new(kvm: OwnedFd, memory: Memory, hotplug_start: u64) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned, and ownership moves to `Kvm`. If it is not /dev/kvm, the ioctls fail.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(KvmError::NotKvm(version));
        }
        if let Some((_, name)) = NEEDED.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmError::Missing(name));
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let fd = create_vm(|| kvm.create_vm())?;
        if let Some(switch) = pmu_switch(fd.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into())) {
            fd.enable_cap(&switch).map_err(call("KVM_ENABLE_CAP for KVM_CAP_PMU_CAPABILITY"))?;
        }
        if let Some(switch) = notify_switch(fd.check_extension_raw(KVM_CAP_X86_NOTIFY_VMEXIT.into())) {
            fd.enable_cap(&switch).map_err(call("KVM_ENABLE_CAP for KVM_CAP_X86_NOTIFY_VMEXIT"))?;
        }
        // Only Intel hosts without unrestricted guests use it, but it must come before the vCPUs everywhere.
        fd.set_tss_address(layout::KVM_TSS).map_err(call("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        // The dummy speaker port keeps the guest's reads of port 0x61 in the kernel.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(call("KVM_CREATE_PIT2"))?;
        register_memory(&fd, &memory, hotplug_start)?;
        let register_pages = register_pages(&fd)?;
        Ok(Self { fd: Arc::new(fd), kvm, cpuid, memory, register_pages })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The pages of the slots' readable registers, in the slots' order.
    pub fn register_pages(&self) -> &[Arc<RegisterPage>] {
        &self.register_pages
    }

    /// What can be plugged into the machine, if anything can.
    pub fn hotplug_memory(&self, start: u64) -> Result<Option<HotplugMemory>, KvmError> {
        HotplugMemory::new(self.fd.clone(), self.memory.clone(), start).map_err(KvmError::Hotplug)
    }

    /// Where images of read-only file systems can be: from `start` to the end of what the processor can address.
    pub fn image_space(&self, start: u64) -> ImageSpace {
        let end = 1_u64.checked_shl(cpuid::address_bits(&self.cpuid)).unwrap_or(u64::MAX);
        ImageSpace::new(self.fd.clone(), self.memory.clone(), start..end)
    }

    /// A pin of the I/O APIC.
    pub fn irq_line(&self, pin: u32) -> Box<dyn IrqLine> {
        Box::new(Pin { vm: self.fd.clone(), number: pin })
    }

    /// Makes the guest's write of the 32-bit `value` to `address` a write to `event`, without an exit.
    pub fn register_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd.register_ioevent(event, &IoEventAddress::Mmio(address), value).map_err(call("KVM_IOEVENTFD"))
    }

    /// Undoes [`Self::register_doorbell`].
    pub fn unregister_doorbell(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd.unregister_ioevent(event, &IoEventAddress::Mmio(address), value).map_err(call("KVM_IOEVENTFD"))
    }

    /// Creates vCPU `id` of `count`. The first one starts at `entry`, the others wait for its INIT and startup IPI.
    pub fn create_vcpu(&self, id: u8, count: u8, entry: Entry) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(call("KVM_CREATE_VCPU"))?;
        let deadline_timer = self.kvm.check_extension(Cap::TscDeadlineTimer);
        let topology = cpuid::Topology { id, count };
        fd.set_cpuid2(&cpuid::for_vcpu(&self.cpuid, topology, deadline_timer)?).map_err(call("KVM_SET_CPUID2"))?;
        registers::set_up(&fd, (id == 0).then_some(entry))?;
        Ok(Vcpu::new(id, fd))
    }
}

/// Raised by a request, and not by an eventfd (KVM_IRQFD): that has a thread of the kernel's to inject each interrupt of the I/O
/// APIC, which is woken for it.
struct Pin {
    vm: Arc<VmFd>,
    number: u32,
}

impl IrqLine for Pin {
    fn pulse(&self) {
        for active in [true, false] {
            // There is such a pin, and no other reason to fail.
            let _ = self.vm.set_irq_line(self.number, active);
        }
    }
}

/// KVM_CREATE_VM, which a pending signal interrupts.
fn create_vm<T>(mut create: impl FnMut() -> Result<T, errno::Error>) -> Result<T, KvmError> {
    loop {
        match create() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(call("KVM_CREATE_VM")),
        }
    }
}

/// The KVM switch that turns the performance counters off; `None` if this KVM has no such switch (before Linux 5.18) or no
/// counters. `switches` is what KVM_CHECK_EXTENSION answers. On Intel, hiding the counters in CPUID is enough. On AMD the first
/// four exist without being listed there, and the guest could use them. Must be set before the first vCPU is made.
fn pmu_switch(switches: i32) -> Option<kvm_enable_cap> {
    let has_it = u32::try_from(switches).is_ok_and(|switches| switches & KVM_PMU_CAP_DISABLE != 0);
    has_it.then(|| kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
        ..Default::default()
    })
}

/// The KVM switch that makes the processor leave a guest which lets no event in; `None` if this KVM (before Linux 6.0) or the
/// processor cannot do that. Without it a guest could make the processor deliver one exception after the other without end, and
/// the node would lose that CPU. The window adds nothing to the processor's own threshold, which no honest guest reaches. KVM
/// serves the host's interrupts and then continues the guest by itself. It reports only a guest that it cannot continue, and we
/// end that one as after any other fatal exit. Must be set before the first vCPU is made.
fn notify_switch(answer: i32) -> Option<kvm_enable_cap> {
    /// The upper half of the argument is the window.
    const WINDOW: u64 = 0;
    (answer > 0).then(|| kvm_enable_cap {
        cap: KVM_CAP_X86_NOTIFY_VMEXIT,
        args: [WINDOW << 32 | u64::from(KVM_X86_NOTIFY_VMEXIT_ENABLED), 0, 0, 0],
        ..Default::default()
    })
}

/// Gives the guest the page of each slot's readable registers.
fn register_pages(fd: &VmFd) -> Result<Vec<Arc<RegisterPage>>, KvmError> {
    let one = |(slot, number): (usize, u32)| {
        let page = RegisterPage::new().map_err(KvmError::RegisterPage)?;
        set_read_only(fd, &page, number, layout::register_page(slot))?;
        Ok(Arc::new(page))
    };
    (0..SLOTS).zip(memory_slot::REGISTER_PAGES..).map(one).collect()
}

/// Gives KVM each region of the boot memory as a slot.
fn register_memory(fd: &VmFd, memory: &Memory, end: u64) -> Result<(), KvmError> {
    let boot = memory.iter().filter(|region| region.start_addr().raw_value() < end);
    for (slot, region) in (memory_slot::BOOT_MEMORY..).zip(boot) {
        set_slot(fd, memory, slot, region.start_addr().raw_value(), region.len())?;
    }
    Ok(())
}
