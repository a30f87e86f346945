use std::sync::Arc;

use vm_memory::GuestAddress;

use super::*;
use crate::memory::Memory;
use crate::virtio::testing::{DriverQueue, TestInterrupt, activation, memory};

/// Answers one chain of these buffers; how many bytes were written.
fn answer(memory: &Memory, buffers: &[(u64, u32, bool)]) -> u32 {
    let mut driver = DriverQueue::new(memory, 0x1_0000, 8);
    driver.add(buffers);
    let interrupt = Arc::new(TestInterrupt::default());
    let mut activation = activation(memory, 0, &[&driver], &interrupt);
    RequestWorker::new("rng", &mut activation, 0, |chain| fill(&chain)).unwrap().serve().unwrap();
    driver.take_used().unwrap().1
}

#[test]
fn buffer_is_filled() {
    let memory = memory();
    assert_eq!(answer(&memory, &[(0x4000, 16, true), (0x5000, 48, true)]), 64);
    let mut bytes = [0; 16];
    memory.read_slice(&mut bytes, GuestAddress(0x5000)).unwrap();
    assert_ne!(bytes, [0; 16]);
}

#[test]
fn hostile_13_chain_larger_than_memory_costs_no_more_than_a_small_one() {
    assert_eq!(answer(&memory(), &[(0x4000, 0x8000_0000, true)]), 1024);
}

#[test]
fn hostile_13_readable_and_wild_buffers_get_no_entropy() {
    assert_eq!(answer(&memory(), &[(0x4000, 16, false)]), 0);
    assert_eq!(answer(&memory(), &[(u64::MAX - 1, 16, true)]), 0);
}
