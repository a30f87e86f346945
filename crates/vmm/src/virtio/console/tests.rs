use std::io::{PipeReader, Read};

use vm_memory::GuestAddress;

use super::*;
use crate::memory::Memory;
use crate::virtio::testing::{DriverQueue, INDIRECT, NEXT, TestInterrupt, activation, memory};

const RINGS: u64 = 0x1_0000;

struct Fixture {
    memory: Memory,
    driver: DriverQueue,
    interrupt: Arc<TestInterrupt>,
    output: Arc<Output>,
    reader: PipeReader,
}

fn fixture() -> Fixture {
    let memory = memory();
    let (reader, writer) = std::io::pipe().unwrap();
    Fixture {
        driver: DriverQueue::new(&memory, RINGS, 64),
        memory,
        interrupt: Arc::default(),
        output: Arc::new(Output::new(writer.into()).unwrap()),
        reader,
    }
}

impl Fixture {
    /// Lets the device work on what is in the queue; what it printed, or `None` if it found the ring broken.
    fn run(mut self) -> (DriverQueue, Option<Vec<u8>>) {
        let receive = DriverQueue::new(&self.memory, 2 * RINGS, 16);
        let activation = activation(&self.memory, 0, &[&receive, &self.driver], &self.interrupt);
        let result = worker(self.output, activation).unwrap().serve();
        let mut text = Vec::new();
        self.reader.read_to_end(&mut text).unwrap();
        (self.driver, result.is_ok().then_some(text))
    }
}

#[test]
fn output_of_several_buffers_arrives_in_order() {
    let mut fixture = fixture();
    fixture.memory.write_slice(b"hello, world", GuestAddress(0x4000)).unwrap();
    fixture.driver.add(&[(0x4000, 7, false), (0x4007, 5, false)]);
    let interrupt = fixture.interrupt.clone();
    let (mut driver, text) = fixture.run();
    assert_eq!((driver.take_used(), driver.take_used()), (Some((0, 0)), None));
    assert_eq!(text.unwrap(), b"hello, world");
    assert_eq!(interrupt.count(TRANSMITQ), 1);
}

#[test]
fn hostile_14_console_flood_that_nobody_reads_is_dropped_without_blocking() {
    let mut fixture = fixture();
    for _ in 0..64 {
        fixture.driver.add(&[(0x10_0000, 0x1_0000, false)]);
    }
    let (mut driver, text) = fixture.run();
    assert_eq!(std::iter::from_fn(|| driver.take_used()).count(), 64);
    // A pipe holds 64 KiB unless told otherwise.
    assert!(text.unwrap().len() <= 0x1_0000);
}

#[test]
fn hostile_14_writable_wild_and_huge_buffers_print_nothing_and_are_given_back() {
    let mut fixture = fixture();
    for buffer in [(0x4000, 16, true), (u64::MAX - 3, 16, false), (0xffff_0000, u32::MAX, false), (0x4000, 0, false)] {
        fixture.driver.add(&[buffer]);
    }
    let (mut driver, text) = fixture.run();
    assert_eq!(std::iter::from_fn(|| driver.take_used()).count(), 4);
    assert!(text.unwrap().is_empty());
}

#[test]
fn hostile_04_available_index_that_jumps_is_an_error() {
    let mut fixture = fixture();
    fixture.driver.set_avail(65);
    assert!(fixture.run().1.is_none());
}

/// Each descriptor could cost a write(2) on the thread that other devices need.
#[test]
fn hostile_14_chain_of_more_buffers_than_any_queue_has_is_cut_off() {
    const TABLE: u64 = 0x20_0000;
    let mut fixture = fixture();
    let table = DriverQueue::new(&fixture.memory, TABLE, 64);
    (0..u16::MAX).for_each(|i| table.descriptor(i, 0x4000, 1, NEXT, i + 1));
    fixture.driver.descriptor(0, TABLE, u32::from(u16::MAX) * 16, INDIRECT, 0);
    fixture.driver.offer(0);
    let (mut driver, text) = fixture.run();
    assert_eq!((driver.take_used(), text.unwrap().len()), (Some((0, 0)), crate::virtio::ring::MAX_DESCRIPTORS));
}
