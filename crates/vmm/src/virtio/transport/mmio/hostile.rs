//! Drivers that break the rules of registers and queues.

use vm_memory::GuestAddress;

use super::tests::{Driver, FEATURE, MAX_SIZE, MEMORY_SIZE, driver, driver_for, driver_with};
use super::*;
use crate::event_loop::EventLoop;
use crate::layout::{GAP_END, IOAPIC, LOCAL_APIC, SLOTS_START};
use crate::virtio::rng::Rng;
use crate::virtio::testing::{self, DriverQueue};

const GOOD: [u64; 3] = [0x1000, 0x2000, 0x3000];

/// With rings like these the device does not start but asks for a reset; and then it works.
fn assert_refused(driver: &mut Driver, size: u32, rings: [u64; 3]) {
    let before = driver.activations();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, size, rings);
    driver.add_status(DRIVER_OK);
    assert_eq!(driver.activations(), before, "{size} {rings:x?}");
    assert_ne!(driver.status() & NEEDS_RESET, 0, "{size} {rings:x?}");
    assert_eq!(driver.line.read().unwrap(), 1, "the driver is told");
    driver.write(STATUS, 0);
    driver.start();
    assert_eq!((driver.activations(), driver.status() & NEEDS_RESET), (before + 1, 0), "it works after a reset");
    driver.write(STATUS, 0);
}

/// Every place for one of the three rings.
fn with_each(address: u64) -> [[u64; 3]; 3] {
    let [descriptors, available, used] = GOOD;
    [[address, available, used], [descriptors, address, used], [descriptors, available, address]]
}

/// CVE-2026-5747.
#[test]
fn hostile_01_no_register_written_after_driver_ok_changes_what_the_device_was_given() {
    let mut driver = driver();
    driver.start();
    let running = driver.status();
    for value in [0, 1, 3, 0x5555_5555, u32::MAX] {
        for offset in (0..CONFIG).step_by(4).filter(|offset| *offset != STATUS) {
            driver.write(QUEUE_SEL, value & 1);
            driver.write(offset, value);
        }
    }
    let registers = driver.transport.queues[0];
    assert!(registers.ready && registers.size == 16 && !driver.transport.queues[1].ready);
    assert_eq!([registers.descriptors, registers.available, registers.used], GOOD);
    assert_eq!(driver.transport.driver_features, VERSION_1 | EVENT_IDX);
    assert_eq!((driver.status(), driver.activations()), (running, 1));
    assert_eq!(driver.seen.lock().unwrap().resets, 0);
}

#[test]
fn hostile_01_needs_reset_is_not_the_drivers_to_set_or_clear() {
    let mut driver = driver();
    driver.start();
    let running = driver.status();
    driver.write(STATUS, running | NEEDS_RESET);
    assert_eq!(driver.status(), running);
    driver.interrupt.needs_reset();
    driver.write(STATUS, running);
    driver.write(INTERRUPT_ACK, u32::MAX);
    assert_eq!(driver.status(), running | NEEDS_RESET);
    driver.write(STATUS, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn hostile_01_device_that_could_not_start_is_initialized_anew_after_a_reset() {
    const BASE: u64 = 0x1_0000;
    let memory = testing::memory();
    let mut driver = driver_for(Box::new(Rng::new(EventLoop::spawn().unwrap())), memory.clone(), Arc::default());
    for _ in 0..3 {
        driver.negotiate(VERSION_1);
        driver.add_status(DRIVER_OK); // without its queue
        assert_ne!(driver.status() & NEEDS_RESET, 0);
        driver.set_up_queue(0, 8, [BASE, BASE + 0x2000, BASE + 0x3000]);
        assert_eq!(driver.read(QUEUE_READY), 0, "it is too late for that");
        driver.line.read().unwrap();
        driver.write(STATUS, 0);
        let mut queue = DriverQueue::new(&memory, BASE, 8);
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, 8, [BASE, BASE + 0x2000, BASE + 0x3000]);
        queue.add(&[(0x4000, 64, true)]);
        driver.add_status(DRIVER_OK);
        driver.line.read().unwrap();
        assert_eq!(queue.take_used(), Some((0, 64)));
        driver.write(STATUS, 0);
    }
}

#[test]
fn hostile_01_reset_at_every_step_leaves_nothing_of_the_step_behind() {
    for steps in 0..5 {
        let mut driver = driver();
        let all: [fn(&mut Driver); 4] = [
            |driver| driver.write(STATUS, ACKNOWLEDGE | DRIVER),
            |driver| driver.accept(VERSION_1 | FEATURE),
            |driver| driver.add_status(FEATURES_OK),
            |driver| driver.set_up_queue(0, 16, GOOD),
        ];
        all.iter().take(steps).for_each(|step| step(&mut driver));
        driver.write(STATUS, 0);
        assert_eq!((driver.status(), driver.transport.driver_features, driver.transport.queue_sel), (0, 0, 0));
        let queue = driver.transport.queues[0];
        assert!(!queue.ready && queue.size == 0 && [queue.descriptors, queue.available, queue.used] == [0; 3]);
        driver.start();
        assert_eq!(driver.activations(), 1);
    }
}

#[test]
fn hostile_02_access_of_8_16_or_64_bits_to_a_register_is_ignored() {
    let mut driver = driver();
    for width in [1, 2, 8] {
        for offset in (0..CONFIG).step_by(4) {
            let mut data = vec![0; width];
            driver.transport.read(offset, &mut data);
            assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {width}");
            driver.transport.write(offset, &vec![1; width]);
        }
    }
    assert_eq!((driver.status(), driver.transport.queue_sel), (0, 0));
    driver.start();
    driver.transport.write(STATUS, &[0; 8]);
    assert_eq!(driver.seen.lock().unwrap().resets, 0);
}

#[test]
fn hostile_02_access_to_a_register_that_is_not_aligned_is_ignored() {
    let mut driver = driver();
    driver.start();
    let running = driver.status();
    for offset in (0..CONFIG).filter(|offset| offset % 4 != 0) {
        assert_eq!(driver.read(offset), 0, "{offset:#x}");
        for value in [0, u32::MAX] {
            driver.write(offset, value);
        }
    }
    assert_eq!((driver.status(), driver.activations()), (running, 1));
    assert_eq!(driver.seen.lock().unwrap().resets, 0);
}

#[test]
fn hostile_02_configuration_is_read_at_any_offset_and_not_written_without_a_driver() {
    let mut driver = driver();
    for width in [1, 2, 4, 8] {
        for offset in [CONFIG, CONFIG + 7, 0xfff, u64::from(u32::MAX), u64::MAX] {
            let mut data = vec![0; width];
            driver.transport.read(offset, &mut data);
            driver.transport.write(offset, &data);
        }
    }
    driver.write(CONFIG, 1);
    assert_eq!(driver.seen.lock().unwrap().config_writes, 0, "there is no driver yet");
}

#[test]
fn hostile_02_features_are_selected_out_of_range() {
    let mut driver = driver();
    driver.write(STATUS, ACKNOWLEDGE | DRIVER);
    for select in [2, 3, 0x8000_0000, u32::MAX] {
        driver.write(DEVICE_FEATURES_SEL, select);
        assert_eq!(driver.read(DEVICE_FEATURES), 0);
        driver.write(DRIVER_FEATURES_SEL, select);
        driver.write(DRIVER_FEATURES, u32::MAX);
    }
    assert_eq!(driver.transport.driver_features, 0);
}

#[test]
fn hostile_03_ring_of_size_zero_or_no_power_of_two_is_refused() {
    for size in [0, 3, 5, 17, 63] {
        assert_refused(&mut driver(), size, GOOD);
    }
}

#[test]
fn hostile_03_ring_above_the_maximum_is_refused() {
    // The last ones are valid sizes in their lower 16 bits.
    for size in [u32::from(MAX_SIZE) * 2, 0x8000, u32::MAX, 0x1_0000, 0x1_0010] {
        assert_refused(&mut driver(), size, GOOD);
    }
}

#[test]
fn hostile_03_ring_that_is_not_aligned_is_refused() {
    for rings in [[0x1008, 0x2000, 0x3000], [0x1000, 0x2001, 0x3000], [0x1000, 0x2000, 0x3002]] {
        assert_refused(&mut driver(), 16, rings);
    }
}

#[test]
fn hostile_03_ring_in_the_gap_or_across_its_edges_is_refused() {
    let low = 1 << 20;
    // Two regions of memory with the gap between them.
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(GAP_END), 1 << 20)];
    for address in
        [SLOTS_START, SLOTS_START + 0x50, u64::from(IOAPIC), u64::from(LOCAL_APIC), low - 16, low, GAP_END - 16]
    {
        for rings in with_each(address) {
            assert_refused(&mut driver_with(&ranges, false), 16, rings);
        }
    }
    // Right behind the gap there is memory.
    let mut driver = driver_with(&ranges, false);
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16, [GAP_END, GAP_END + 0x1000, GAP_END + 0x2000]);
    driver.add_status(DRIVER_OK);
    assert_eq!(driver.activations(), 1);
}

#[test]
fn hostile_03_ring_at_or_across_the_end_of_memory_is_refused() {
    for address in [MEMORY_SIZE - 16, MEMORY_SIZE, MEMORY_SIZE + 0x1000, 1 << 40, u64::MAX - 15, !0xfff] {
        for rings in with_each(address) {
            assert_refused(&mut driver(), 16, rings);
        }
    }
}

#[test]
fn hostile_03_ring_that_was_never_placed_is_refused() {
    for rings in with_each(0) {
        assert_refused(&mut driver(), 16, rings);
    }
}

#[test]
fn hostile_03_rings_that_overlap_each_other_are_refused() {
    for rings in [
        [0x1000, 0x1010, 0x3000],
        [0x1000, 0x2000, 0x2000],
        [0x1000, 0x2000, 0x2020],
        [0x1000, 0x10fe, 0x3000],
        [0x2020, 0x2000, 0x3000],
        [0x3080, 0x2000, 0x3000],
        [0x1000; 3],
    ] {
        assert_refused(&mut driver(), 16, rings);
    }
}

#[test]
fn hostile_03_one_bad_queue_of_two_stops_the_device_from_starting() {
    let mut driver = driver();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16, GOOD);
    driver.set_up_queue(1, 16, [0x4000, 0x5000, MEMORY_SIZE]);
    driver.add_status(DRIVER_OK);
    assert_eq!(driver.activations(), 0);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
}

/// No device has a window of shared memory (DAX), so no ring can lie in one.
#[test]
fn hostile_03_there_is_no_shared_memory_window_whichever_is_selected() {
    let mut driver = driver();
    for select in [0, 1, 255, u32::MAX] {
        driver.write(SHM_SEL, select);
        for offset in (SHM_LEN_LOW..=SHM_BASE_HIGH).step_by(4) {
            assert_eq!(driver.read(offset), u32::MAX);
        }
    }
}
