//! Loads an ELF kernel and finds its entry.

use std::fs::File;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{self, KernelLoader};
use vm_memory::{Address, GuestAddress};

use crate::kvm::Entry;
use crate::layout;
use crate::virtio::Memory;

/// A kernel in the guest's memory.
#[derive(Debug)]
pub struct Kernel {
    /// Where it starts.
    pub entry: Entry,
    /// First address beyond it.
    pub end: u64,
}

/// Loads `vmlinux` to the addresses that it names. The PVH entry is taken if there is one, else the 64-bit entry.
pub fn load(memory: &Memory, mut vmlinux: File) -> Result<Kernel, KernelError> {
    let floor = Some(GuestAddress(layout::HIGH_MEMORY_START));
    let loaded = Elf::load(memory.as_ref(), None, &mut vmlinux, floor).map_err(KernelError::Load)?;
    let entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh { address: address.raw_value() },
        _ => Entry::Long { address: loaded.kernel_load.raw_value() },
    };
    Ok(Kernel { entry, end: loaded.kernel_end })
}

/// What the loader has to say, without the names of its layers.
fn reason(error: &loader::Error) -> String {
    let text = match error {
        loader::Error::Elf(error) => error.to_string(),
        other => other.to_string(),
    };
    text.trim_start_matches("Kernel Loader: ").to_lowercase()
}

/// A kernel that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The loader refused it.
    #[error(
        "cannot load the kernel, which must be an uncompressed ELF vmlinux for x86-64 that fits the guest's memory: {}",
        reason(.0)
    )]
    Load(loader::Error),
}
