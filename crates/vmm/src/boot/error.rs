//! Why a guest cannot be made ready to start.

use vm_memory::GuestMemoryError;

use super::cmdline::CmdlineError;
use super::initramfs::InitramfsError;
use super::kernel::KernelError;

/// A guest that cannot be made ready to start.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// The guest's memory ends below the boot data, which the smallest memory size rules out.
    #[error("cannot write the boot data to the guest's memory")]
    Write(#[source] GuestMemoryError),
}
