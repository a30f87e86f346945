mod hanging;

use std::io::{Read, Seek, SeekFrom, Write};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::Memory;
use crate::virtio::stop::Stop;
use crate::virtio::testing::{DriverQueue, Ends, INDIRECT, NEXT, TestInterrupt, WRITE, activation, memory};

const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x4800;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
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
        let mut worker = Worker::new(|chain: &Chain| disk.answer(chain), Arc::default());
        let mut ring = Ring::take(&mut activation, 0).unwrap();
        worker.serve_once(&mut ring, &Stop::new().unwrap()).unwrap();
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
fn hostile_08_write_to_a_read_only_disk_fails() {
    let mut fixture = fixture(true);
    assert_eq!(fixture.request(OUT, 0, 512), (1, 1));
    assert_eq!(fixture.disk_byte(0), 1);
}

#[test]
fn hostile_08_access_beyond_the_end_or_by_a_sector_that_overflows_fails() {
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
fn hostile_08_file_that_shrank_gives_an_error() {
    let mut fixture = fixture(false);
    fixture.disk.file.set_len(512).unwrap();
    assert_eq!(fixture.request(IN, 1, 512), (1, 1));
}

#[test]
fn hostile_05_data_outside_of_memory_or_in_the_wrong_direction_fails() {
    let mut fixture = fixture(false);
    for data in [(u64::MAX - 511, 512, true), (0xff_ff00, 512, true), (DATA, 512, false)] {
        fixture.header(IN, 0);
        assert_eq!(fixture.answer(&[HEADER_BUFFER, data, STATUS_BUFFER]), (1, 1));
    }
}

#[test]
fn hostile_05_chain_without_a_place_for_the_status_is_given_back() {
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
fn hostile_05_chain_that_loops_ends() {
    let mut fixture = fixture(false);
    fixture.header(IN, 0);
    fixture.driver.descriptor(0, HEADER, 16, NEXT, 1);
    fixture.driver.descriptor(1, DATA, 512, NEXT | WRITE, 1);
    fixture.driver.offer(0);
    assert_eq!(fixture.serve().0, 1);
}

#[test]
fn hostile_04_same_chain_twice_is_answered_twice() {
    let mut fixture = fixture(false);
    fixture.header(IN, 0);
    let head = fixture.driver.add(&[HEADER_BUFFER, (DATA, 512, true), STATUS_BUFFER]);
    fixture.driver.offer(head);
    assert_eq!(fixture.serve(), (513, 0));
}

#[test]
fn hostile_05_indirect_table_is_followed_and_a_bad_one_is_given_back() {
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
fn hostile_02_config_reads_past_its_end_are_zero() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0; 2048]).unwrap();
    let block = Block::new(file.into(), true, "disk", &DiskThreads::start(1).unwrap()).unwrap();
    let mut data = [0; 8];
    block.read_config(0, &mut data);
    assert_eq!(u64::from_le_bytes(data), 4);
    for offset in [16, 4096, u64::MAX] {
        let mut data = [0; 8];
        block.read_config(offset, &mut data);
        assert_eq!(data, [0; 8]);
    }
}

#[test]
fn hostile_08_discard_and_write_zeroes_are_not_offered_and_unsupported() {
    const DISCARD: u32 = 11;
    const WRITE_ZEROES: u32 = 13;
    const SECURE_ERASE: u32 = 14;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[0; 512]).unwrap();
    let block = Block::new(file.into(), false, "", &DiskThreads::start(1).unwrap()).unwrap();
    assert_eq!(block.features() & (1 << 13 | 1 << 14 | 1 << 16), 0);
    let mut fixture = fixture(false);
    // struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags; within the disk, beyond it, wrapping.
    for (sector, count) in [(0, 1), (4, 1), (u64::MAX, 1), (0, u32::MAX)] {
        for kind in [DISCARD, WRITE_ZEROES, SECURE_ERASE] {
            fixture.header(kind, 0);
            fixture.memory.write_obj(sector, GuestAddress(DATA)).unwrap();
            fixture.memory.write_obj(u64::from(count), GuestAddress(DATA + 8)).unwrap();
            assert_eq!(fixture.answer(&[HEADER_BUFFER, (DATA, 16, false), STATUS_BUFFER]), (1, 2), "{kind}");
        }
    }
    assert_eq!((fixture.disk_byte(0), fixture.disk_byte(2047)), (1, 4));
}

/// CVE-2026-27211: what the guest writes to the start of its disk makes no other disk of it.
#[test]
fn hostile_08_image_that_claims_another_format_is_read_as_it_is() {
    // A header of qcow2, version 3, with the name of a backing file at 0x70; and one of VMDK.
    let mut qcow2 = b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\0\x70\0\0\0\x0b".to_vec();
    qcow2.resize(0x70, 0);
    qcow2.extend(b"/etc/passwd");
    qcow2.resize(512, 0);
    let vmdk = [&b"KDMV\x01\0\0\0"[..], &[0; 504]].concat();
    for sector in [qcow2, vmdk] {
        let mut fixture = fixture(false);
        fixture.memory.write_slice(&sector, GuestAddress(DATA)).unwrap();
        assert_eq!(fixture.request(OUT, 0, 512), (1, 0));
        // As after the next start of the machine.
        let file = fixture.disk.file.try_clone().unwrap();
        let block = Block::new(file.into(), false, "", &DiskThreads::start(1).unwrap()).unwrap();
        fixture.disk.sectors = block.sectors;
        assert_eq!(block.sectors, 4);
        fixture.memory.write_slice(&[0; 512], GuestAddress(DATA)).unwrap();
        assert_eq!(fixture.request(IN, 0, 512), (513, 0));
        let mut read = vec![0; 512];
        fixture.memory.read_slice(&mut read, GuestAddress(DATA)).unwrap();
        assert_eq!(read, sector);
    }
}

#[test]
fn hostile_08_disk_without_space_fails_the_write_and_goes_on() {
    let mut fixture = fixture(false);
    let good = std::mem::replace(&mut fixture.disk.file, File::options().write(true).open("/dev/full").unwrap());
    assert_eq!(fixture.request(OUT, 0, 512), (1, 1));
    fixture.disk.file = good;
    assert_eq!(fixture.request(OUT, 0, 512), (1, 0));
}

#[test]
fn hostile_08_disk_with_an_error_fails_the_request_and_goes_on() {
    let mut fixture = fixture(false);
    // Nothing is mapped at address 0: EIO.
    let good = std::mem::replace(&mut fixture.disk.file, File::open("/proc/self/mem").unwrap());
    assert_eq!(fixture.request(IN, 0, 512), (1, 1));
    assert_eq!(fixture.request(FLUSH, 0, 0), (1, 1));
    // Not open for writing: EBADF.
    assert_eq!(fixture.request(OUT, 0, 512), (1, 1));
    fixture.disk.file = good;
    assert_eq!(fixture.request(IN, 0, 512), (513, 0));
}

#[test]
fn hostile_08_disk_that_shrinks_in_the_middle_of_a_request_fails_it() {
    let mut fixture = fixture(false);
    fixture.disk.file.set_len(700).unwrap();
    assert_eq!(fixture.request(IN, 0, 2048), (1, 1));
    assert_eq!(fixture.request(IN, 0, 512), (513, 0));
}

#[test]
fn hostile_08_request_larger_than_any_disk_needs_is_refused() {
    let mut fixture = fixture(false);
    fixture.disk.file.set_len(1 << 40).unwrap();
    fixture.disk.sectors = 1 << 31;
    fixture.header(IN, 0);
    let mut buffers = vec![HEADER_BUFFER];
    buffers.extend([(0x80_0000, 8 << 20, true); 3]);
    buffers.push(STATUS_BUFFER);
    assert_eq!(fixture.answer(&buffers), (1, 1));
}

/// The header is copied once: a request is what it was when it was read.
#[test]
fn hostile_06_header_that_changes_after_it_was_read_changes_nothing() {
    let mut fixture = fixture(true);
    fixture.header(IN, 1);
    fixture.driver.add(&[HEADER_BUFFER, (DATA, 512, true), STATUS_BUFFER]);
    let interrupt = Arc::new(TestInterrupt::default());
    let mut activation = activation(&fixture.memory, 0, &[&fixture.driver], &interrupt);
    let mut ring = Ring::take(&mut activation, 0).unwrap();
    let parsed = request::parse(&ring.pop().unwrap().unwrap()).unwrap();
    fixture.header(OUT, u64::MAX);
    fixture.driver.descriptor(1, u64::MAX - 511, 512, NEXT, 2);
    assert_eq!((parsed.kind, parsed.sector, parsed.len), (request::Kind::In, 1, 512));
    assert_eq!((parsed.data[0].address, parsed.status), (GuestAddress(DATA), GuestAddress(STATUS)));
}

/// Another vCPU turns a request for sector 1 into one beyond the disk and back while the device works.
#[test]
fn hostile_06_header_that_changes_all_the_time_is_one_request_or_the_other() {
    let mut fixture = fixture(true);
    let (memory, stop) = (fixture.memory.clone(), std::sync::atomic::AtomicBool::new(false));
    fixture.header(IN, 1);
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                memory.write_obj(u64::MAX / 512, GuestAddress(HEADER + 8)).unwrap();
                memory.write_obj(1_u64, GuestAddress(HEADER + 8)).unwrap();
            }
        });
        for _ in 0..500 {
            memory.write_slice(&[0; 512], GuestAddress(DATA)).unwrap();
            let answer = fixture.answer(&[HEADER_BUFFER, (DATA, 512, true), STATUS_BUFFER]);
            let data: u8 = memory.read_obj(GuestAddress(DATA + 511)).unwrap();
            assert!([((513, 0), 2), ((1, 1), 0)].contains(&(answer, data)), "{answer:?} {data}");
        }
    });
}
