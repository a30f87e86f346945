//! The command line.

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Bulkhead's virtual machine monitor.
#[derive(Parser)]
#[command(name = "bulkhead-vmm", version)]
pub struct Args {
    /// SEQPACKET socket to take commands from (service mode)
    #[arg(long, value_name = "FD")]
    pub control_fd: Option<RawFd>,

    /// What to do instead of service mode
    #[command(subcommand)]
    pub mode: Option<Mode>,
}

/// Modes.
#[derive(Subcommand)]
pub enum Mode {
    /// Run a machine by hand; its console goes to standard output
    Run(RunOptions),

    /// Print the system calls that each kind of thread of a shim's machine may make: kind, their number, their names
    Filters,
}

/// Options of `run`.
#[derive(clap::Args)]
pub struct RunOptions {
    /// Uncompressed ELF kernel
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,

    /// Initramfs
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,

    /// Kernel parameters beyond those that the machine needs
    #[arg(long, value_name = "STRING", default_value = "console=hvc0")]
    pub cmdline: String,

    /// vCPUs
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u8,

    /// vCPUs that are online at boot [default: all]
    #[arg(long, value_name = "N")]
    pub boot_vcpus: Option<u8>,

    /// Memory
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub memory: u64,

    /// Disk image or block device; may be repeated
    #[arg(long, value_name = "FILE[:ro]")]
    pub disk: Vec<String>,

    /// Name of a tap device that exists or that may be created
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,

    /// MAC address of the guest's interface
    #[arg(long, value_name = "ADDRESS", default_value = "02:00:00:00:00:01", requires = "tap")]
    pub mac: String,

    /// Directory to export by virtio-fs, tag "share"
    #[arg(long, value_name = "DIR")]
    pub share: Option<PathBuf>,

    /// Add a vsock device
    #[arg(long)]
    pub vsock: bool,

    /// Add a serial port, with the kernel's console on it, to standard output
    #[arg(long)]
    pub serial: bool,

    /// Print how long the steps took and how often the vCPUs left KVM
    #[arg(long)]
    pub timing: bool,
}
