use std::sync::Mutex;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::event_loop::EventLoop;
use crate::memory::Memory;
use crate::register_page::RegisterPage;
use crate::virtio::ActivateError;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{self, DriverQueue};

pub(super) const MEMORY_SIZE: u64 = 1 << 20;
pub(super) const MAX_SIZE: u16 = 64;
pub(super) const FEATURE: u64 = 1 << 5;

/// What the device was told.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) activations: Vec<Activation>,
    pub(super) resets: usize,
    pub(super) config_writes: usize,
    /// A request is in the host, whatever the driver does.
    pub(super) in_host: bool,
}

struct Device {
    seen: Arc<Mutex<Seen>>,
    refuses: bool,
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[MAX_SIZE, MAX_SIZE]
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::try_from(offset & 0xff).unwrap());
    }
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.seen.lock().unwrap().config_writes += 1;
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.seen.lock().unwrap().activations.push(activation);
        if self.refuses { Err(ActivateError::QueueMissing(0)) } else { Ok(()) }
    }
    fn reset(&mut self) {
        self.seen.lock().unwrap().resets += 1;
    }
    fn is_stopped(&self) -> bool {
        !self.seen.lock().unwrap().in_host
    }
}

/// A driver in front of the registers.
pub(super) struct Driver {
    pub(super) transport: MmioTransport,
    pub(super) seen: Arc<Mutex<Seen>>,
    pub(super) interrupt: Arc<MmioInterrupt>,
    pub(super) line: EventFd,
}

pub(super) fn driver_of(refuses: bool) -> Driver {
    driver_with(&[(GuestAddress(0), usize::try_from(MEMORY_SIZE).unwrap())], refuses)
}

/// A driver in a machine with this memory.
pub(super) fn driver_with(ranges: &[(GuestAddress, usize)], refuses: bool) -> Driver {
    let seen = Arc::new(Mutex::new(Seen::default()));
    let memory = GuestMemoryMmap::from_ranges(ranges).unwrap();
    driver_for(Box::new(Device { seen: seen.clone(), refuses }), Arc::new(memory), seen)
}

pub(super) fn driver_for(device: Box<dyn VirtioDevice>, memory: Memory, seen: Arc<Mutex<Seen>>) -> Driver {
    let kicks = device.queue_sizes().iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    // Blocking: a test that reads it waits for the interrupt.
    let line = EventFd::new(0).unwrap();
    let page = Arc::new(RegisterPage::new().unwrap());
    let interrupt = Arc::new(MmioInterrupt::new(Box::new(line.try_clone().unwrap()), page));
    let transport = MmioTransport::new(device, memory, interrupt.clone(), kicks);
    Driver { transport, seen, interrupt, line }
}

pub(super) fn driver() -> Driver {
    driver_of(false)
}

impl Driver {
    /// A driver reads the first registers as memory. An access that comes to the transport all the same says the same.
    pub(super) fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        let value = u32::from_le_bytes(data);
        if offset < READABLE_REGISTERS {
            assert_eq!(self.interrupt.page().load(offset), value, "{offset:#x} in the page");
        }
        value
    }

    pub(super) fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(super) fn status(&mut self) -> u32 {
        self.read(STATUS)
    }

    pub(super) fn add_status(&mut self, bit: u32) {
        let status = self.status();
        self.write(STATUS, status | bit);
    }

    pub(super) fn accept(&mut self, features: u64) {
        for (select, word) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(DRIVER_FEATURES_SEL, select);
            self.write(DRIVER_FEATURES, u32::try_from(word).unwrap());
        }
    }

    /// Up to FEATURES_OK.
    pub(super) fn negotiate(&mut self, features: u64) {
        self.write(STATUS, ACKNOWLEDGE);
        self.add_status(DRIVER);
        self.accept(features);
        self.add_status(FEATURES_OK);
    }

    pub(super) fn set_up_queue(&mut self, index: u32, size: u32, [descriptors, available, used]: [u64; 3]) {
        self.write(QUEUE_SEL, index);
        self.write(QUEUE_NUM, size);
        let registers = [(QUEUE_DESC_LOW, descriptors), (QUEUE_DRIVER_LOW, available), (QUEUE_DEVICE_LOW, used)];
        for (low, address) in registers {
            self.write(low, u32::try_from(address & 0xffff_ffff).unwrap());
            self.write(low + 4, u32::try_from(address >> 32).unwrap());
        }
        self.write(QUEUE_READY, 1);
    }

    /// Up to DRIVER_OK with queue 0.
    pub(super) fn start(&mut self) {
        self.negotiate(VERSION_1 | EVENT_IDX);
        self.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
        self.add_status(DRIVER_OK);
    }

    pub(super) fn activations(&self) -> usize {
        self.seen.lock().unwrap().activations.len()
    }
}

#[test]
fn identity_registers_say_what_the_device_is() {
    let mut driver = driver();
    assert_eq!(driver.read(REG_MAGIC).to_le_bytes(), *b"virt");
    assert_eq!((driver.read(REG_VERSION), driver.read(DEVICE_ID)), (2, 42));
    driver.write(DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.read(DEVICE_FEATURES), 1);
    driver.write(DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(DEVICE_FEATURES), 0);
    assert_eq!((driver.read(SHM_LEN_LOW), driver.read(SHM_BASE_HIGH)), (u32::MAX, u32::MAX));
}

#[test]
fn orderly_driver_starts_the_device_with_its_queue() {
    let mut driver = driver();
    driver.start();
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    let mut seen = driver.seen.lock().unwrap();
    let activation = seen.activations.pop().unwrap();
    assert_eq!(activation.features, VERSION_1 | EVENT_IDX);
    let [Some(first), None] = activation.queues.as_slice() else { panic!("one queue of two was set up") };
    let state = first.queue.state();
    assert_eq!((state.size, state.desc_table, state.avail_ring, state.used_ring), (16, 0x1000, 0x2000, 0x3000));
    assert!(state.event_idx_enabled && state.ready);
    // The worker is to look at the queue once.
    assert_eq!(first.kick.read().unwrap(), OWN_KICK);
}

#[test]
fn hostile_02_queue_select_out_of_range_reads_zero_and_changes_nothing() {
    let mut driver = driver();
    driver.negotiate(VERSION_1);
    for index in [2, 0x8000, u32::MAX] {
        driver.set_up_queue(index, 16, [0x1000, 0x2000, 0x3000]);
        assert_eq!((driver.read(QUEUE_NUM_MAX), driver.read(QUEUE_READY)), (0, 0));
    }
    driver.write(QUEUE_SEL, 0);
    assert_eq!((driver.read(QUEUE_NUM_MAX), driver.read(QUEUE_READY)), (u32::from(MAX_SIZE), 0));
}

#[test]
fn hostile_01_steps_out_of_order_are_refused() {
    let mut driver = driver();
    for bit in [DRIVER, FEATURES_OK, DRIVER_OK, 0x20] {
        driver.write(STATUS, bit);
        assert_eq!(driver.status(), 0, "{bit:#x}");
    }
    driver.write(STATUS, ACKNOWLEDGE | DRIVER);
    driver.add_status(DRIVER_OK);
    driver.add_status(FEATURES_OK | DRIVER_OK);
    assert_eq!(driver.status(), ACKNOWLEDGE | DRIVER);
    assert_eq!(driver.activations(), 0);
}

#[test]
fn hostile_01_status_bits_go_away_only_by_reset() {
    let mut driver = driver();
    driver.start();
    let running = driver.status();
    for value in [ACKNOWLEDGE, running & !DRIVER_OK, running & !FEATURES_OK, DRIVER_OK] {
        driver.write(STATUS, value);
        assert_eq!(driver.status(), running, "{value:#x}");
    }
    driver.write(STATUS, running);
    assert_eq!(driver.activations(), 1, "the same status again does not start the device again");
    driver.write(STATUS, 0);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.seen.lock().unwrap().resets, 1);
}

#[test]
fn hostile_01_features_that_were_not_offered_or_lack_version_1_are_refused() {
    for features in [VERSION_1 | 1, VERSION_1 | (1 << 63), FEATURE, 0] {
        let mut driver = driver();
        driver.negotiate(features);
        assert_eq!(driver.status() & FEATURES_OK, 0, "{features:#x}");
    }
}

#[test]
fn hostile_01_features_cannot_change_after_features_ok_or_driver_ok() {
    let mut driver = driver();
    driver.accept(u64::MAX); // before DRIVER: dropped
    driver.negotiate(VERSION_1);
    driver.accept(VERSION_1 | FEATURE);
    driver.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    driver.add_status(DRIVER_OK);
    driver.accept(u64::MAX);
    assert_eq!(driver.seen.lock().unwrap().activations[0].features, VERSION_1);
}

#[test]
fn hostile_01_queue_registers_cannot_change_before_features_ok_or_after_driver_ok() {
    let mut driver = driver();
    driver.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    assert_eq!(driver.read(QUEUE_READY), 0);
    driver.start();
    for offset in (QUEUE_DESC_LOW..=QUEUE_DEVICE_HIGH).step_by(4).chain([QUEUE_NUM, QUEUE_READY]) {
        driver.write(offset, 0);
    }
    driver.write(QUEUE_SEL, 1);
    driver.write(QUEUE_READY, 1);
    let registers = driver.transport.queues[0];
    assert!(registers.ready && registers.size == 16);
    assert_eq!((registers.descriptors, registers.available, registers.used), (0x1000, 0x2000, 0x3000));
    assert_eq!(driver.read(QUEUE_READY), 0, "the other queue stays as it was");
}

#[test]
fn hostile_01_queue_that_is_ready_keeps_its_registers() {
    let mut driver = driver();
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    driver.write(QUEUE_DESC_LOW, 0x9000);
    assert_eq!(driver.transport.queues[0].descriptors, 0x1000);
    driver.write(QUEUE_READY, 0);
    driver.write(QUEUE_DESC_LOW, 0x9000);
    assert_eq!(driver.transport.queues[0].descriptors, 0x9000);
}

#[test]
fn hostile_01_device_that_refuses_to_start_asks_for_a_reset() {
    let mut driver = driver_of(true);
    driver.start();
    assert_ne!(driver.status() & NEEDS_RESET, 0);
}

#[test]
fn hostile_01_failed_driver_can_only_reset() {
    let mut driver = driver();
    driver.write(STATUS, ACKNOWLEDGE);
    driver.add_status(FAILED);
    driver.add_status(DRIVER);
    assert_eq!(driver.status(), ACKNOWLEDGE | FAILED);
    driver.write(STATUS, 0);
    driver.start();
    assert_eq!(driver.activations(), 1);
}

#[test]
fn interrupt_status_says_used_buffers_until_a_reset_and_a_change_until_it_is_acknowledged() {
    let mut driver = driver();
    driver.start();
    assert_eq!(driver.read(INTERRUPT_STATUS), 0);
    driver.interrupt.notify_queue(0);
    driver.interrupt.notify_config();
    assert_eq!((driver.read(INTERRUPT_STATUS), driver.read(CONFIG_GENERATION)), (3, 1));
    driver.write(INTERRUPT_ACK, 3);
    assert_eq!(driver.read(INTERRUPT_STATUS), 1);
    driver.write(STATUS, 0);
    assert_eq!(driver.read(INTERRUPT_STATUS), 0);
}

/// The driver's handler (Linux: vm_interrupt): the status as memory, an acknowledgement that nobody sees, then the rings. A device
/// that uses a buffer at any moment of that is heard: either the handler that runs looks late enough, or the next one looks at all.
#[test]
fn used_buffer_at_any_moment_of_an_interrupt_is_seen_without_an_exit() {
    let mut driver = driver();
    driver.start();
    let used = std::sync::atomic::AtomicU32::new(0);
    let (count, order) = (20_000, std::sync::atomic::Ordering::SeqCst);
    let interrupt = driver.interrupt.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..count {
                used.fetch_add(1, order);
                interrupt.notify_queue(0);
            }
        });
        let mut seen = 0;
        while seen < count {
            driver.line.read().unwrap();
            assert_eq!(driver.interrupt.page().load(INTERRUPT_STATUS), 1, "an interrupt that says nothing");
            seen = used.load(order);
        }
    });
}

#[test]
fn hostile_02_doorbell_of_a_missing_queue_or_a_stopped_device_is_ignored() {
    let mut driver = driver();
    driver.write(QUEUE_NOTIFY, 0);
    assert!(driver.transport.kicks[0].read().is_err());
    driver.start();
    let _ = driver.transport.kicks[0].read();
    for queue in [2, 0x1_0000, u32::MAX] {
        driver.write(QUEUE_NOTIFY, queue);
    }
    assert!(driver.transport.kicks.iter().all(|kick| kick.read().is_err()));
    driver.write(QUEUE_NOTIFY, 0);
    assert_eq!(driver.transport.kicks[0].read().unwrap(), 1);
}

#[test]
fn hostile_01_device_can_be_reset_while_it_works_and_started_again() {
    const BASE: u64 = 0x1_0000;
    let memory = testing::memory();
    let device = Box::new(Rng::new(EventLoop::spawn().unwrap()));
    let mut driver = driver_for(device, memory.clone(), Arc::default());
    for _ in 0..3 {
        let mut queue = DriverQueue::new(&memory, BASE, 8);
        driver.negotiate(VERSION_1);
        driver.set_up_queue(0, 8, [BASE, BASE + 0x2000, BASE + 0x3000]);
        queue.add(&[(0x4000, 64, true)]);
        driver.add_status(DRIVER_OK); // the device finds the buffer without a kick
        driver.line.read().unwrap();
        assert_eq!(queue.take_used(), Some((0, 64)));
        for _ in 0..7 {
            queue.add(&[(0x4000, 64, true)]);
        }
        driver.write(QUEUE_NOTIFY, 0);
        driver.write(STATUS, 0); // while it works, perhaps
        assert_eq!(driver.status(), 0);
        // The worker is gone; what it interrupted for before does not count for the next round.
        driver.line.write(1).unwrap();
        driver.line.read().unwrap();
    }
}

#[test]
fn hostile_07_broken_ring_is_told_by_the_status_until_a_reset() {
    const BASE: u64 = 0x1_0000;
    let memory = testing::memory();
    let device = Box::new(Rng::new(EventLoop::spawn().unwrap()));
    let mut driver = driver_for(device, memory.clone(), Arc::default());
    let mut queue = DriverQueue::new(&memory, BASE, 8);
    queue.set_avail(9);
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 8, [BASE, BASE + 0x2000, BASE + 0x3000]);
    driver.add_status(DRIVER_OK);
    driver.line.read().unwrap();
    assert_ne!(driver.status() & NEEDS_RESET, 0);

    driver.write(STATUS, 0);
    let mut queue = DriverQueue::new(&memory, BASE, 8);
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 8, [BASE, BASE + 0x2000, BASE + 0x3000]);
    queue.add(&[(0x4000, 64, true)]);
    driver.add_status(DRIVER_OK);
    driver.line.read().unwrap();
    assert_eq!(queue.take_used(), Some((0, 64)));
}

#[test]
fn hostile_08_reset_is_over_when_the_status_is_0_and_the_driver_can_do_nothing_before() {
    let mut driver = driver();
    driver.start();
    driver.seen.lock().unwrap().in_host = true;
    driver.write(STATUS, 0);
    for _ in 0..2 {
        assert_eq!(driver.status(), NEEDS_RESET);
        driver.write(QUEUE_SEL, 0);
        assert_eq!(driver.read(QUEUE_READY), 0);
        // A driver that does not look gets nowhere.
        driver.start();
        driver.add_status(FAILED);
        assert_eq!((driver.status(), driver.activations()), (NEEDS_RESET, 1));
        // One that is not sure resets again.
        driver.write(STATUS, 0);
    }
    driver.seen.lock().unwrap().in_host = false;
    assert_eq!(driver.status(), 0);
    driver.start();
    assert_eq!((driver.activations(), driver.status() & NEEDS_RESET), (2, 0));
}
