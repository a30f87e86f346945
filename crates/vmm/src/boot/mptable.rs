//! The MP table: vCPUs, I/O APIC and interrupts, for a machine without ACPI (Intel MultiProcessor Specification 1.4).
//!
//! All pins of the I/O APIC are listed as interrupts of an ISA bus, which are edge-triggered and active high: what an
//! [`IrqLine`](crate::irq::IrqLine) is.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::layout::{IOAPIC, IRQ_PINS, LOCAL_APIC, MP_TABLE};
use crate::memory::Memory;

const SPEC_REVISION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const ISA_BUS: u8 = 0;
const LINT_ALL_APICS: u8 = 0xff;

/// Interrupt types of table 4-10.
#[derive(Clone, Copy)]
enum Kind {
    Vectored = 0,
    Nmi = 1,
    External = 3,
}

/// Writes the floating pointer and the table behind it.
pub fn write(memory: &Memory, vcpus: u8) -> Result<(), BootError> {
    let table = table(vcpus);
    let pointer = floating_pointer(MP_TABLE + 16);
    memory.write_slice(&[pointer.to_vec(), table].concat(), GuestAddress(MP_TABLE)).map_err(BootError::Write)
}

/// Section 4.1.
fn floating_pointer(table: u64) -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&u32::try_from(table).unwrap_or(0).to_le_bytes());
    pointer[8] = 1; // length in paragraphs
    pointer[9] = SPEC_REVISION;
    pointer[10] = checksum(&pointer);
    pointer
}

/// Section 4.2 and 4.3.
fn table(vcpus: u8) -> Vec<u8> {
    let ioapic = vcpus; // the first id that no vCPU has
    let mut entries = Vec::new();
    for id in 0..vcpus {
        let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
        entries.push(processor(id, flags));
    }
    entries.push([&[1, ISA_BUS], &b"ISA   "[..]].concat());
    entries.push([&[2, ioapic, IOAPIC_VERSION, 1], &IOAPIC.to_le_bytes()[..]].concat());
    for pin in 0..IRQ_PINS {
        entries.push(interrupt(3, Kind::Vectored, pin, ioapic, pin));
    }
    entries.push(interrupt(4, Kind::External, 0, 0, 0));
    entries.push(interrupt(4, Kind::Nmi, 0, LINT_ALL_APICS, 1));

    let mut table = vec![0; 44];
    let count = u16::try_from(entries.len()).unwrap_or(u16::MAX);
    table.extend(entries.concat());
    let len = u16::try_from(table.len()).unwrap_or(u16::MAX);
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&len.to_le_bytes());
    table[6] = SPEC_REVISION;
    table[8..16].copy_from_slice(b"BULKHEAD");
    table[16..28].copy_from_slice(b"VM          ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    table[7] = checksum(&table);
    table
}

/// Processor entry. The signature and feature words are those of the specification's example: Linux reads neither.
fn processor(id: u8, flags: u8) -> Vec<u8> {
    let mut entry = vec![0, id, APIC_VERSION, flags];
    entry.extend(0x600_u32.to_le_bytes());
    entry.extend(0x201_u32.to_le_bytes()); // APIC and FPU on chip
    entry.extend([0; 8]);
    entry
}

/// Interrupt entry, for the I/O APIC (3) or a local one (4); polarity and trigger mode are those of the bus.
fn interrupt(entry: u8, kind: Kind, source: u8, apic: u8, pin: u8) -> Vec<u8> {
    vec![entry, kind as u8, 0, 0, ISA_BUS, source, apic, pin]
}

/// The byte that makes the sum zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::HIGH_MEMORY_START;
    use bulkhead_protocol::vmspec::MAX_VCPUS;

    #[test]
    fn checksums_are_zero_and_the_largest_table_fits() {
        for vcpus in [1, 2, MAX_VCPUS] {
            let table = table(vcpus);
            assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(usize::from(table[34]), usize::from(vcpus) + 2 + 24 + 2);
            assert!(MP_TABLE + 16 + table.len() as u64 <= HIGH_MEMORY_START);
        }
        assert_eq!(floating_pointer(MP_TABLE + 16).iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    }
}
