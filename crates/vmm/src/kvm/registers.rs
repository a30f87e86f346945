//! Registers of a vCPU at the moment when the guest starts.
//!
//! Xen's docs/misc/pvh.pandoc, section "x86/HVM direct boot ABI".

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use super::{KvmError, call};
use crate::layout::{self, DESCRIPTORS, Entry};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back unless one says otherwise. With them off all memory would be uncached to the guest.
const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_EXTINT: u8 = 7;
const APIC_MODE_NMI: u8 = 4;

/// Segments of the [`DESCRIPTORS`], which are these once more.
const CODE: u16 = 1;
const DATA: u16 = 2;
const TASK: u16 = 3;

/// Sets up a vCPU; only the one that boots has an entry.
pub fn set_up(fd: &VcpuFd, entry: Option<Entry>) -> Result<(), KvmError> {
    set_msrs(fd)?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    fd.set_fpu(&fpu).map_err(call("KVM_SET_FPU"))?;
    set_local_interrupts(fd)?;
    match entry {
        Some(entry) => {
            set_system_registers(fd)?;
            fd.set_regs(&general_registers(entry)).map_err(call("KVM_SET_REGS"))
        }
        None => Ok(()),
    }
}

fn set_msrs(fd: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let list = [entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK)];
    let msrs = Msrs::from_entries(&list).map_err(|_| KvmError::CpuidFull)?;
    // KVM stops at the first register that it does not know; neither is vital, so a short count is not an error.
    fd.set_msrs(&msrs).map_err(call("KVM_SET_MSRS")).map(drop)
}

/// The legacy interrupt controller on LINT0, NMI on LINT1, as the MP table says.
fn set_local_interrupts(fd: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
    set_delivery_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
    set_delivery_mode(&mut lapic, APIC_LVT_LINT1, APIC_MODE_NMI);
    fd.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))
}

/// Bits 8 to 10 of a local vector table register.
fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u8) {
    if let Some(byte) = lapic.regs.get_mut(register + 1) {
        let kept = byte.to_ne_bytes()[0] & !7;
        *byte = std::ffi::c_char::from_ne_bytes([kept | mode]);
    }
}

fn general_registers(Entry(address): Entry) -> kvm_regs {
    kvm_regs { rip: address, rbx: layout::BOOT_INFO, rflags: 2, ..Default::default() }
}

fn set_system_registers(fd: &VcpuFd) -> Result<(), KvmError> {
    let mut sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let data = segment(DATA, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cs = segment(CODE, 0xb);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..segment(TASK, 0xb) };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&DESCRIPTORS) - 1).unwrap_or(u16::MAX);
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.cr3 = 0;
    sregs.efer = 0;
    fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))
}

/// A flat segment of 32 bits. `kind` is the type field of its descriptor (Intel SDM volume 3A, section 3.4.5.1).
fn segment(index: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index << 3,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lint_delivery_modes_keep_the_other_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT_LINT0 + 1] = 0x10;
        set_delivery_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
        set_delivery_mode(&mut lapic, APIC_LVT_LINT1, APIC_MODE_NMI);
        assert_eq!((lapic.regs[APIC_LVT_LINT0 + 1], lapic.regs[APIC_LVT_LINT1 + 1]), (0x17, 4));
    }

    #[test]
    fn pvh_entry_finds_its_start_info_in_ebx() {
        let regs = general_registers(Entry(0x100_0000));
        assert_eq!((regs.rip, regs.rbx, regs.rflags), (0x100_0000, layout::BOOT_INFO, 2));
    }
}
