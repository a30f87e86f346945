//! Registers that the guest reads as memory. KVM gives the guest their page for reading alone (KVM_MEM_READONLY,
//! Documentation/virt/kvm/api.rst, 4.35): reading is no exit, and a write is one, as where there is no memory. So what the guest
//! reads is what was stored here last, and nothing else in the page is anything but zero.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

use crate::layout::{PAGE_SIZE, READABLE_REGISTERS};

/// The page that ends with the readable registers of a slot. A register is named by its offset in the slot; those that are not
/// in the page read as 0 and stay so.
pub struct RegisterPage(MmapRegion);

impl RegisterPage {
    /// A page of zeros.
    pub fn new() -> io::Result<Self> {
        let size = usize::try_from(PAGE_SIZE).map_err(io::Error::other)?;
        MmapRegion::new(size).map(Self).map_err(io::Error::other)
    }

    /// The page, for KVM.
    pub fn memory(&self) -> VolatileSlice<'_> {
        self.0.as_volatile_slice()
    }

    /// What the guest reads.
    pub fn load(&self, register: u64) -> u32 {
        self.word(register).map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    /// Shows the guest a value.
    pub fn store(&self, register: u64, value: u32) {
        if let Some(word) = self.word(register) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    /// Sets bits, whoever else does so at the time.
    pub fn set(&self, register: u64, bits: u32) {
        if let Some(word) = self.word(register) {
            word.fetch_or(bits.to_le(), Ordering::SeqCst);
        }
    }

    /// Clears bits, whoever else does so at the time.
    pub fn clear(&self, register: u64, bits: u32) {
        if let Some(word) = self.word(register) {
            word.fetch_and(!bits.to_le(), Ordering::SeqCst);
        }
    }

    fn word(&self, register: u64) -> Option<&AtomicU32> {
        let from_end = READABLE_REGISTERS.checked_sub(register)?;
        self.0.get_atomic_ref(usize::try_from(PAGE_SIZE.checked_sub(from_end)?).ok()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_the_end_of_the_page_and_nothing_behind_it() {
        let page = RegisterPage::new().unwrap();
        page.store(0, 1);
        page.store(0x60, 0x0403_0201);
        for register in [0x64, 0x61, 0x1000, u64::MAX] {
            page.store(register, u32::MAX);
            page.set(register, u32::MAX);
            assert_eq!(page.load(register), 0, "{register:#x}");
        }
        page.set(0x60, 0x10);
        page.clear(0x60, 1);
        assert_eq!((page.load(0), page.load(0x60)), (1, 0x0403_0210));
        let mut bytes = [0xff_u8; 0x1000];
        page.memory().copy_to(&mut bytes[..]);
        assert_eq!((&bytes[0xffc..], bytes[0xf9c]), (&[0x10, 2, 3, 4][..], 1));
        assert_eq!(bytes.iter().filter(|byte| **byte != 0).count(), 5);
    }
}
