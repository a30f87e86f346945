use std::io::{Read, Seek, SeekFrom, Write};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::test_driver::{Driver, RecordingInterrupt};

const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x4800;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

struct Fixture {
    driver: Driver,
    disk: Disk,
}

/// A disk of four sectors, filled with 1, 2, 3 and 4.
fn fixture(read_only: bool) -> Fixture {
    let mut file = tempfile::tempfile().unwrap();
    for byte in 1..=4 {
        file.write_all(&[byte; 512]).unwrap();
    }
    Fixture { driver: Driver::new(128), disk: Disk { file, sectors: 4, read_only, id: [b'x'; SERIAL_LEN] } }
}

impl Fixture {
    fn header(&self, kind: u32, sector: u64) {
        let memory = self.driver.memory();
        memory.write_obj(u64::from(kind), GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        memory.write_obj(0xaa_u8, GuestAddress(STATUS)).unwrap();
    }

    /// Serves what is in the ring; returns the last used length and the status byte.
    fn serve(&self) -> (u32, u8) {
        let (mut queue, memory) = (self.driver.queue(), self.driver.memory());
        serve(&mut queue, 0, &memory, &RecordingInterrupt::default(), |chain| self.disk.serve(chain)).unwrap();
        (self.driver.used().last().unwrap().1, memory.read_obj(GuestAddress(STATUS)).unwrap())
    }

    fn request(&self, kind: u32, sector: u64, len: u32) -> (u32, u8) {
        self.header(kind, sector);
        let (driver, writable) = (&self.driver, matches!(kind, IN | GET_ID));
        let data = if writable { driver.writable(DATA, len) } else { driver.readable(DATA, len) };
        let (header, status) = (driver.readable(HEADER, 16), driver.writable(STATUS, 1));
        if len == 0 {
            driver.add(&[header, status])
        } else {
            driver.add(&[header, data, status])
        }
        self.serve()
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
    let fixture = fixture(true);
    assert_eq!(fixture.request(IN, 1, 1024), (1025, 0));
    let memory = fixture.driver.memory();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA)).unwrap(), 2);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA + 1023)).unwrap(), 3);
}

#[test]
fn write_reaches_the_disk_and_flush_succeeds() {
    let fixture = fixture(false);
    fixture.driver.memory().write_slice(&[9; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(fixture.request(OUT, 2, 512), (1, 0));
    assert_eq!((fixture.disk_byte(1023), fixture.disk_byte(1024), fixture.disk_byte(1536)), (2, 9, 4));
    assert_eq!(fixture.request(FLUSH, 0, 0), (1, 0));
}

#[test]
fn write_to_a_read_only_disk_fails() {
    let fixture = fixture(true);
    assert_eq!(fixture.request(OUT, 0, 512), (1, 1));
    assert_eq!(fixture.disk_byte(0), 1);
}

#[test]
fn access_beyond_the_end_fails() {
    let fixture = fixture(false);
    for (sector, len) in [(4, 512), (3, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100)] {
        assert_eq!(fixture.request(IN, sector, len), (1, 1), "{sector} {len}");
        assert_eq!(fixture.request(OUT, sector, len), (1, 1), "{sector} {len}");
    }
}

#[test]
fn serial_is_read_and_unknown_requests_are_unsupported() {
    let fixture = fixture(false);
    assert_eq!(fixture.request(GET_ID, 0, 20), (21, 0));
    assert_eq!(fixture.driver.memory().read_obj::<[u8; 20]>(GuestAddress(DATA)).unwrap(), [b'x'; 20]);
    assert_eq!(fixture.request(99, 0, 0), (1, 2));
}

#[test]
fn file_that_shrank_gives_an_error() {
    let fixture = fixture(false);
    fixture.disk.file.set_len(512).unwrap();
    assert_eq!(fixture.request(IN, 1, 512), (1, 1));
}

#[test]
fn data_outside_of_memory_or_in_the_wrong_direction_fails() {
    let fixture = fixture(false);
    let driver = &fixture.driver;
    let (header, status) = (driver.readable(HEADER, 16), driver.writable(STATUS, 1));
    for data in [driver.writable(u64::MAX - 511, 512), driver.writable(0xf_ff00, 512), driver.readable(DATA, 512)] {
        fixture.header(IN, 0);
        driver.add(&[header, data, status]);
        assert_eq!(fixture.serve(), (1, 1));
    }
}

#[test]
fn chain_without_a_place_for_the_status_is_given_back() {
    let fixture = fixture(false);
    let driver = &fixture.driver;
    fixture.header(IN, 0);
    driver.add(&[driver.writable(STATUS, 1)]);
    assert_eq!(fixture.serve(), (0, 0xaa));
    driver.add(&[driver.readable(HEADER, 16), driver.readable(DATA, 512)]);
    assert_eq!(fixture.serve(), (0, 0xaa));
    driver.add(&[driver.readable(HEADER, 8), driver.writable(STATUS, 1)]);
    assert_eq!(fixture.serve(), (1, 1));
}

#[test]
fn header_and_status_may_share_descriptors_with_the_data() {
    let fixture = fixture(false);
    let driver = &fixture.driver;
    fixture.header(IN, 3);
    driver.add(&[driver.readable(HEADER, 16), driver.writable(DATA, 513)]);
    fixture.serve();
    let memory = driver.memory();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA + 511)).unwrap(), 4);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(DATA + 512)).unwrap(), 0);
}

#[test]
fn chain_that_loops_ends() {
    let fixture = fixture(false);
    let driver = &fixture.driver;
    fixture.header(IN, 0);
    driver.write_descriptor(0, driver.readable(HEADER, 16), 1, 1);
    driver.write_descriptor(1, driver.writable(DATA, 512), 1, 1);
    driver.make_available(0);
    assert_eq!(fixture.serve().0, 1);
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
