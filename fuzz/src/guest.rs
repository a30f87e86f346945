//! A hostile driver: an input is a list of what it does to a device's queues, memory and registers.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Once};

use bulkhead_vmm::event_loop::{EventLoop, WorkerGuard};
use bulkhead_vmm::memory::Memory;
use bulkhead_vmm::virtio::ring::event_fd;
use bulkhead_vmm::virtio::testing::{DriverQueue, NEXT, TestInterrupt, WRITE, activation, memory};
use bulkhead_vmm::virtio::{Activation, VirtioDevice};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::input::Input;

/// Steps of one input.
const MAX_STEPS: usize = 64;
/// Buffers of one chain.
const MAX_SEGMENTS: usize = 16;

/// Queues are here, one after the other.
const QUEUES: u64 = 0x1_0000;
/// Room of a queue: descriptors, available and used ring.
const QUEUE_ROOM: u64 = 0x4000;
/// Buffers and indirect tables are taken from here, in a circle.
const ARENA: u64 = 0x10_0000;
const ARENA_END: u64 = 0xf0_0000;

/// VIRTQ_DESC_F_INDIRECT.
const INDIRECT: u16 = 4;
/// VIRTIO_RING_F_EVENT_IDX.
const EVENT_IDX: u64 = 1 << 29;

/// One buffer of a chain, as [`crate::script`] writes it.
pub mod segment {
    /// For the device to write.
    pub const WRITE: u8 = 1;
    /// Anywhere: 64 bits of address and 32 of length follow.
    pub const WILD: u8 = 2;
    /// The length counts in units of 64.
    pub const LARGE: u8 = 4;
    /// Where the buffer before it is.
    pub const SAME: u8 = 8;
}

/// What a driver does, as [`crate::script`] writes it.
pub mod step {
    /// A chain: queue, number of buffers, buffers.
    pub const CHAIN: u8 = 0;
    /// A chain in an indirect table: queue, bytes by which the table's length is wrong, number of buffers, buffers.
    pub const INDIRECT: u8 = 1;
    /// A descriptor: queue, index, address, length, flags, next.
    pub const DESCRIPTOR: u8 = 2;
    /// Makes a head available: queue, head.
    pub const OFFER: u8 = 3;
    /// Sets the available index: queue, index.
    pub const AVAILABLE: u8 = 4;
    /// Notifies, and waits until the device has seen it: queue.
    pub const KICK: u8 = 5;
    /// Overwrites part of a queue: queue, offset, length, bytes.
    pub const POKE: u8 = 6;
    /// Resets the device and starts it anew.
    pub const RESET: u8 = 7;
    /// Reads the configuration space: offset, length.
    pub const READ_CONFIG: u8 = 8;
    /// Writes it: offset, length, bytes.
    pub const WRITE_CONFIG: u8 = 9;
    /// What the device's own target makes of it.
    pub const OWN: u8 = 10;
    /// Number of steps.
    pub const COUNT: usize = 11;
}

/// A device under test.
pub trait Subject {
    /// Sizes of its queues as the driver makes them.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Feature bits that a driver may choose from.
    fn features(&self) -> u64;

    /// DRIVER_OK. `false` if the device cannot start.
    fn start(&mut self, activation: Activation) -> bool;

    /// A reset.
    fn stop(&mut self);

    /// Returns when the device has dealt with every kick so far.
    fn settle(&mut self);

    /// The configuration space.
    fn read_config(&mut self, _offset: u64, _data: &mut [u8]) {}

    /// The configuration space.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// [`step::OWN`]: requests that are well-formed where it matters, and what the host does meanwhile.
    fn own(&mut self, _guest: &mut Guest, _input: &mut Input<'_>) {}

    /// Brings the host's end of the device into a state in which it can work.
    fn host_recovers(&mut self) {}

    /// A request that a device answers at once, after a reset, whatever came before: queue and buffers.
    fn probe(&mut self, guest: &mut Guest) -> Option<(usize, Vec<Buffer>)>;
}

/// Address, length, and whether the device writes it.
pub type Buffer = (u64, u32, bool);

/// The driver.
pub struct Guest {
    /// 16 MiB.
    pub memory: Memory,
    interrupt: Arc<TestInterrupt>,
    queues: Vec<DriverQueue>,
    sizes: Vec<u16>,
    cursor: u64,
}

impl Guest {
    fn new(sizes: Vec<u16>) -> Self {
        Self { memory: memory(), interrupt: Arc::default(), queues: Vec::new(), sizes, cursor: ARENA }
    }

    /// Queues afresh, and what the device gets of them.
    fn activation(&mut self, features: u64) -> Activation {
        let queue = |(base, size): (u64, &u16)| {
            let queue = DriverQueue::new(&self.memory, base, *size);
            if features & EVENT_IDX == 0 { queue } else { queue.with_event_idx() }
        };
        let bases = (QUEUES..).step_by(QUEUE_ROOM as usize);
        self.queues = bases.zip(&self.sizes).map(queue).collect();
        activation(&self.memory, features, &self.queues.iter().collect::<Vec<_>>(), &self.interrupt)
    }

    /// Room in the arena.
    pub fn allocate(&mut self, len: u32) -> u64 {
        let len = u64::from(len);
        if self.cursor + len > ARENA_END {
            self.cursor = ARENA;
        }
        let address = self.cursor;
        self.cursor = (address + len).next_multiple_of(16).min(ARENA_END);
        address
    }

    /// A buffer with these bytes.
    pub fn place(&mut self, bytes: &[u8]) -> Buffer {
        let len = u32::try_from(bytes.len()).unwrap();
        let address = self.allocate(len);
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        (address, len, false)
    }

    /// A buffer for the device to fill.
    pub fn room(&mut self, len: u32) -> Buffer {
        (self.allocate(len), len, true)
    }

    /// Makes a chain available.
    pub fn offer(&mut self, queue: usize, buffers: &[Buffer]) {
        self.queues[queue].add(buffers);
    }

    /// Notifies the device.
    pub fn kick(&self, queue: usize) {
        self.queues[queue].kick();
    }

    fn queue(&self, input: &mut Input<'_>) -> usize {
        input.choice(self.queues.len())
    }

    /// The buffers of a chain.
    pub fn buffers(&mut self, input: &mut Input<'_>) -> Vec<Buffer> {
        let count = 1 + input.choice(MAX_SEGMENTS);
        let mut buffers = Vec::with_capacity(count);
        for _ in 0..count {
            let flags = input.u8();
            let write = flags & segment::WRITE != 0;
            let last = buffers.last().map(|(address, ..): &Buffer| *address);
            let buffer = if flags & segment::WILD != 0 {
                (input.u64(), input.u32(), write)
            } else {
                let unit = if flags & segment::LARGE != 0 { 64 } else { 1 };
                let len = u32::from(input.u16()) * unit;
                let same = last.filter(|_| flags & segment::SAME != 0);
                let address = same.unwrap_or_else(|| self.allocate(len));
                if !write && same.is_none() {
                    let bytes = input.bytes(usize::try_from(len).unwrap());
                    self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                }
                (address, len, write)
            };
            buffers.push(buffer);
        }
        buffers
    }

    /// A chain in an indirect table.
    fn indirect(&mut self, queue: usize, input: &mut Input<'_>) {
        let wrong = u32::from(input.u8());
        let buffers = self.buffers(input);
        let mut table = Vec::new();
        for (index, (address, len, write)) in (1_u16..).zip(&buffers) {
            let more = if usize::from(index) < buffers.len() { NEXT } else { 0 };
            table.extend(address.to_le_bytes());
            table.extend(len.to_le_bytes());
            table.extend((more | if *write { WRITE } else { 0 }).to_le_bytes());
            table.extend(index.to_le_bytes());
        }
        let (address, len, _) = self.place(&table);
        let head = self.queues[queue].next_descriptor();
        // Takes the descriptor, and is written over at once.
        self.queues[queue].add(&[(address, len, false)]);
        self.queues[queue].descriptor(head, address, len ^ wrong, INDIRECT, 0);
    }

    fn descriptor(&self, queue: usize, input: &mut Input<'_>) {
        let index = input.u16() % self.sizes[queue];
        let (address, len, flags, next) = (input.u64(), input.u32(), input.u16(), input.u16());
        self.queues[queue].descriptor(index, address, len, flags, next);
    }

    fn poke(&self, queue: usize, input: &mut Input<'_>) {
        let base = QUEUES + QUEUE_ROOM * queue as u64;
        let offset = u64::from(input.u16()) % QUEUE_ROOM;
        let len = input.choice(64);
        self.memory.write_slice(input.bytes(len), GuestAddress(base + offset)).unwrap();
    }

    /// Chains that the device has returned since the queue was made.
    fn used(&self, queue: usize) -> u16 {
        let at = QUEUES + QUEUE_ROOM * queue as u64 + 0x3000 + 2;
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }
}

/// A write into a broken pipe is an error and not the end, as in every program whose `main` is Rust's; libFuzzer's is not.
fn ignore_broken_pipes() {
    static DONE: Once = Once::new();
    // SAFETY: No handler is installed, and no other thread changes what becomes of the signal.
    DONE.call_once(|| {
        let _ = unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    });
}

/// Lets the driver of an input loose on a device; afterwards the device must work again once it has been reset.
pub fn drive(subject: &mut dyn Subject, data: &[u8]) {
    ignore_broken_pipes();
    let mut input = Input::new(data);
    let mut guest = Guest::new(subject.queue_sizes());
    let features = choose(subject, &mut input);
    let mut running = start(subject, &mut guest, features);
    for _ in 0..MAX_STEPS {
        if input.is_empty() {
            break;
        }
        match u8::try_from(input.choice(step::COUNT)).unwrap() {
            step::CHAIN => {
                let queue = guest.queue(&mut input);
                let buffers = guest.buffers(&mut input);
                guest.offer(queue, &buffers);
            }
            step::INDIRECT => {
                let queue = guest.queue(&mut input);
                guest.indirect(queue, &mut input);
            }
            step::DESCRIPTOR => {
                let queue = guest.queue(&mut input);
                guest.descriptor(queue, &mut input);
            }
            step::OFFER => {
                let queue = guest.queue(&mut input);
                guest.queues[queue].offer(input.u16());
            }
            step::AVAILABLE => {
                let queue = guest.queue(&mut input);
                guest.queues[queue].set_avail(input.u16());
            }
            step::KICK => {
                guest.kick(guest.queue(&mut input));
                if running {
                    subject.settle();
                }
            }
            step::POKE => {
                let queue = guest.queue(&mut input);
                guest.poke(queue, &mut input);
            }
            step::RESET => {
                let features = choose(subject, &mut input);
                running = start(subject, &mut guest, features);
            }
            step::READ_CONFIG => {
                let offset = input.u64();
                let mut data = vec![0; input.choice(9)];
                subject.read_config(offset, &mut data);
            }
            step::WRITE_CONFIG => {
                let offset = input.u64();
                let len = input.choice(9);
                subject.write_config(offset, input.bytes(len));
            }
            _ => subject.own(&mut guest, &mut input),
        }
    }
    for queue in 0..guest.queues.len() {
        guest.kick(queue);
    }
    if running {
        subject.settle();
    }
    works_after_reset(subject, &mut guest);
    subject.stop();
}

fn choose(subject: &dyn Subject, input: &mut Input<'_>) -> u64 {
    (subject.features() | EVENT_IDX) & !input.u64()
}

fn start(subject: &mut dyn Subject, guest: &mut Guest, features: u64) -> bool {
    subject.stop();
    let activation = guest.activation(features);
    subject.start(activation)
}

fn works_after_reset(subject: &mut dyn Subject, guest: &mut Guest) {
    subject.host_recovers();
    let features = subject.features();
    assert!(start(subject, guest, features), "the device does not start again after a reset");
    let Some((queue, buffers)) = subject.probe(guest) else { return };
    guest.offer(queue, &buffers);
    guest.kick(queue);
    subject.settle();
    assert_eq!(guest.used(queue), 1, "the device does not answer after a reset");
}

thread_local! {
    /// One loop for all inputs: its thread ends with the process only.
    static LOOP: (EventLoop, Echo) = {
        let event_loop = EventLoop::spawn().unwrap();
        let echo = Echo::new(&event_loop);
        (event_loop, echo)
    };
}

/// The device loop.
pub fn event_loop() -> EventLoop {
    LOOP.with(|(event_loop, _)| event_loop.clone())
}

/// Returns when the loop has dealt with every event so far, and with those that these have led to.
pub fn settle() {
    LOOP.with(|(_, echo)| {
        // What is ready together is dealt with in any order, but once: a second echo is of another turn than the first.
        (0..3).for_each(|_| echo.call());
    });
}

/// A way to hear from the loop.
struct Echo {
    event: EventFd,
    heard: Receiver<()>,
    _worker: WorkerGuard,
}

impl Echo {
    fn new(event_loop: &EventLoop) -> Self {
        let event = event_fd().unwrap();
        let (answer, heard) = channel();
        let worker = EchoWorker { event: event.try_clone().unwrap(), answer };
        Self { event, heard, _worker: event_loop.add(Box::new(worker)).unwrap() }
    }

    fn call(&self) {
        self.event.write(1).unwrap();
        self.heard.recv().unwrap();
    }
}

struct EchoWorker {
    event: EventFd,
    answer: Sender<()>,
}

impl MutEventSubscriber for EchoWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.event.read().unwrap();
        let _ = self.answer.send(());
    }
}

/// See [`Subject::own`].
pub type Own = Box<dyn FnMut(&mut Guest, &mut Input<'_>)>;

/// A device that lives in the device loop.
pub struct Device {
    /// It.
    pub device: Box<dyn VirtioDevice>,
    /// See [`Subject::own`].
    pub own: Own,
    /// See [`Subject::probe`].
    pub probe: fn(&mut Guest) -> (usize, Vec<Buffer>),
    /// See [`Subject::host_recovers`].
    pub host_recovers: Box<dyn FnMut()>,
}

impl Subject for Device {
    fn queue_sizes(&self) -> Vec<u16> {
        self.device.queue_sizes().to_vec()
    }

    fn features(&self) -> u64 {
        self.device.features()
    }

    fn start(&mut self, activation: Activation) -> bool {
        self.device.activate(activation).is_ok()
    }

    fn stop(&mut self) {
        self.device.reset();
    }

    fn settle(&mut self) {
        settle();
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    fn own(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        (self.own)(guest, input);
    }

    fn host_recovers(&mut self) {
        (self.host_recovers)();
    }

    fn probe(&mut self, guest: &mut Guest) -> Option<(usize, Vec<Buffer>)> {
        Some((self.probe)(guest))
    }
}
