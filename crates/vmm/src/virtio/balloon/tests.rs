//! What a driver reports, honest or not.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::{DriverQueue, TestInterrupt, activation, memory};

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
