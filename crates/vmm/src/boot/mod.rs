//! Puts a kernel into the guest's memory, with all that it looks for when it starts.

pub mod cmdline;
mod error;
mod initramfs;
mod kernel;
mod mptable;
mod params;

use std::fs::File;

use bulkhead_protocol::vmspec::VmSpec;
use vm_memory::{Bytes, GuestAddress};

pub use cmdline::CmdlineError;
pub use error::BootError;
pub use initramfs::InitramfsError;
pub use kernel::KernelError;

use crate::layout::{self, DESCRIPTORS, Entry};
use crate::memory::Memory;

/// Loads everything and returns where the first vCPU starts.
pub fn load(memory: &Memory, spec: &VmSpec, kernel: File, initramfs: Option<File>) -> Result<Entry, BootError> {
    let kernel = kernel::load(memory, kernel)?;
    let initramfs = initramfs.map(|file| initramfs::load(memory, file, kernel.end)).transpose()?;
    let cmdline = cmdline::build(spec)?;
    memory.write_slice(cmdline.as_bytes_with_nul(), GuestAddress(layout::CMDLINE)).map_err(BootError::Write)?;
    let map = params::memory_map(memory, layout::hotplug_start(spec.memory_mib));
    mptable::write(memory, spec.vcpus)?;
    params::write_start_info(memory, &map, initramfs)?;
    let descriptors = DESCRIPTORS.map(u64::to_le_bytes).concat();
    memory.write_slice(&descriptors, GuestAddress(layout::GDT)).map_err(BootError::Write)?;
    Ok(kernel.entry)
}
