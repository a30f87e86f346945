//! Devices with one queue of requests.

use std::io::PipeReader;
use std::os::fd::OwnedFd;

use bulkhead_vmm::memory::ImageRegion;
use bulkhead_vmm::virtio::Activation;
use bulkhead_vmm::virtio::balloon::Balloon;
use bulkhead_vmm::virtio::block::Inline;
use bulkhead_vmm::virtio::console::Console;
use bulkhead_vmm::virtio::pmem::Pmem;
use bulkhead_vmm::virtio::rng::Rng;
use rustix::fs::{MemfdFlags, OFlags, fcntl_setfl, ftruncate, memfd_create};

use crate::guest::{Buffer, Device, Guest, Subject, drive, event_loop};
use crate::input::Input;

/// Bytes of the disk.
const DISK: u64 = 64 * 1024;

/// virtio-blk over 64 KiB, writable or not by the first byte.
pub fn block(data: &[u8]) {
    let mut input = Input::new(data);
    let read_only = input.u8() & 1 != 0;
    let file = memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, DISK).unwrap();
    let shrinking = file.try_clone().unwrap();
    let disk = Inline::new(file, read_only, "fuzz").unwrap();
    drive(&mut Disk { disk, image: shrinking }, data.get(1..).unwrap_or_default());
}

/// A disk without its thread.
struct Disk {
    disk: Inline,
    image: OwnedFd,
}

impl Subject for Disk {
    fn queue_sizes(&self) -> Vec<u16> {
        vec![128]
    }

    fn features(&self) -> u64 {
        self.disk.features()
    }

    fn start(&mut self, activation: Activation) -> bool {
        self.disk.start(activation).is_ok()
    }

    fn stop(&mut self) {}

    fn settle(&mut self) {
        // One turn answers a ring's worth.
        (0..3).for_each(|_| self.disk.serve());
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.disk.read_config(offset, data);
    }

    fn own(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        match input.u8() {
            // The image changes its size under the device.
            0 => ftruncate(&self.image, input.u64() % (2 * DISK)).unwrap(),
            kind => {
                let mut header = [0; 16];
                header[0] = kind & 0xf;
                header[8..].copy_from_slice(&(u64::from(input.u16()) % 160).to_le_bytes());
                let header = guest.place(&header);
                let len = u32::from(input.u8()) * 512;
                let data = if kind & 0x10 != 0 { guest.room(len) } else { (guest.allocate(len), len, false) };
                let status = guest.room(1);
                guest.offer(0, &[header, data, status]);
            }
        }
    }

    fn probe(&mut self, guest: &mut Guest) -> Option<(usize, Vec<Buffer>)> {
        Some((0, vec![guest.place(&[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), guest.room(21)]))
    }
}

/// virtio-rng.
pub fn rng(data: &[u8]) {
    drive(
        &mut Device {
            device: Box::new(Rng::new(event_loop())),
            own: Box::new(|_, _| ()),
            probe: |guest| (0, vec![guest.room(64)]),
            host_recovers: Box::new(|| ()),
        },
        data,
    );
}

/// virtio-pmem, over memory that the device itself never touches.
pub fn pmem(data: &[u8]) {
    struct Region;
    impl ImageRegion for Region {
        fn start(&self) -> u64 {
            8 << 30
        }

        fn size(&self) -> u64 {
            2 << 20
        }
    }
    let own = |guest: &mut Guest, input: &mut Input<'_>| {
        let (request, answer) = (guest.place(&u32::from(input.u8()).to_le_bytes()), guest.room(4));
        guest.offer(0, &[request, answer]);
    };
    drive(
        &mut Device {
            device: Box::new(Pmem::new(Box::new(Region), event_loop(), event_loop())),
            own: Box::new(own),
            probe: |guest| (0, vec![guest.place(&[0; 4]), guest.room(4)]),
            host_recovers: Box::new(|| ()),
        },
        data,
    );
}

/// virtio-balloon: free page reporting, of pages that the queues may be in.
pub fn balloon(data: &[u8]) {
    let own = |guest: &mut Guest, input: &mut Input<'_>| {
        let (page, count) = (u64::from(input.u16()), u32::from(input.u8()));
        guest.offer(2, &[(page * 4096, count * 4096, true)]);
    };
    drive(
        &mut Device {
            device: Box::new(Balloon::new(event_loop())),
            own: Box::new(own),
            probe: |_| (2, vec![(0x20_0000, 4096, true)]),
            host_recovers: Box::new(|| ()),
        },
        data,
    );
}

/// virtio-console into a pipe that is read, or not, as the input says.
pub fn console(data: &[u8]) {
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl_setfl(&reader, OFlags::NONBLOCK).unwrap();
    let mut reader = Some(reader);
    let device = Console::new(OwnedFd::from(writer), event_loop()).unwrap();
    let own = move |_: &mut Guest, input: &mut Input<'_>| match input.u8() {
        0 => reader = None,
        _ => reader.iter_mut().for_each(read_some),
    };
    drive(
        &mut Device {
            device: Box::new(device),
            own: Box::new(own),
            probe: |guest| (1, vec![guest.place(b"login: ")]),
            host_recovers: Box::new(|| ()),
        },
        data,
    );
}

fn read_some(reader: &mut PipeReader) {
    let mut bytes = [0; 4096];
    let _ = rustix::io::read(reader, &mut bytes);
}
