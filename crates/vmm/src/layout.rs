//! Where things are in the guest's physical address space, and which interrupts they have.
//!
//! ```text
//! 0           0x9fc00       1 MiB               3 GiB             4 GiB
//! | boot data | MP table .. | kernel, initramfs | slots, APICs    | the rest of the memory, what can be plugged, images
//! ```
//!
//! All of it is fixed: a template's guest (ARCHITECTURE.md, D7) must find the same machine wherever it is restored.

use bulkhead_protocol::vmspec::HOTPLUG_UNIT_MIB;

/// Where the first vCPU starts: the PVH entry of a kernel, in 32-bit protected mode without paging, with the address of the
/// start info in EBX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

/// End of usable conventional memory; above it are the BIOS areas of a PC, which are left out of the memory map.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Start of high memory, where kernels are loaded.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Start of the gap below 4 GiB. Memory that does not fit below continues at [`GAP_END`].
pub const GAP_START: u64 = 0xc000_0000;
/// End of the gap.
pub const GAP_END: u64 = 0x1_0000_0000;

/// Global descriptor table, for a kernel that looks before it has its own.
pub const GDT: u64 = 0x500;
/// What is in it: null, code, data and task, flat and of 32 bits (Intel SDM volume 3A, section 3.4.5).
pub const DESCRIPTORS: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
/// PVH start info.
pub const BOOT_INFO: u64 = 0x7000;
/// Memory map of the PVH start info.
pub const PVH_MEMMAP: u64 = 0x7800;
/// Module list of the PVH start info.
pub const PVH_MODULES: u64 = 0x7f00;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Size of the command line with its terminator: Linux's COMMAND_LINE_SIZE on x86, less what a kernel may put before it
/// (CONFIG_CMDLINE).
pub const CMDLINE_MAX: usize = 2048 - 256;
/// MP floating pointer and configuration table, in the area that a PC's BIOS ROM has.
pub const MP_TABLE: u64 = 0xf_0000;

/// I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM wants on Intel hosts (KVM_SET_TSS_ADDR), below the BIOS of a PC.
pub const KVM_TSS: usize = 0xfffb_d000;

/// Where the virtio-mmio slots are.
pub const SLOTS_START: u64 = 0xd000_0000;
/// Size of a slot: registers and configuration.
pub const SLOT_SIZE: u64 = 0x1000;
/// From one slot to the next. A slot begins so far before a page's end that its first [`READABLE_REGISTERS`] bytes are in that
/// page, which is [`register_page`], and the rest in the one behind it.
pub const SLOT_STRIDE: u64 = 0x2000;
/// How many bytes of a slot the guest reads as memory, without an exit: the registers before InterruptACK, of which
/// InterruptStatus is read in each interrupt. The driver writes to them as to the others.
pub const READABLE_REGISTERS: u64 = 0x64;
/// A page.
pub const PAGE_SIZE: u64 = 0x1000;
/// Number of slots.
pub const SLOTS: usize = 16;
/// Interrupt of each slot, all edge-triggered: the I/O APIC pins beyond the ISA ones first, then those ISA ones that no
/// PC device of ours has (not 0 timer, 1 keyboard, 2 cascade, 3 and 4 serial, 8 clock, 12 mouse, 13 coprocessor).
pub const SLOT_IRQS: [u8; SLOTS] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 9, 10, 11, 14, 15];
/// Pins of the I/O APIC.
pub const IRQ_PINS: u8 = 24;

/// First port of COM1.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Interrupt of COM1.
pub const SERIAL_IRQ: u32 = 4;
/// First port of the keyboard controller.
pub const I8042_PORT: u64 = 0x60;

/// Unit in bytes in which memory is plugged, and in which KVM is told of it.
pub const MEMORY_BLOCK: u64 = HOTPLUG_UNIT_MIB << 20;

/// Start of the memory that can be plugged into a guest with `memory_mib` of boot memory: behind all of that, above the
/// gap, and at a boundary that suits a memory block of any size that Linux may choose.
pub fn hotplug_start(memory_mib: u64) -> u64 {
    let beyond_gap = (memory_mib << 20).saturating_sub(GAP_START);
    (GAP_END + beyond_gap).next_multiple_of(2 << 30)
}

/// Start of what images of read-only file systems can be shown in, to a guest with `memory_mib` of boot memory and `hotplug_mib`
/// that can be plugged: behind all of that, at such a boundary.
pub fn images_start(memory_mib: u64, hotplug_mib: u64) -> u64 {
    (hotplug_start(memory_mib) + (hotplug_mib << 20)).next_multiple_of(2 << 30)
}

/// Address of the page that ends with a slot's readable registers.
pub fn register_page(slot: usize) -> u64 {
    SLOTS_START + slot as u64 * SLOT_STRIDE
}

/// Base address of a slot.
pub fn slot_address(slot: usize) -> u64 {
    register_page(slot) + PAGE_SIZE - READABLE_REGISTERS
}
