//! Descriptor and page tables that the entries of a kernel expect to be there.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::kvm::{Entry, gdt};
use crate::layout::{GDT, PAGE_TABLES};
use crate::memory::Memory;

const PAGE: u64 = 0x1000;
const PRESENT_WRITABLE: u64 = 3;
const LARGE_PAGE: u64 = 1 << 7;

/// Writes what `entry` needs.
pub fn write(memory: &Memory, entry: Entry) -> Result<(), BootError> {
    let long = matches!(entry, Entry::Long { .. });
    write_words(memory, GDT, &gdt(long))?;
    if long {
        write_page_tables(memory)?;
    }
    Ok(())
}

/// Maps the lowest GiB one to one with pages of 2 MiB.
fn write_page_tables(memory: &Memory) -> Result<(), BootError> {
    let (pointers, directory) = (PAGE_TABLES + PAGE, PAGE_TABLES + 2 * PAGE);
    write_words(memory, PAGE_TABLES, &[pointers | PRESENT_WRITABLE])?;
    write_words(memory, pointers, &[directory | PRESENT_WRITABLE])?;
    let pages: Vec<u64> = (0..512).map(|i| (i << 21) | LARGE_PAGE | PRESENT_WRITABLE).collect();
    write_words(memory, directory, &pages)
}

fn write_words(memory: &Memory, address: u64, words: &[u64]) -> Result<(), BootError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(address)).map_err(BootError::Write)
}
