//! The kernel command line: what this machine needs, then the caller's.

use std::ffi::CString;
use std::fmt::Write;

use bulkhead_protocol::vmspec::VmSpec;

use crate::layout::{self, CMDLINE_MAX};

/// Parameters that every guest gets (Documentation/admin-guide/kernel-parameters.txt):
///
/// - `reboot=k panic=-1`: the guest ends by the keyboard controller's reset, and so it does at once after a panic; a triple
///   fault is an accident then, and told;
/// - `tsc=reliable`: KVM keeps the vCPUs' TSCs in step, so no watchdog wakes an idle guest, and a vCPU comes online
///   without measuring its TSC against another one that may not even be running;
/// - `memory_hotplug.online_policy=auto-movable`: as much of the plugged memory as is safe holds only what can be moved out
///   of it, so that it can be unplugged (Documentation/admin-guide/mm/memory-hotplug.rst).
const MACHINE: &str = "reboot=k panic=-1 tsc=reliable memory_hotplug.online_policy=auto-movable";

/// Builds the command line.
pub fn build(spec: &VmSpec) -> Result<CString, CmdlineError> {
    let mut line = format!("{MACHINE} maxcpus={}", spec.boot_vcpus);
    for (slot, irq) in layout::SLOT_IRQS.iter().enumerate() {
        // Writing to a String does not fail.
        let _ = write!(line, " virtio_mmio.device=4K@{:#x}:{irq}", layout::slot_address(slot));
    }
    // Each line on a console costs several exits; who asks for a serial port wants to see them.
    line.push_str(if spec.serial.is_some() { " console=ttyS0 earlyprintk=ttyS0,115200" } else { " quiet" });
    if !spec.cmdline.is_empty() {
        line.push(' ');
        line.push_str(&spec.cmdline);
    }
    if let Some(byte) = line.bytes().find(|byte| byte.is_ascii_control()) {
        return Err(CmdlineError::Control(byte));
    }
    if line.len() >= CMDLINE_MAX {
        return Err(CmdlineError::TooLong(line.len()));
    }
    CString::new(line).map_err(|_| CmdlineError::Control(0))
}

/// A command line that the kernel would not take as it was meant.
#[derive(Debug, thiserror::Error)]
pub enum CmdlineError {
    /// It would be cut off.
    #[error("kernel command line has {0} bytes with the machine's own parameters; at most {limit} fit", limit = CMDLINE_MAX - 1)]
    TooLong(usize),
    /// A NUL would end it early, a line feed has no meaning in it.
    #[error("kernel command line has a control character ({0:#04x})")]
    Control(u8),
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_protocol::vmspec::FdIndex;

    fn spec(cmdline: &str) -> VmSpec {
        VmSpec {
            kvm: FdIndex(0),
            kernel: FdIndex(1),
            initramfs: None,
            cmdline: cmdline.into(),
            vcpus: 2,
            boot_vcpus: 1,
            memory_mib: 128,
            hotplug_mib: 0,
            devices: vec![],
            serial: None,
        }
    }

    #[test]
    fn every_slot_is_declared_and_the_callers_part_comes_last() {
        let line = build(&spec("console=hvc0 init=/x")).unwrap().into_string().unwrap();
        assert_eq!(line.matches("virtio_mmio.device=").count(), layout::SLOTS);
        assert!(line.contains(" virtio_mmio.device=4K@0xd0000f9c:16 "), "{line}");
        assert!(line.contains(" maxcpus=1 ") && line.ends_with(" console=hvc0 init=/x"), "{line}");
    }

    #[test]
    fn serial_port_gets_all_that_the_kernel_says() {
        let line = |serial| build(&VmSpec { serial, ..spec("") }).unwrap().into_string().unwrap();
        assert!(line(None).contains(" quiet"));
        let serial = line(Some(FdIndex(2)));
        assert!(serial.contains(" console=ttyS0 ") && !serial.contains("quiet"), "{serial}");
    }

    #[test]
    fn hostile_15_line_that_would_be_cut_or_split_is_refused() {
        assert!(matches!(build(&spec(&"x".repeat(CMDLINE_MAX))), Err(CmdlineError::TooLong(_))));
        assert!(matches!(build(&spec("a\0b")), Err(CmdlineError::Control(0))));
        assert!(matches!(build(&spec("a\nb")), Err(CmdlineError::Control(b'\n'))));
    }
}
