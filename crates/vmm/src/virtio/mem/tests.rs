//! The driver's requests, honest or not, and the sizes that are asked of it.

use std::io;
use std::sync::mpsc;

use vm_memory::{Bytes, GuestAddress};

use super::blocks::{BLOCK, Occupancy, Verdict};
use super::*;
use crate::layout::MEMORY_BLOCK;
use crate::virtio::testing::{DriverQueue, TestInterrupt, activation, memory};

const START: u64 = 8 << 30;
const SIZE: u64 = 4 * MEMORY_BLOCK;

/// What a backing was told.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Told {
    Attach(usize),
    Detach(usize),
    Discard(u64, u64),
}

struct Record {
    told: mpsc::Sender<Told>,
    fails: Option<usize>,
}

impl Backing for Record {
    fn start(&self) -> u64 {
        START
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn attach(&mut self, block: usize) -> io::Result<()> {
        if self.fails == Some(block) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.told.send(Told::Attach(block)).map_err(io::Error::other)
    }

    fn detach(&mut self, block: usize) -> io::Result<()> {
        self.told.send(Told::Detach(block)).map_err(io::Error::other)
    }

    fn discard(&mut self, address: u64, len: u64) {
        self.told.send(Told::Discard(address - START, len)).unwrap();
    }
}

fn record(fails: Option<usize>) -> (Box<Record>, mpsc::Receiver<Told>) {
    let (told, heard) = mpsc::channel();
    (Box::new(Record { told, fails }), heard)
}

fn blocks(requested: u64) -> (Blocks, mpsc::Receiver<Told>) {
    let (backing, heard) = record(None);
    let mut blocks = Blocks::new(backing);
    assert!(blocks.request(requested));
    (blocks, heard)
}

#[test]
fn memory_blocks_come_with_their_first_part_and_go_with_their_last() {
    let (mut blocks, heard) = blocks(SIZE);
    assert_eq!(blocks.plug(START + MEMORY_BLOCK - BLOCK, 2), Verdict::Ack);
    assert_eq!(blocks.plug(START + MEMORY_BLOCK + BLOCK, 1), Verdict::Ack);
    assert_eq!(blocks.plugged(), 3 * BLOCK);
    assert_eq!(blocks.occupancy(START + MEMORY_BLOCK - BLOCK, 3), Some(Occupancy::Plugged));
    assert_eq!(blocks.occupancy(START, 65), Some(Occupancy::Mixed));
    assert_eq!(blocks.occupancy(START, 63), Some(Occupancy::Unplugged));
    assert_eq!(blocks.unplug(START + MEMORY_BLOCK - BLOCK, 2), Verdict::Ack);
    assert_eq!(blocks.unplug_all(), Verdict::Ack);
    assert_eq!(blocks.plugged(), 0);
    let expected = [
        Told::Attach(0),
        Told::Attach(1),
        Told::Detach(0),
        Told::Discard(MEMORY_BLOCK - BLOCK, 2 * BLOCK),
        Told::Detach(1),
        Told::Discard(0, SIZE),
    ];
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn hostile_13_requests_for_blocks_that_are_not_there_change_nothing() {
    let (mut blocks, heard) = blocks(2 * BLOCK);
    assert_eq!(blocks.plug(START, 1), Verdict::Ack);
    let wrong = [
        (START - BLOCK, 1),
        (START + 1, 1),
        (START + 4096, 1),
        (START + SIZE, 1),
        (START + SIZE - BLOCK, 2),
        (START, u16::MAX),
        (START, 0),
        (0, 1),
        (u64::MAX - BLOCK + 1, 1),
    ];
    for (address, count) in wrong {
        assert_eq!(blocks.plug(address, count), Verdict::Error, "{address:#x}");
        assert_eq!(blocks.unplug(address, count), Verdict::Error, "{address:#x}");
        assert_eq!(blocks.occupancy(address, count), None, "{address:#x}");
    }
    assert_eq!(blocks.plug(START, 1), Verdict::Error, "plugged twice");
    assert_eq!(blocks.unplug(START, 2), Verdict::Error, "not all of it is plugged");
    assert_eq!(blocks.plug(START + BLOCK, 2), Verdict::Nack, "more than was asked for");
    assert_eq!((blocks.plugged(), heard.try_iter().count()), (BLOCK, 1));
}

#[test]
fn hostile_13_plug_that_the_host_refuses_half_way_is_undone() {
    let (backing, heard) = record(Some(2));
    let mut blocks = Blocks::new(backing);
    assert!(blocks.request(SIZE));
    assert_eq!(blocks.plug(START + MEMORY_BLOCK, 65), Verdict::Busy);
    assert_eq!((blocks.plugged(), blocks.occupancy(START, 256)), (0, Some(Occupancy::Unplugged)));
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), [Told::Attach(1), Told::Detach(1)]);
}

#[test]
fn sizes_are_whole_blocks_within_the_region() {
    let (mut blocks, _heard) = blocks(0);
    assert!(blocks.request(1) && blocks.requested() == BLOCK);
    assert!(!blocks.request(SIZE + 1) && !blocks.request(u64::MAX));
    let word = |index: usize| u64::from_le_bytes(blocks.config()[index * 8..][..8].try_into().unwrap());
    assert_eq!([word(0), word(2), word(3), word(4), word(5), word(6)], [BLOCK, START, SIZE, SIZE, 0, BLOCK]);
}

/// A request at 1 MiB with room for its answer behind it.
fn send(queue: &mut DriverQueue, memory: &crate::memory::Memory, request: &[u8]) {
    memory.write_slice(request, GuestAddress(0x10_0000)).unwrap();
    memory.write_slice(&[0xff; 16], GuestAddress(0x10_0100)).unwrap();
    queue.add(&[(0x10_0000, u32::try_from(request.len()).unwrap(), false), (0x10_0100, 16, true)]);
    queue.kick();
}

fn plug_request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut request = u64::from(kind).to_le_bytes().to_vec();
    request.extend(address.to_le_bytes());
    request.extend(u64::from(count).to_le_bytes());
    request
}

#[test]
fn who_asked_for_a_size_hears_of_it_when_it_is_there() {
    let (memory, interrupt) = (memory(), Arc::new(TestInterrupt::default()));
    let mut queue = DriverQueue::new(&memory, 0x20_0000, 16);
    let (backing, _heard) = record(None);
    let (mut mem, handle) = Mem::new(backing, 0, EventLoop::spawn().unwrap()).unwrap();
    mem.activate(activation(&memory, 0, &[&queue], &interrupt)).unwrap();
    let (tell, told) = mpsc::channel();
    let resize = |mib, name: &'static str| {
        let tell = tell.clone();
        handle.resize(mib, Box::new(move |mib| tell.send((name, mib)).unwrap()))
    };
    resize(4, "replaced").unwrap();
    resize(2, "reached").unwrap();
    assert_eq!(told.try_recv(), Ok(("replaced", 0)));
    let verdict = || memory.read_obj::<u16>(GuestAddress(0x10_0100)).unwrap();
    send(&mut queue, &memory, &plug_request(0, START, 1));
    assert_eq!((queue.wait_used(&interrupt).1, verdict()), (10, 0));
    assert_eq!(told.recv(), Ok(("reached", 2)));
    send(&mut queue, &memory, &plug_request(3, START, 1));
    assert_eq!((queue.wait_used(&interrupt).1, verdict()), (10, 0));
    for nonsense in [plug_request(0, START, 1), plug_request(9, START, 1), vec![0; 7]] {
        send(&mut queue, &memory, &nonsense);
        assert_eq!((queue.wait_used(&interrupt).1, verdict()), (10, 3));
    }
    resize(2, "at once").unwrap();
    assert_eq!(told.recv(), Ok(("at once", 2)));
    assert!(resize(4096, "never").is_err());
}

/// A memory block is the guest's as a whole once a part of it is plugged. One part in each of many would make the guest as
/// large as the region.
#[test]
fn hostile_13_no_more_memory_blocks_are_given_than_hold_what_was_asked_for() {
    let (mut blocks, heard) = blocks(MEMORY_BLOCK + BLOCK);
    assert_eq!(blocks.plug(START, 1), Verdict::Ack);
    assert_eq!(blocks.plug(START + 2 * MEMORY_BLOCK, 1), Verdict::Ack);
    assert_eq!(blocks.plug(START + MEMORY_BLOCK, 1), Verdict::Nack);
    assert_eq!(blocks.plug(START + 3 * MEMORY_BLOCK - BLOCK, 2), Verdict::Nack, "across into another");
    assert_eq!(heard.try_iter().count(), 2);
    // As Linux does it: what there is of blocks is filled first.
    assert_eq!(blocks.plug(START + BLOCK, 63), Verdict::Ack);
    assert_eq!(blocks.plugged(), MEMORY_BLOCK + BLOCK);
    // Less is asked for, the guest keeps both blocks; and then it can grow in them.
    assert!(blocks.request(BLOCK));
    assert_eq!(blocks.unplug(START + BLOCK, 63), Verdict::Ack);
    assert!(blocks.request(2 * BLOCK + BLOCK));
    assert_eq!(blocks.plug(START + 3 * MEMORY_BLOCK, 1), Verdict::Nack);
    assert_eq!(blocks.plug(START + 2 * MEMORY_BLOCK + BLOCK, 1), Verdict::Ack);
}

#[test]
fn hostile_13_blocks_are_plugged_and_unplugged_once() {
    let (mut blocks, heard) = blocks(SIZE);
    assert_eq!(blocks.plug(START, 64), Verdict::Ack);
    for (address, count) in [(START, 1), (START + 63 * BLOCK, 2), (START, 256)] {
        assert_eq!(blocks.plug(address, count), Verdict::Error, "{address:#x}");
    }
    assert_eq!(blocks.unplug(START, 64), Verdict::Ack);
    for (address, count) in [(START, 64), (START, 1), (START + 128 * BLOCK, 1)] {
        assert_eq!(blocks.unplug(address, count), Verdict::Error, "{address:#x}");
    }
    let expected = [Told::Attach(0), Told::Detach(0), Told::Discard(0, MEMORY_BLOCK)];
    assert_eq!(heard.try_iter().collect::<Vec<_>>(), expected);
    assert_eq!(blocks.plugged(), 0);
}
