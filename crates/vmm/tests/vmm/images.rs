//! Images of the host's page cache in the memory of a guest that runs: what it sees of them, that it can change nothing, and
//! what becomes of it when a file loses what the guest was shown. The numbers in the tests' names are those of
//! docs/negative-tests.md.

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use bulkhead_protocol::control::{Command, ExitReason, Reply};
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, Image, VmSpec};
use bulkhead_vmm::layout;
use tempfile::NamedTempFile;

use crate::common::{kernel, kvm, spec};
use crate::control::Vmm;

/// Longer than any of it takes, on a machine under heavy load too.
const PATIENCE: Duration = Duration::from_secs(60);

/// `ud2` without an interrupt table.
const TRIPLE_FAULT: [u8; 2] = [0x0f, 0x0b];

/// Where [`turn_on_paging`] shows the first 2 MiB of the images' place, which is at 4 GiB in so small a machine.
const WINDOW: u32 = 0x4000_0000;
/// Of the first image: there is an empty page before it.
const FIRST: u32 = WINDOW + 0x1000;

/// 32-bit code that turns on paging, as code of a 64-bit kernel sees memory (IA-32e, compatibility mode: Intel SDM volume 3A, section
/// 5.5), with pages of 2 MiB: the first of them, the slots, and [`WINDOW`]. An emulating KVM has no other paging.
fn turn_on_paging() -> Vec<u8> {
    const TABLES: u32 = 0x20_0000;
    const TABLE: u32 = 0x1000;
    const ENTRY: u32 = 3;
    const PAGE: u32 = 0x83;
    let directory = |gib: u32| TABLES + (2 + gib) * TABLE;
    let slots = u32::try_from(layout::SLOTS_START).unwrap();
    let mut entries = vec![(TABLES, (TABLES + TABLE) | ENTRY)];
    for (address, low, high) in [(0, 0, 0), (slots, slots, 0), (WINDOW, 0, 1)] {
        let gib = address >> 30;
        let entry = directory(gib) + (address >> 21 & 0x1ff) * 8;
        entries.extend([(TABLES + TABLE + gib * 8, directory(gib) | ENTRY), (entry, low | PAGE), (entry + 4, high)]);
    }
    let mut code = Vec::new();
    for (address, entry) in entries {
        code.extend([0xc7, 0x05]); // mov dword [address], entry
        code.extend(address.to_le_bytes());
        code.extend(entry.to_le_bytes());
    }
    code.extend([0x0f, 0x20, 0xe0, 0x83, 0xc8, 0x20, 0x0f, 0x22, 0xe0]); // mov eax, cr4; or eax, PAE; mov cr4, eax
    code.push(0xb8); // mov eax, TABLES
    code.extend(TABLES.to_le_bytes());
    code.extend([0x0f, 0x22, 0xd8]); // mov cr3, eax
    code.extend([0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32]); // mov ecx, EFER; rdmsr
    code.extend([0x0d, 0, 1, 0, 0, 0x0f, 0x30]); // or eax, LME; wrmsr
    code.extend([0x0f, 0x20, 0xc0, 0x0d, 0, 0, 0, 0x80, 0x0f, 0x22, 0xc0]); // mov eax, cr0; or eax, PG; mov cr0, eax
    code
}

/// Waits for the first slot's device: mov eax, [DeviceID]; test eax, eax; je back.
fn wait_for_device() -> Vec<u8> {
    const DEVICE_ID: u64 = 8;
    let mut code = vec![0xa1];
    code.extend(u32::try_from(layout::slot_address(0) + DEVICE_ID).unwrap().to_le_bytes());
    code.extend([0x85, 0xc0, 0x74, 0xf7]);
    code
}

/// Prints the byte at an address: mov al, [address]; mov dx, 0x3f8; out dx, al.
fn print_byte(address: u32) -> Vec<u8> {
    let mut code = vec![0xa0];
    code.extend(address.to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]);
    code
}

/// mov byte [address], value
fn write_byte(address: u32, value: u8) -> Vec<u8> {
    let mut code = vec![0xc6, 0x05];
    code.extend(address.to_le_bytes());
    code.push(value);
    code
}

/// mov al, [address]; jmp back: reads it for ever.
fn read_for_ever(address: u32) -> Vec<u8> {
    let mut code = vec![0xa0];
    code.extend(address.to_le_bytes());
    code.extend([0xeb, 0xf9]);
    code
}

/// A file with these bytes and a descriptor for reading it.
fn image(bytes: &[u8]) -> (NamedTempFile, OwnedFd) {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    let reader = File::open(file.path()).unwrap();
    (file, reader.into())
}

fn pmem(sizes: &[u64]) -> DeviceSpec {
    let image = |(index, size): (usize, &u64)| Image { file: FdIndex(index), size: *size };
    DeviceSpec::Pmem { images: sizes.iter().enumerate().map(image).collect() }
}

/// Boots a VMM in service mode with a guest of this code.
fn boot(code: &[&[u8]]) -> (Vmm, PipeReader) {
    let vmm = Vmm::start();
    vmm.limit_waiting(PATIENCE);
    let (serial, theirs) = std::io::pipe().unwrap();
    let fds = [kvm(), kernel(&code.concat(), &[]).into(), theirs.into()];
    vmm.send(1, Command::Boot(spec()), &fds);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    (vmm, serial)
}

fn add(vmm: &Vmm, id: u64, sizes: &[u64], files: &[OwnedFd]) -> Option<Reply> {
    vmm.send(id, Command::AddDevice(pmem(sizes)), files);
    vmm.reply()
}

#[test]
fn images_are_read_where_they_are_said_to_be_and_zeros_around_them() {
    let tail = FIRST + 4096 + 5000;
    let places = [WINDOW, FIRST, FIRST + 4095, FIRST + 4096, FIRST + 4096 + 4999, tail, WINDOW + 0x1f_ffff];
    let prints = places.map(print_byte).concat();
    let (vmm, mut serial) = boot(&[&turn_on_paging(), &wait_for_device(), &prints, &TRIPLE_FAULT]);
    let (_first, one) = image(&[1; 4096]);
    let (_second, two) = image(&[2; 5000]);
    assert_eq!(add(&vmm, 2, &[4096, 5000], &[one, two]), Some(Reply::Added { id: 2, slot: 0 }));
    assert_eq!(vmm.reply(), Some(Reply::GuestExited { reason: ExitReason::Reset }));
    let mut text = Vec::new();
    serial.read_to_end(&mut text).unwrap();
    assert_eq!(text, [0, 1, 1, 2, 2, 0, 0]);
    assert!(vmm.end());
}

/// CVE-2026-24834.
#[test]
fn hostile_12_write_to_an_image_changes_it_for_nobody() {
    let code = [write_byte(FIRST, 9), print_byte(FIRST), write_byte(WINDOW, 9), print_byte(WINDOW)].concat();
    let (vmm, mut serial) = boot(&[&turn_on_paging(), &wait_for_device(), &code, &TRIPLE_FAULT]);
    let (file, one) = image(&[1; 4096]);
    assert_eq!(add(&vmm, 2, &[4096], &[one]), Some(Reply::Added { id: 2, slot: 0 }));
    assert_eq!(vmm.reply(), Some(Reply::GuestExited { reason: ExitReason::Reset }));
    let mut text = Vec::new();
    serial.read_to_end(&mut text).unwrap();
    assert_eq!(text, [1, 0], "nor for the guest itself");
    assert_eq!(std::fs::read(file.path()).unwrap(), [1; 4096]);
    assert!(vmm.end());
}

#[test]
fn hostile_12_file_that_is_cut_under_the_guest_ends_the_guest_with_a_reason_and_not_the_vmm() {
    let code = [print_byte(FIRST), read_for_ever(FIRST)].concat();
    let (mut vmm, mut serial) = boot(&[&turn_on_paging(), &wait_for_device(), &code]);
    let (file, one) = image(&[1; 4096]);
    assert_eq!(add(&vmm, 2, &[4096], &[one]), Some(Reply::Added { id: 2, slot: 0 }));
    let mut byte = [0];
    serial.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [1]);
    file.as_file().set_len(0).unwrap();
    assert_eq!(vmm.reply(), Some(Reply::GuestExited { reason: ExitReason::MemoryGone }));
    assert_eq!(vmm.reply(), None);
    // A failure, but none by a signal.
    assert_eq!(vmm.wait().code(), Some(1));
}

/// The VMM itself never looks.
#[test]
fn hostile_12_file_that_is_cut_and_that_the_guest_does_not_look_at_harms_nobody() {
    let (vmm, _serial) = boot(&[&crate::control::SPIN]);
    let (file, one) = image(&[1; 4096]);
    assert_eq!(add(&vmm, 2, &[4096], &[one]), Some(Reply::Added { id: 2, slot: 0 }));
    file.as_file().set_len(0).unwrap();
    let again = File::open(file.path()).unwrap();
    match add(&vmm, 3, &[4096], &[again.into()]) {
        Some(Reply::Failed { id: 3, message }) => assert!(message.contains("has 0 bytes"), "{message}"),
        other => panic!("{other:?}"),
    }
    vmm.send(4, Command::RemoveDevice { slot: 0 }, &[]);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 4 }));
    assert!(vmm.end());
}

#[test]
fn images_come_and_go_while_the_machine_runs_and_leave_no_descriptor() {
    let vmm = Vmm::start();
    vmm.limit_waiting(PATIENCE);
    vmm.send(1, Command::AddDevice(pmem(&[4096])), &[image(&[1; 4096]).1]);
    assert!(matches!(vmm.reply(), Some(Reply::Failed { id: 1, .. })), "no machine yet");
    vmm.boot(2, VmSpec { devices: vec![DeviceSpec::Rng], ..spec() }, &crate::control::SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 2 }));
    let maps = || std::fs::read_to_string(format!("/proc/{}/maps", vmm.pid())).unwrap();
    let (file, _) = image(&[1; 4096]);
    let name = file.path().file_name().unwrap().to_str().unwrap().to_owned();
    for id in 3..23 {
        let reader = File::open(file.path()).unwrap();
        assert_eq!(add(&vmm, id, &[4096], &[reader.into()]), Some(Reply::Added { id, slot: 1 }));
        let maps = maps();
        let mappings: Vec<_> = maps.lines().filter(|line| line.contains(&name)).collect();
        assert!(mappings.iter().any(|line| line.contains(" r--s ")), "{mappings:?}");
        assert!(mappings.iter().all(|line| line.contains(" r--s ")), "{mappings:?}");
        vmm.send(id + 100, Command::RemoveDevice { slot: 1 }, &[]);
        assert_eq!(vmm.reply(), Some(Reply::Done { id: id + 100 }));
    }
    let open = std::fs::read_dir(format!("/proc/{}/fd", vmm.pid())).unwrap().flatten();
    let links: Vec<_> = open.filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect();
    assert!(!links.iter().any(|link| link.to_string_lossy().contains(&name)), "{links:?}");
    // The last one is gone from the memory too, in the thread's own time: the next one comes after it.
    let (_other, reader) = image(&[1; 4096]);
    assert_eq!(add(&vmm, 23, &[4096], &[reader]), Some(Reply::Added { id: 23, slot: 1 }));
    assert!(!maps().contains(&name));
    assert!(vmm.end());
}

#[test]
fn hostile_12_images_that_cannot_be_shown_are_refused_and_the_machine_goes_on() {
    let (vmm, _serial) = boot(&[&crate::control::SPIN]);
    let (file, one) = image(&[1; 4096]);
    let refused = |id, device: DeviceSpec, fds: &[OwnedFd], words: &str| {
        vmm.send(id, Command::AddDevice(device), fds);
        match vmm.reply() {
            Some(Reply::Failed { id: its, message }) => assert!(its == id && message.contains(words), "{message}"),
            other => panic!("{other:?}"),
        }
    };
    refused(2, pmem(&[]), &[], "1 to 60 images");
    refused(3, pmem(&[4096, 4096]), &[one], "descriptor 1 for the image");
    refused(4, pmem(&[4096]), &[File::open("/dev/zero").unwrap().into()], "no regular file");
    let writable = OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
    refused(5, pmem(&[4096]), &[writable.into()], "open for writing");
    refused(6, pmem(&[u64::MAX]), &[File::open(file.path()).unwrap().into()], "images");
    let (_file, two) = image(&[1; 4096]);
    assert_eq!(add(&vmm, 7, &[4096], &[two]), Some(Reply::Added { id: 7, slot: 0 }));
    assert!(vmm.end());
}
