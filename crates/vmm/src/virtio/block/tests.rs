use std::io::{Read, Seek, SeekFrom, Write};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::Memory;
use crate::virtio::testing::{DriverQueue, NEXT, TestInterrupt, WRITE, activation, memory};

const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x4800;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const INDIRECT: u16 = 4;
const HEADER_BUFFER: (u64, u32, bool) = (HEADER, 16, false);
const STATUS_BUFFER: (u64, u32, bool) = (STATUS, 1, true);

struct Fixture {
    memory: Memory,
    driver: DriverQueue,
    disk: Disk,
}

/// A disk of four sectors, filled with 1, 2, 3 and 4.
fn fixture(read_only: bool) -> Fixture {
    let mut file = tempfile::tempfile().unwrap();
    for byte in 1..=4 {
        file.write_all(&[byte; 512]).unwrap();
    }
    let memory = memory();
    let driver = DriverQueue::new(&memory, 0x1_0000, 128);
    Fixture { memory, driver, disk: Disk { file, sectors: 4, read_only, id: [b'x'; SERIAL_LEN] } }
}

impl Fixture {
    fn header(&self, kind: u32, sector: u64) {
        self.memory.write_obj(u64::from(kind), GuestAddress(HEADER)).unwrap();
        self.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.memory.write_obj(0xaa_u8, GuestAddress(STATUS)).unwrap();
    }

    /// Answers what is in the ring from its start; the last chain's used length and the status byte.
    fn serve(&mut self) -> (u32, u8) {
        let interrupt = Arc::new(TestInterrupt::default());
        let mut activation = activation(&self.memory, 0, &[&self.driver], &interrupt);
        let disk = &self.disk;
        RequestWorker::new("block", &mut activation, 0, |chain| disk.answer(&chain)).unwrap().serve().unwrap();
        let used = std::iter::from_fn(|| self.driver.take_used()).last().unwrap();
        self.driver = DriverQueue::new(&self.memory, 0x1_0000, 128);
        (used.1, self.memory.read_obj(GuestAddress(STATUS)).unwrap())
    }

    /// Answers one chain.
    fn answer(&mut self, buffers: &[(u64, u32, bool)]) -> (u32, u8) {
        self.driver.add(buffers);
        self.serve()
    }

    fn request(&mut self, kind: u32, sector: u64, len: u32) -> (u32, u8) {
        self.header(kind, sector);
        let data = (DATA, len, matches!(kind, IN | GET_ID));
        if len == 0 {
            self.answer(&[HEADER_BUFFER, STATUS_BUFFER])
        } else {
            self.answer(&[HEADER_BUFFER, data, STATUS_BUFFER])
        }
    }

    fn disk_byte(&self, offset: u64) -> u8 {
        let mut byte = [0];
        let mut file = &self.disk.file;
        file.seek(SeekFrom::Start(offset)).unwrap();
        file.read_exact(&mut byte).unwrap();
        byte[0]
    }
}

#[test]
fn read_gives_the_sectors_asked_for() {
    let mut fixture = fixture(true);
    assert_eq!(fixture.request(IN, 1, 1024), (1025, 0));
    let memory = &fixture.memory;
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 2);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA + 1023)).unwrap(), 3);
}

#[test]
fn write_reaches_the_disk_and_flush_succeeds() {
    let mut fixture = fixture(false);
    fixture.memory.write_slice(&[9; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(fixture.request(OUT, 2, 512), (1, 0));
    assert_eq!((fixture.disk_byte(1023), fixture.disk_byte(1024), fixture.disk_byte(1536)), (2, 9, 4));
    assert_eq!(fixture.request(FLUSH, 0, 0), (1, 0));
}

#[test]
fn write_to_a_read_only_disk_fails() {
    let mut fixture = fixture(true);
    assert_eq!(fixture.request(OUT, 0, 512), (1, 1));
    assert_eq!(fixture.disk_byte(0), 1);
}

#[test]
fn access_beyond_the_end_fails() {
    let mut fixture = fixture(false);
    for (sector, len) in [(4, 512), (3, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100)] {
        assert_eq!(fixture.request(IN, sector, len), (1, 1), "{sector} {len}");
        assert_eq!(fixture.request(OUT, sector, len), (1, 1), "{sector} {len}");
    }
}

#[test]
fn serial_is_read_and_unknown_requests_are_unsupported() {
    let mut fixture = fixture(false);
    assert_eq!(fixture.request(GET_ID, 0, 20), (21, 0));
    assert_eq!(fixture.memory.read_obj::<[u8; 20]>(GuestAddress(DATA)).unwrap(), [b'x'; 20]);
    assert_eq!(fixture.request(99, 0, 0), (1, 2));
}

#[test]
fn file_that_shrank_gives_an_error() {
    let mut fixture = fixture(false);
    fixture.disk.file.set_len(512).unwrap();
    assert_eq!(fixture.request(IN, 1, 512), (1, 1));
}

#[test]
fn data_outside_of_memory_or_in_the_wrong_direction_fails() {
    let mut fixture = fixture(false);
    for data in [(u64::MAX - 511, 512, true), (0xff_ff00, 512, true), (DATA, 512, false)] {
        fixture.header(IN, 0);
        assert_eq!(fixture.answer(&[HEADER_BUFFER, data, STATUS_BUFFER]), (1, 1));
    }
}

#[test]
fn chain_without_a_place_for_the_status_is_given_back() {
    let mut fixture = fixture(false);
    fixture.header(IN, 0);
    assert_eq!(fixture.answer(&[STATUS_BUFFER]), (0, 0xaa));
    assert_eq!(fixture.answer(&[HEADER_BUFFER, (DATA, 512, false)]), (0, 0xaa));
    assert_eq!(fixture.answer(&[HEADER_BUFFER, (u64::MAX - 1, 2, true)]), (0, 0xaa));
    assert_eq!(fixture.answer(&[(HEADER, 8, false), STATUS_BUFFER]), (1, 1));
}

#[test]
fn status_may_share_a_descriptor_with_the_data() {
    let mut fixture = fixture(false);
    fixture.header(IN, 3);
    fixture.answer(&[HEADER_BUFFER, (DATA, 513, true)]);
    assert_eq!(fixture.memory.read_obj::<u8>(GuestAddress(DATA + 511)).unwrap(), 4);
    assert_eq!(fixture.memory.read_obj::<u8>(GuestAddress(DATA + 512)).unwrap(), 0);
}

#[test]
fn chain_that_loops_ends() {
    let mut fixture = fixture(false);
    fixture.header(IN, 0);
    fixture.driver.descriptor(0, HEADER, 16, NEXT, 1);
    fixture.driver.descriptor(1, DATA, 512, NEXT | WRITE, 1);
    fixture.driver.offer(0);
    assert_eq!(fixture.serve().0, 1);
}

#[test]
fn same_chain_twice_is_answered_twice() {
    let mut fixture = fixture(false);
    fixture.header(IN, 0);
    let head = fixture.driver.add(&[HEADER_BUFFER, (DATA, 512, true), STATUS_BUFFER]);
    fixture.driver.offer(head);
    assert_eq!(fixture.serve(), (513, 0));
}

#[test]
fn indirect_table_is_followed_and_a_bad_one_is_given_back() {
    const TABLE: u64 = 0x9000;
    for (len, nested, answered) in [(48, false, true), (47, false, false), (0, false, false), (48, true, false)] {
        let mut fixture = fixture(false);
        fixture.header(IN, 0);
        // A queue whose descriptor table is the indirect one.
        let table = DriverQueue::new(&fixture.memory, TABLE, 128);
        table.descriptor(0, HEADER, 16, if nested { INDIRECT } else { NEXT }, 1);
        table.descriptor(1, DATA, 512, NEXT | WRITE, 2);
        table.descriptor(2, STATUS, 1, WRITE, 0);
        fixture.driver.descriptor(0, TABLE, len, INDIRECT, 0);
        fixture.driver.offer(0);
        assert_eq!(fixture.serve(), if answered { (513, 0) } else { (0, 0xaa) }, "{len} {nested}");
    }
}

#[test]
fn config_reads_past_its_end_are_zero() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0; 2048]).unwrap();
    let block = Block::new(file.into(), true, "disk", EventLoop::spawn().unwrap()).unwrap();
    let mut data = [0; 8];
    block.read_config(0, &mut data);
    assert_eq!(u64::from_le_bytes(data), 4);
    for offset in [16, 4096, u64::MAX] {
        let mut data = [0; 8];
        block.read_config(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
