//! Devices and memory that come and go while the machine runs.

use std::os::fd::OwnedFd;

use bulkhead_protocol::control::{Command, Reply};
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, VmSpec};
use bulkhead_vmm::bus::BusDevice;
use bulkhead_vmm::event_loop::EventLoop;
use bulkhead_vmm::kvm::Vm;
use bulkhead_vmm::layout;
use bulkhead_vmm::machine::Slot;
use bulkhead_vmm::memory::create_memory;
use bulkhead_vmm::virtio::rng::Rng;

use crate::common::{file, kvm, spec};
use crate::control::{SPIN, Vmm};
use crate::tap::tap;

fn disk() -> (DeviceSpec, OwnedFd) {
    let device = DeviceSpec::Block { file: FdIndex(0), read_only: false, serial: "disk".into() };
    (device, file(&[0; 4096]).into())
}

fn add(vmm: &Vmm, id: u64) -> Option<Reply> {
    let (device, image) = disk();
    vmm.send(id, Command::AddDevice(device), &[image]);
    vmm.reply()
}

fn is_refused(reply: Option<Reply>, words: &str) {
    match reply {
        Some(Reply::Failed { message, .. }) => assert!(message.contains(words), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn removed_devices_slot_reads_as_empty_and_is_used_again() {
    const DEVICE_ID: u64 = 8;
    let vm = Vm::new(kvm(), create_memory(16, 0).unwrap(), layout::hotplug_start(16)).unwrap();
    let (address, irq) = (layout::slot_address(3), layout::SLOT_IRQS[3]);
    let device_id = |slot: &mut Slot| {
        let mut id = [0; 4];
        slot.read(DEVICE_ID, &mut id);
        u32::from_le_bytes(id)
    };
    let mut slot = Slot::new(vm.register_pages()[3].clone());
    for _ in 0..3 {
        assert_eq!(device_id(&mut slot), 0);
        slot.fill(&vm, address, irq, Box::new(Rng::new(EventLoop::spawn().unwrap()))).unwrap();
        assert_eq!(device_id(&mut slot), 4);
        assert!(slot.fill(&vm, address, irq, Box::new(Rng::new(EventLoop::spawn().unwrap()))).is_err());
        drop(slot.clear(&vm, address).unwrap());
        // A driver that has not noticed goes on.
        slot.write(0x70, &0u32.to_le_bytes());
        slot.write(0x50, &0u32.to_le_bytes());
    }
    assert!(slot.clear(&vm, address).is_err());
}

#[test]
fn disks_are_added_to_a_running_machine_and_removed() {
    let vmm = Vmm::start();
    is_refused(add(&vmm, 1), "no machine yet");
    vmm.boot(2, VmSpec { devices: vec![DeviceSpec::Rng], ..spec() }, &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 2 }));
    assert_eq!(add(&vmm, 3), Some(Reply::Added { id: 3, slot: 1 }));
    assert_eq!(add(&vmm, 4), Some(Reply::Added { id: 4, slot: 2 }));
    vmm.send(5, Command::RemoveDevice { slot: 1 }, &[]);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 5 }));
    for slot in [1, 99] {
        vmm.send(6, Command::RemoveDevice { slot }, &[]);
        is_refused(vmm.reply(), "slot");
    }
    assert_eq!(add(&vmm, 7), Some(Reply::Added { id: 7, slot: 1 }));
    for id in 3..16 {
        assert_eq!(add(&vmm, id), Some(Reply::Added { id, slot: u8::try_from(id).unwrap() }));
    }
    is_refused(add(&vmm, 16), "16 slots");
    vmm.send(17, Command::AddDevice(disk().0), &[]);
    is_refused(vmm.reply(), "slots");
    assert!(vmm.end());
}

#[test]
fn network_device_is_added_to_a_running_machine() {
    let vmm = Vmm::start();
    vmm.boot(1, VmSpec { devices: vec![DeviceSpec::Rng], ..spec() }, &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    let device = DeviceSpec::Net { tap: FdIndex(0), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
    let tap = tap(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    vmm.send(2, Command::AddDevice(device.clone()), &[tap.into()]);
    assert_eq!(vmm.reply(), Some(Reply::Added { id: 2, slot: 1 }));
    vmm.send(3, Command::AddDevice(device), &[file(&[]).into()]);
    is_refused(vmm.reply(), "not that of a tap");
    vmm.send(4, Command::RemoveDevice { slot: 1 }, &[]);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 4 }));
    assert!(vmm.end());
}

#[test]
fn memory_is_resized_within_what_the_machine_was_built_for() {
    let vmm = Vmm::start();
    vmm.send(1, Command::ResizeMemory { mib: 1 }, &[]);
    is_refused(vmm.reply(), "virtio-mem");
    let devices = vec![DeviceSpec::Memory { requested_mib: 0 }, DeviceSpec::Balloon];
    vmm.boot(2, VmSpec { devices, hotplug_mib: 256, ..spec() }, &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 2 }));
    vmm.send(3, Command::ResizeMemory { mib: 512 }, &[]);
    is_refused(vmm.reply(), "256 MiB");
    // This guest never answers; who asks next is told what there is.
    vmm.send(4, Command::ResizeMemory { mib: 128 }, &[]);
    vmm.send(5, Command::ResizeMemory { mib: 0 }, &[]);
    assert_eq!(vmm.reply(), Some(Reply::Resized { id: 4, mib: 0 }));
    assert_eq!(vmm.reply(), Some(Reply::Resized { id: 5, mib: 0 }));
    assert!(vmm.end());
}

#[test]
fn memory_device_without_memory_is_refused() {
    let vmm = Vmm::start();
    vmm.boot(1, VmSpec { devices: vec![DeviceSpec::Memory { requested_mib: 0 }], ..spec() }, &SPIN);
    is_refused(vmm.reply(), "hotplug_mib");
    assert!(!vmm.end());
}
