use std::io::{PipeReader, Read};

use super::*;
use crate::virtio::serve::RingError;
use crate::virtio::test_driver::{Driver, RecordingInterrupt};

fn started(driver: &Driver) -> (Worker, Arc<RecordingInterrupt>, PipeReader) {
    let (reader, writer) = std::io::pipe().unwrap();
    let interrupt = Arc::new(RecordingInterrupt::default());
    let worker = Worker {
        transmit: driver.queue(),
        memory: driver.memory(),
        interrupt: interrupt.clone(),
        output: Arc::new(Output::new(writer.into()).unwrap()),
    };
    (worker, interrupt, reader)
}

fn run(worker: &mut Worker) -> Result<(), RingError> {
    let (memory, output) = (&*worker.memory, &worker.output);
    serve(&mut worker.transmit, 1, memory, &*worker.interrupt, |chain| {
        print(output, chain);
        0
    })
}

fn everything(worker: Worker, mut reader: PipeReader) -> Vec<u8> {
    drop(worker);
    let mut text = Vec::new();
    reader.read_to_end(&mut text).unwrap();
    text
}

#[test]
fn output_of_several_buffers_arrives_in_order() {
    let driver = Driver::new(16);
    driver.memory().write_slice(b"hello, world", vm_memory::GuestAddress(0x4000)).unwrap();
    driver.add(&[driver.readable(0x4000, 7), driver.readable(0x4007, 5)]);
    let (mut worker, interrupt, reader) = started(&driver);
    run(&mut worker).unwrap();
    assert_eq!(interrupt.queues(), [1]);
    assert_eq!(driver.used(), [(0, 0)]);
    assert_eq!(everything(worker, reader), b"hello, world");
}

#[test]
fn flood_that_nobody_reads_is_dropped_without_blocking() {
    let driver = Driver::new(16);
    for _ in 0..16 {
        driver.add(&[driver.readable(0x4000, 0x1_0000)]);
    }
    let (mut worker, _, reader) = started(&driver);
    run(&mut worker).unwrap();
    assert_eq!(driver.used().len(), 16);
    // A pipe holds 64 KiB unless told otherwise.
    assert!(everything(worker, reader).len() <= 0x1_0000);
}

#[test]
fn writable_wild_and_huge_buffers_print_nothing_and_are_given_back() {
    let driver = Driver::new(16);
    driver.add(&[driver.writable(0x4000, 16)]);
    driver.add(&[driver.readable(u64::MAX - 3, 16)]);
    driver.add(&[driver.readable(0xffff_0000, u32::MAX)]);
    driver.add(&[driver.readable(0x4000, 0)]);
    let (mut worker, interrupt, reader) = started(&driver);
    run(&mut worker).unwrap();
    assert_eq!(driver.used().len(), 4);
    assert!(!interrupt.is_reset_needed());
    assert!(everything(worker, reader).is_empty());
}

#[test]
fn avail_index_that_jumps_is_an_error() {
    let driver = Driver::new(16);
    driver.set_avail_index(17);
    let (mut worker, ..) = started(&driver);
    assert!(run(&mut worker).is_err());
}
