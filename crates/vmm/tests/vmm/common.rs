//! Machines with payloads of a few bytes, small enough for any KVM, an emulating one included.

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, Read, Write};
use std::os::fd::OwnedFd;

use bulkhead_protocol::control::ExitReason;
use bulkhead_protocol::vmspec::{FdIndex, VmSpec};
use bulkhead_vmm::descriptors::Descriptors;
use bulkhead_vmm::machine::{Machine, MachineError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where the payloads are loaded and start.
pub const PAYLOAD: u64 = 0x10_0000;

/// An ELF kernel of `payload`, which starts in 32-bit protected mode without paging by a PVH note, and of `low` at 64 KiB if it
/// is not empty.
pub fn kernel(payload: &[u8], low: &[u8]) -> File {
    const HEADERS: u64 = 0x1000;
    let note =
        [4u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), u32::try_from(PAYLOAD).unwrap()].map(u32::to_le_bytes).concat();
    let body_len = |bytes: &[u8]| bytes.len() as u64;
    let mut body = note.clone();
    let mut segments = vec![segment(1, HEADERS + body_len(&body), PAYLOAD, body_len(payload))];
    body.extend(payload);
    if !low.is_empty() {
        segments.push(segment(1, HEADERS + body_len(&body), 0x1_0000, body_len(low)));
        body.extend(low);
    }
    segments.push(segment(4, HEADERS, 0, body_len(&note)));
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    elf.extend([PAYLOAD, 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers, no sections
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, u8::try_from(segments.len()).unwrap(), 0, 64, 0, 0, 0, 0, 0]);
    elf.extend(segments.concat());
    elf.resize(usize::try_from(HEADERS).unwrap(), 0);
    elf.extend(body);
    file(&elf)
}

fn segment(kind: u32, offset: u64, address: u64, len: u64) -> Vec<u8> {
    let words = [offset, address, address, len, len, 0x1000].map(u64::to_le_bytes).concat();
    [&kind.to_le_bytes()[..], &7u32.to_le_bytes(), &words].concat()
}

/// 32-bit code that starts the second vCPU, at 64 KiB in real mode.
pub fn start_second_vcpu() -> Vec<u8> {
    let mut code = Vec::new();
    // INIT, then STARTUP at page 0x10, to APIC id 1: mov dword [0xfee00310], 1 << 24; mov dword [0xfee00300], command
    for command in [0x4500_u32, 0x4610] {
        for (register, value) in [(0xfee0_0310_u32, 1 << 24), (0xfee0_0300, command)] {
            code.extend([0xc7, 0x05]);
            code.extend(register.to_le_bytes());
            code.extend(u32::to_le_bytes(value));
        }
    }
    code
}

/// A file with these bytes.
pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// /dev/kvm. These tests fail where there is none.
pub fn kvm() -> OwnedFd {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.expect("these tests need a /dev/kvm that can be opened").into()
}

/// A spec for the descriptors KVM, kernel and serial port.
pub fn spec() -> VmSpec {
    VmSpec {
        kvm: FdIndex(0),
        kernel: FdIndex(1),
        initramfs: None,
        cmdline: String::new(),
        vcpus: 1,
        boot_vcpus: 1,
        memory_mib: 16,
        hotplug_mib: 0,
        devices: vec![],
        serial: Some(FdIndex(2)),
    }
}

/// A machine that has been built, and what its serial port says.
pub fn build(spec: &VmSpec, kernel: File) -> Result<(Machine, PipeReader), MachineError> {
    let (reader, writer) = std::io::pipe().unwrap();
    let fds = Descriptors::new(vec![kvm(), kernel.into(), writer.into()]);
    Ok((Machine::build(spec, fds, Box::new(|| {}))?, reader))
}

/// Runs a kernel to its end; returns why it ended and what it printed.
pub fn run(spec: &VmSpec, kernel: File) -> (ExitReason, Vec<u8>) {
    let (mut machine, mut serial) = build(spec, kernel).unwrap();
    machine.start().unwrap();
    let reason = wait(&machine);
    drop(machine);
    let mut text = Vec::new();
    serial.read_to_end(&mut text).unwrap();
    (reason, text)
}

/// Waits for the guest's end.
pub fn wait(machine: &Machine) -> ExitReason {
    use std::os::fd::AsFd;
    let mut fds = [PollFd::from_borrowed_fd(machine.exit().as_fd(), PollFlags::IN)];
    // A payload takes milliseconds; a machine under heavy load some hundred times as long.
    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "the guest does not end");
    machine.exit().reason().unwrap()
}
