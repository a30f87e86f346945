//! What a driver reports, honest or not.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{DriverQueue, Ends, TestInterrupt, activation, memory};

#[test]
fn hostile_13_reported_pages_go_back_and_pages_outside_of_memory_are_ignored() {
    let memory = memory();
    let interrupt = Arc::new(TestInterrupt::default());
    let (inflate, deflate) = (DriverQueue::new(&memory, 0x10_0000, 16), DriverQueue::new(&memory, 0x11_0000, 16));
    let mut reporting = DriverQueue::new(&memory, 0x12_0000, 32);
    let mut balloon = Balloon::new(EventLoop::spawn().unwrap());
    balloon.activate(activation(&memory, F_REPORTING, &[&inflate, &deflate, &reporting], &interrupt)).unwrap();
    for address in [0x40_0000, 0x60_0000, 0x60_1000] {
        memory.write_obj(7u64, GuestAddress(address)).unwrap();
    }
    // One whole page; then outside of the memory, across its end, not aligned, wrapping, and one that is readable.
    let head = reporting.add(&[
        (0x40_0000, 0x1000, true),
        (1 << 40, 0x1000, true),
        ((16 << 20) - 0x1000, 0x2000, true),
        (0x60_0001, 0x1000, true),
        (u64::MAX - 0xfff, 0x1000, true),
        (0x60_1000, 0x800, true),
    ]);
    reporting.kick();
    assert_eq!(reporting.wait_used(&interrupt), (head, 0));
    let read = |address| memory.read_obj::<u64>(GuestAddress(address)).unwrap();
    assert_eq!((read(0x40_0000), read(0x60_0000), read(0x60_1000)), (0, 7, 7));
}

#[test]
fn hostile_13_nothing_can_be_inflated_and_there_are_no_statistics() {
    let balloon = Balloon::new(EventLoop::spawn().unwrap());
    let mut config = [0; 8];
    balloon.read_config(0, &mut config);
    assert_eq!((config, balloon.queue_sizes().len(), balloon.features()), ([0; 8], 3, 1 << 5));
}

/// The legacy way to give pages: their numbers in the inflate queue, of which the device takes no notice.
#[test]
fn hostile_13_page_numbers_outside_of_memory_in_the_inflate_queue_are_not_looked_at() {
    let memory = memory();
    let interrupt = Arc::new(TestInterrupt::default());
    let (mut inflate, mut deflate) =
        (DriverQueue::new(&memory, 0x10_0000, 16), DriverQueue::new(&memory, 0x11_0000, 16));
    let mut reporting = DriverQueue::new(&memory, 0x12_0000, 32);
    let mut balloon = Balloon::new(EventLoop::spawn().unwrap());
    balloon.activate(activation(&memory, F_REPORTING, &[&inflate, &deflate, &reporting], &interrupt)).unwrap();
    memory.write_obj(7u64, GuestAddress(0x40_0000)).unwrap();
    memory.write_slice(&[0x400_u32, u32::MAX, 0xd_0000].map(u32::to_le_bytes).concat(), GuestAddress(0x5000)).unwrap();
    for queue in [&mut inflate, &mut deflate] {
        queue.add(&[(0x5000, 12, false)]);
        queue.kick();
    }
    reporting.add(&[(0x60_0000, 0x1000, true)]);
    reporting.kick();
    reporting.wait_used(&interrupt);
    assert_eq!((inflate.take_used(), deflate.take_used()), (None, None));
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x40_0000)).unwrap(), 7);
    balloon.write_config(4, &[0xff; 4]);
    let mut actual = [0; 4];
    balloon.read_config(4, &mut actual);
    assert_eq!(actual, [0; 4]);
}

/// A page that the guest reports and uses at the same time is the guest's loss alone.
#[test]
fn hostile_13_free_page_that_is_written_while_it_is_reported_is_one_or_the_other() {
    let memory = memory();
    let interrupt = Arc::new(TestInterrupt::default());
    let (inflate, deflate) = (DriverQueue::new(&memory, 0x10_0000, 16), DriverQueue::new(&memory, 0x11_0000, 16));
    let mut reporting = DriverQueue::new(&memory, 0x12_0000, 32);
    let mut balloon = Balloon::new(EventLoop::spawn().unwrap());
    balloon.activate(activation(&memory, F_REPORTING, &[&inflate, &deflate, &reporting], &interrupt)).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                memory.write_obj(7u64, GuestAddress(0x40_0000)).unwrap();
                let now: u64 = memory.read_obj(GuestAddress(0x40_0000)).unwrap();
                assert!([0, 7].contains(&now));
            }
        });
        for _ in 0..300 {
            // The same page twice in a chain, too.
            reporting.add(&[(0x40_0000, 0x1000, true), (0x40_0000, 0x1000, true)]);
            reporting.kick();
            reporting.wait_used(&interrupt);
        }
    });
}

#[test]
fn hostile_13_report_of_the_devices_own_rings_stops_the_device_until_a_reset() {
    let memory = memory();
    let mut balloon = Balloon::new(EventLoop::spawn().unwrap());
    for address in [0x12_0000, 0x12_2000, 0x12_3000] {
        let interrupt = Arc::new(TestInterrupt::default());
        let (inflate, deflate) = (DriverQueue::new(&memory, 0x10_0000, 16), DriverQueue::new(&memory, 0x11_0000, 16));
        let mut reporting = DriverQueue::new(&memory, 0x12_0000, 32);
        balloon.activate(activation(&memory, F_REPORTING, &[&inflate, &deflate, &reporting], &interrupt)).unwrap();
        reporting.add(&[(address, 0x1000, true)]);
        reporting.kick();
        // Descriptors, available ring (the index is 0 again, which is a jump), used ring.
        if address == 0x12_2000 {
            interrupt.wait_reset();
        } else {
            interrupt.wait_or_reset(|| (used_index(&memory) == 1).then_some(()));
        }
        balloon.reset();
    }
}

/// The used index of the queue at 0x12_0000.
fn used_index(memory: &crate::memory::Memory) -> u16 {
    memory.read_obj(GuestAddress(0x12_3002)).unwrap()
}
