//! The machine on a real /dev/kvm, with payloads of a few instructions.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

use bulkhead_protocol::control::ExitReason;
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex};
use bulkhead_vmm::descriptors::Descriptors;
use bulkhead_vmm::machine::{Machine, MachineError};

use crate::common::{build, kernel, run, spec, start_second_vcpu, wait};

/// `ud2` without an interrupt table: a triple fault.
const TRIPLE_FAULT: [u8; 2] = [0x0f, 0x0b];
/// `jmp .`
const SPIN: [u8; 2] = [0xeb, 0xfe];
/// `mov al, 0xfe; out 0x64, al`
const KEYBOARD_RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];

/// 32-bit code that writes a byte to the serial port.
fn print(byte: u8) -> Vec<u8> {
    vec![0x66, 0xba, 0xf8, 0x03, 0xb0, byte, 0xee] // mov dx, 0x3f8; mov al, byte; out dx, al
}

/// 32-bit code that prints the register of slot `slot` at `offset`, byte by byte.
fn print_register(slot: u32, offset: u32) -> Vec<u8> {
    let address = 0xd000_0f9c + slot * 0x2000 + offset;
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xa1]; // mov dx, 0x3f8; mov eax, [address]
    code.extend(address.to_le_bytes());
    for _ in 0..4 {
        code.extend([0xee, 0xc1, 0xe8, 0x08]); // out dx, al; shr eax, 8
    }
    code
}

#[test]
fn triple_fault_is_a_reset() {
    let code = [&print(b'.')[..], &TRIPLE_FAULT].concat();
    assert_eq!(run(&spec(), kernel(&code, &[])), (ExitReason::Reset, b".".to_vec()));
}

#[test]
fn pvh_kernel_finds_magic_and_empty_slots() {
    let code = [print_register(0, 0), print_register(15, 8), TRIPLE_FAULT.to_vec()].concat();
    assert_eq!(run(&spec(), kernel(&code, &[])), (ExitReason::Reset, b"virt\0\0\0\0".to_vec()));
}

#[test]
fn device_has_the_slot_of_its_place_in_the_spec() {
    let mut spec = spec();
    spec.devices = vec![DeviceSpec::Rng, DeviceSpec::Rng];
    let code = [print_register(1, 8), print_register(2, 8), TRIPLE_FAULT.to_vec()].concat();
    assert_eq!(run(&spec, kernel(&code, &[])).1, b"\x04\0\0\0\0\0\0\0");
}

#[test]
fn wild_accesses_to_the_bus_change_nothing() {
    let mut code = vec![0xa1, 0, 0, 0, 0xc0]; // mov eax, [0xc0000000]: nobody there
    code.extend([0xa2, 0x9d, 0x0f, 0x00, 0xd0]); // mov [0xd0000f9d], al: the second byte of a slot
    code.extend([0xa2, 0x01, 0x00, 0x00, 0xd0]); // mov [0xd0000001], al: before it in its page
    code.extend([0x66, 0xa1, 0xff, 0x0f, 0x00, 0xd0]); // mov ax, [0xd0000fff]: across its two pages
    code.extend([0x66, 0xa1, 0x9b, 0x1f, 0x00, 0xd0]); // mov ax, [0xd0001f9b]: across its end
    code.extend([0xe5, 0x99, 0xe6, 0x99]); // in eax, 0x99; out 0x99, al
    code.extend(print(b'.'));
    code.extend(TRIPLE_FAULT);
    assert_eq!(run(&spec(), kernel(&code, &[])), (ExitReason::Reset, b".".to_vec()));
}

/// What the guest's kernel does in an interrupt and to start a request.
#[test]
fn interrupts_and_doorbells_are_no_exits() {
    let mut spec = spec();
    spec.devices = vec![DeviceSpec::Rng];
    let mut code = vec![0xb9, 0xe8, 0x03, 0x00, 0x00]; // mov ecx, 1000
    code.extend([0xa1, 0xfc, 0x0f, 0x00, 0xd0]); // mov eax, [0xd0000ffc]: InterruptStatus
    code.extend([0xc7, 0x05, 0xec, 0x0f, 0x00, 0xd0, 0, 0, 0, 0]); // mov dword [0xd0000fec], 0: QueueNotify
    code.extend([0xe2, 0xef]); // loop
    code.extend([0xa3, 0x9c, 0x0f, 0x00, 0xd0]); // mov [0xd0000f9c], eax: MagicValue, which is an exit and changes nothing
    code.extend(print_register(0, 0));
    code.extend(TRIPLE_FAULT);
    let (mut machine, mut serial) = build(&spec, kernel(&code, &[])).unwrap();
    machine.start().unwrap();
    assert_eq!(wait(&machine), ExitReason::Reset);
    let exits = machine.stop().to_string();
    assert!(exits.starts_with("1 mmio, "), "{exits}");
    drop(machine);
    let mut text = String::new();
    serial.read_to_string(&mut text).unwrap();
    assert_eq!(text, "virt");
}

#[test]
fn keyboard_reset_ends_the_guest_and_stop_ends_a_vcpu_that_spins() {
    let mut spec = spec();
    spec.vcpus = 2; // the second one waits for its startup IPI in the kernel
    let code = [&KEYBOARD_RESET[..], &SPIN].concat();
    let (mut machine, _serial) = build(&spec, kernel(&code, &[])).unwrap();
    machine.start().unwrap();
    assert_eq!(wait(&machine), ExitReason::Reset);
    machine.stop();
    machine.stop();
}

/// Threads of this process with a vCPU; those of other tests too, which must not mind either.
fn vcpu_threads() -> Vec<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let vcpus = tasks.filter(|task| {
        // A thread may have ended meanwhile.
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("vcpu"))
    });
    vcpus.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
}

#[test]
fn hostile_27_signals_that_interrupt_kvm_change_nothing() {
    // mov ecx, 100000; in al, 0x99; loop back
    let mut code = vec![0xb9, 0xa0, 0x86, 0x01, 0x00, 0xe4, 0x99, 0xe2, 0xfc];
    code.extend(print(b'.'));
    code.extend(TRIPLE_FAULT);
    let (mut machine, mut serial) = build(&spec(), kernel(&code, &[])).unwrap();
    machine.start().unwrap();
    let mut sent = 0;
    while machine.exit().reason().is_none() {
        for thread in vcpu_threads() {
            // SAFETY: the call takes numbers only. A handler that does nothing was installed for the signal when the machine
            // was built, and a thread that has ended is an error.
            #[allow(unsafe_code)]
            let outcome = unsafe { libc::tgkill(libc::getpid(), thread, libc::SIGRTMIN()) };
            sent += i32::from(outcome == 0);
        }
    }
    assert!(sent > 100, "only {sent} signals");
    drop(machine);
    let mut text = String::new();
    serial.read_to_string(&mut text).unwrap();
    assert_eq!(text, ".");
}

#[test]
fn machine_that_was_never_started_can_be_dropped() {
    drop(build(&spec(), kernel(&SPIN, &[])).unwrap());
}

#[test]
fn second_vcpu_starts_by_its_startup_ipi() {
    let mut spec = spec();
    (spec.vcpus, spec.boot_vcpus) = (2, 2);
    let mut first = start_second_vcpu();
    first.extend([0x80, 0x3d, 0x00, 0x06, 0x00, 0x00, 0x00, 0x74, 0xf7]); // cmp byte [0x600], 0; je back
    first.extend(print(b'1'));
    first.extend(TRIPLE_FAULT);
    // Real mode: mov dx, 0x3f8; mov al, '2'; out dx, al; mov byte [0x600], 1; jmp .
    let mut second = vec![0xba, 0xf8, 0x03, 0xb0, b'2', 0xee, 0xc6, 0x06, 0x00, 0x06, 0x01];
    second.extend(SPIN);
    assert_eq!(run(&spec, kernel(&first, &second)), (ExitReason::Reset, b"21".to_vec()));
}

#[test]
fn bad_specs_are_refused_with_a_reason() {
    let refused = |change: fn(&mut bulkhead_protocol::vmspec::VmSpec)| {
        let mut spec = spec();
        change(&mut spec);
        match build(&spec, kernel(&SPIN, &[])) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        }
    };
    assert!(refused(|spec| spec.vcpus = 0).contains("0 vCPUs"));
    assert!(refused(|spec| spec.vcpus = 65).contains("65 vCPUs"));
    assert!(refused(|spec| spec.boot_vcpus = 2).contains("2 of 1 vCPUs"));
    assert!(refused(|spec| spec.memory_mib = 1).contains("1 MiB"));
    assert!(refused(|spec| spec.devices = vec![DeviceSpec::Rng; 17]).contains("17 devices"));
    assert!(refused(|spec| spec.kernel = FdIndex(9)).contains("descriptor 9 for the kernel"));
    assert!(refused(|spec| spec.kernel = FdIndex(0)).contains("used twice"));
    assert!(refused(|spec| spec.cmdline = "x".repeat(3000)).contains("command line"));
}

#[test]
fn what_is_no_kernel_or_no_kvm_is_refused_with_a_reason() {
    let Err(error) = build(&spec(), crate::common::file(b"not a kernel")) else { panic!("accepted") };
    assert!(error.to_string().contains("uncompressed ELF"), "{error}");

    let null = OwnedFd::from(File::open("/dev/null").unwrap());
    let fds = Descriptors::new(vec![null, kernel(&SPIN, &[]).into()]);
    let result = Machine::build(&spec(), fds, Box::new(|| {}));
    let Err(MachineError::Kvm(error)) = result else { panic!("accepted") };
    assert!(error.to_string().contains("/dev/kvm"), "{error}");
}

#[test]
fn initramfs_that_does_not_fit_is_refused() {
    let mut spec = spec();
    (spec.initramfs, spec.serial) = (Some(FdIndex(2)), None);
    let initramfs = tempfile::tempfile().unwrap();
    initramfs.set_len(16 << 20).unwrap();
    let fds = Descriptors::new(vec![crate::common::kvm(), kernel(&SPIN, &[]).into(), initramfs.into()]);
    let Err(error) = Machine::build(&spec, fds, Box::new(|| {})) else { panic!("accepted") };
    assert!(error.to_string().contains("more memory"), "{error}");
}
