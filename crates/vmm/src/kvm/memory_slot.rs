//! One slot of KVM's for the guest's memory (Documentation/virt/kvm/api.rst, 4.35).
#![allow(unsafe_code)] // reason: KVM is given an address of the host

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemory};

use super::error::{KvmError, call};
use crate::layout::SLOTS;
use crate::memory::Memory;
use crate::register_page::RegisterPage;

// KVM's numbers of memory slots, by what they are for: each of these and those after it, up to the next.

/// The page of each device slot's readable registers.
pub const REGISTER_PAGES: u32 = 0;
/// Images of file systems, of at most as many devices.
pub const IMAGES: u32 = 16;
/// Memory that is there from the start: below the gap and above it.
pub const BOOT_MEMORY: u32 = 32;
/// Memory that is plugged, a block each.
pub const PLUGGED_MEMORY: u32 = 34;

const _: () = assert!((IMAGES - REGISTER_PAGES) as usize == SLOTS && (BOOT_MEMORY - IMAGES) as usize == SLOTS);

/// Makes a slot of memory at `address`; one of no length deletes it.
pub fn set_slot(fd: &VmFd, memory: &Memory, slot: u32, address: u64, len: u64) -> Result<(), KvmError> {
    let unmapped = || KvmError::Missing("host mapping of the guest's memory");
    let size = usize::try_from(len).map_err(|_| unmapped())?;
    let slice = memory.get_slice(GuestAddress(address), size).map_err(|_| unmapped())?;
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: address,
        memory_size: len,
        userspace_addr: slice.ptr_guard_mut().as_ptr() as u64,
    };
    // SAFETY: the range is a mapping that `memory` owns, and whoever holds `fd` drops it before `memory`. The vCPUs hold
    // the VM in the kernel, but they run only as long as their `VcpuFd`, whose owner holds the `Vm`.
    unsafe { fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
}

/// Gives the guest a page at `address` for reading alone.
pub fn set_read_only(fd: &VmFd, page: &RegisterPage, slot: u32, address: u64) -> Result<(), KvmError> {
    let memory = page.memory();
    let region = kvm_userspace_memory_region {
        slot,
        flags: KVM_MEM_READONLY,
        guest_phys_addr: address,
        memory_size: memory.len() as u64,
        userspace_addr: memory.ptr_guard().as_ptr() as u64,
    };
    // SAFETY: the range is a mapping that the page owns, and the `Vm` keeps the page. The kernel looks there for vCPUs that run
    // only, and those run as long as their `VcpuFd`, whose owner holds the `Vm`.
    unsafe { fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
}
