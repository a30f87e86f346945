use super::*;
use crate::virtio::test_driver::{Driver, RecordingInterrupt};

fn answer(driver: &Driver) -> Vec<(u32, u32)> {
    serve(&mut driver.queue(), 0, &driver.memory(), &RecordingInterrupt::default(), fill).unwrap();
    driver.used()
}

#[test]
fn buffer_is_filled() {
    let driver = Driver::new(8);
    driver.add(&[driver.writable(0x4000, 16), driver.writable(0x5000, 48)]);
    assert_eq!(answer(&driver), [(0, 64)]);
    let mut bytes = [0; 16];
    driver.memory().read_slice(&mut bytes, vm_memory::GuestAddress(0x5000)).unwrap();
    assert_ne!(bytes, [0; 16]);
}

#[test]
fn chain_larger_than_memory_costs_no_more_than_a_small_one() {
    let driver = Driver::new(8);
    driver.add(&[driver.writable(0x4000, 0x8000_0000)]);
    assert_eq!(answer(&driver), [(0, 1024)]);
}

#[test]
fn readable_and_wild_buffers_get_nothing() {
    let driver = Driver::new(8);
    driver.add(&[driver.readable(0x4000, 16)]);
    driver.add(&[driver.writable(u64::MAX - 1, 16)]);
    assert_eq!(answer(&driver), [(0, 0), (1, 0)]);
}
