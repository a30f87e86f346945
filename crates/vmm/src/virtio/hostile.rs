//! Every kind of device before a driver that breaks the rules which all devices share: what happens to one that is not
//! written for it must not depend on which one it is. A source of entropy in the same device loop is the bystander that
//! has to go on working.

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex};
use vm_memory::{Bytes, GuestAddress};

use super::balloon::Balloon;
use super::block::Block;
use super::console::Console;
use super::fs::Fs;
use super::mem::{Backing, Mem};
use super::net::tests::Wired;
use super::rng::Rng;
use super::testing::{DriverQueue, Ends, INDIRECT, NEXT, TestInterrupt, WRITE, activation, memory};
use super::vsock::Vsock;
use super::{Interrupt, Memory, VirtioDevice};
use crate::descriptors::Descriptors;
use crate::devices::DeviceBuilder;
use crate::event_loop::EventLoop;
use crate::layout::MEMORY_BLOCK;

/// Small enough for every device; a power of two.
const SIZE: u16 = 8;
/// Where requests are, apart from where broken chains lead.
const REQUEST: u64 = 0x40_0000;
const REPLY: u64 = 0x50_0000;
/// Half of the memory.
const WILD: u64 = 0x80_0000;
const TABLE: u64 = 0x60_0000;

const NET: DeviceSpec = DeviceSpec::Net { tap: FdIndex(0), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };

/// The header before each frame (section 5.1.6).
const NET_HEADER: usize = 12;

/// One of each. What the machine can be built of is this and nothing else: [`rig`] would not compile without an arm for it.
fn every_spec() -> Vec<DeviceSpec> {
    vec![
        DeviceSpec::Balloon,
        DeviceSpec::Block { file: FdIndex(0), read_only: false, serial: "disk".into() },
        DeviceSpec::Console { output: FdIndex(0) },
        DeviceSpec::Fs { tag: "share".into(), root: FdIndex(0) },
        DeviceSpec::Memory { requested_mib: 0 },
        NET,
        DeviceSpec::Rng,
        DeviceSpec::Vsock,
    ]
}

/// A device, and a request that it answers.
struct Rig {
    name: &'static str,
    device: Box<dyn VirtioDevice>,
    /// The queue for requests.
    queue: u16,
    /// What the request says, and the room for its answer.
    request: Vec<u8>,
    reply: u32,
    /// The host's side.
    host: Box<dyn Any>,
}

struct NoBacking;

impl Backing for NoBacking {
    fn start(&self) -> u64 {
        8 << 30
    }
    fn size(&self) -> u64 {
        MEMORY_BLOCK
    }
    fn attach(&mut self, _block: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn detach(&mut self, _block: usize) -> std::io::Result<()> {
        Ok(())
    }
    fn discard(&mut self, _address: u64, _len: u64) {}
}

fn rig(spec: &DeviceSpec, event_loop: EventLoop) -> Rig {
    let rig = |name, device: Box<dyn VirtioDevice>, queue, request: Vec<u8>, reply, host: Box<dyn Any>| Rig {
        name,
        device,
        queue,
        request,
        reply,
        host,
    };
    match spec {
        DeviceSpec::Balloon => rig("balloon", Box::new(Balloon::new(event_loop)), 2, vec![], 0x1000, Box::new(())),
        DeviceSpec::Block { read_only, serial, .. } => {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&[1; 4096]).unwrap();
            let device = Block::new(file.into(), *read_only, serial, event_loop).unwrap();
            rig("block", Box::new(device), 0, vec![0; 16], 513, Box::new(()))
        }
        DeviceSpec::Console { .. } => {
            let (reader, writer) = std::io::pipe().unwrap();
            let device = Console::new(writer.into(), event_loop).unwrap();
            rig("console", Box::new(device), 1, b"hello".to_vec(), 0, Box::new(reader))
        }
        DeviceSpec::Fs { tag, .. } => {
            let share = tempfile::tempdir().unwrap();
            let device = Fs::new(tag, File::open(share.path()).unwrap().into()).unwrap();
            // FUSE_INIT, version 7.38, with FUSE_SUBMOUNTS.
            let words = [56, 26, 1, 0, 0, 0, 0, 0, 0, 0, 7, 38, 0, 1 << 27];
            rig("fs", Box::new(device), 1, words.map(u32::to_le_bytes).concat(), 0x100, Box::new(share))
        }
        DeviceSpec::Memory { requested_mib } => {
            let (device, handle) = Mem::new(Box::new(NoBacking), *requested_mib << 20, event_loop).unwrap();
            rig("mem", Box::new(device), 0, vec![3; 24], 10, Box::new(handle))
        }
        DeviceSpec::Net { .. } => {
            let (device, wire) = Wired::new(event_loop);
            rustix::fs::fcntl_setfl(&wire, rustix::fs::OFlags::NONBLOCK).unwrap();
            // Too short for a frame, so that it is not sent, which would fill the wire.
            rig("net", Box::new(device), 1, vec![0; 20], 0, Box::new(wire))
        }
        DeviceSpec::Rng => rig("rng", Box::new(Rng::new(event_loop)), 0, vec![], 64, Box::new(())),
        DeviceSpec::Vsock => {
            let (device, handle) = Vsock::new(3, event_loop, Box::new(|| {})).unwrap();
            // A RST from the guest to the host, which nobody answers.
            let mut packet = vec![0; 44];
            (packet[0], packet[8], packet[28], packet[30]) = (3, 2, 1, 3);
            rig("vsock", Box::new(device), 1, packet, 0, Box::new(handle))
        }
    }
}

/// From DRIVER_OK to reset.
struct Session {
    memory: Memory,
    interrupt: Arc<TestInterrupt>,
    queues: Vec<DriverQueue>,
}

impl Rig {
    fn start(&mut self) -> Session {
        let (memory, interrupt) = (memory(), Arc::default());
        let count = self.device.queue_sizes().len();
        let queues: Vec<_> =
            (1..).take(count).map(|number| DriverQueue::new(&memory, number * 0x1_0000, SIZE)).collect();
        self.activate(&memory, &queues, &interrupt);
        memory.write_slice(&self.request, GuestAddress(REQUEST)).unwrap();
        Session { memory, interrupt, queues }
    }

    fn activate(&mut self, memory: &Memory, queues: &[DriverQueue], interrupt: &Arc<TestInterrupt>) {
        let queues: Vec<_> = queues.iter().collect();
        let activation = activation(memory, self.device.features(), &queues, interrupt);
        self.device.activate(activation).unwrap();
    }

    fn queue<'a>(&self, session: &'a mut Session) -> &'a mut DriverQueue {
        &mut session.queues[usize::from(self.queue)]
    }

    fn buffers(&self) -> Vec<(u64, u32, bool)> {
        let request = (REQUEST, u32::try_from(self.request.len()).unwrap(), false);
        [request, (REPLY, self.reply, true)].into_iter().filter(|(_, len, _)| *len > 0).collect()
    }

    /// Sends the request and waits for its answer; `None` if the device asks for a reset instead.
    fn ask(&self, session: &mut Session) -> Option<()> {
        let head = self.queue(session).add(&self.buffers());
        self.queue(session).kick();
        while session.queues[usize::from(self.queue)].wait_used_or_reset(&session.interrupt)?.0 != head {}
        Some(())
    }

    /// A device that has been reset works.
    fn works_after_a_reset(&mut self) {
        self.device.reset();
        let mut session = self.start();
        assert!(self.ask(&mut session).is_some(), "{} does not work after a reset", self.name);
        self.device.reset();
    }
}

/// Runs `test` for every kind of device, each with a bystander in its device loop.
fn for_every_device(mut test: impl FnMut(&mut Rig, &mut dyn FnMut())) {
    for spec in every_spec() {
        let event_loop = EventLoop::spawn().unwrap();
        let mut bystander = rig(&DeviceSpec::Rng, event_loop.clone());
        let mut session = bystander.start();
        let mut rig = rig(&spec, event_loop);
        test(&mut rig, &mut || assert!(bystander.ask(&mut session).is_some()));
    }
}

#[test]
fn hostile_01_reset_with_requests_in_flight_ends_what_the_device_does_to_the_rings() {
    for_every_device(|rig, bystander| {
        for _ in 0..10 {
            let mut session = rig.start();
            let buffers = rig.buffers();
            let queue = rig.queue(&mut session);
            let head = queue.add(&buffers);
            (1..SIZE).for_each(|_| queue.offer(head));
            queue.kick();
            rig.device.reset();
            // The driver may use the memory for something else from here on.
            let queue = rig.queue(&mut session);
            while queue.take_used().is_some() {}
            queue.kick();
            bystander();
            assert_eq!(rig.queue(&mut session).take_used(), None, "{}", rig.name);
        }
        rig.device.reset();
        rig.works_after_a_reset();
    });
}

#[test]
fn hostile_02_configuration_reads_beyond_the_end_and_of_any_width_are_zero_or_what_is_there() {
    for_every_device(|rig, _| {
        let mut space = [0; 256];
        for (offset, byte) in (0..).zip(&mut space) {
            rig.device.read_config(offset, std::slice::from_mut(byte));
        }
        assert!(space[64..].iter().all(|byte| *byte == 0), "{}", rig.name);
        for width in [1, 2, 4, 8] {
            for offset in 0..space.len() - width {
                let mut data = vec![0; width];
                rig.device.read_config(u64::try_from(offset).unwrap(), &mut data);
                assert_eq!(data, space[offset..offset + width], "{} {offset} {width}", rig.name);
            }
            for offset in [0xf00, u64::from(u32::MAX), u64::MAX - 3, u64::MAX] {
                let mut data = vec![0; width];
                rig.device.read_config(offset, &mut data);
                assert_eq!(data, vec![0; width], "{} {offset:#x} {width}", rig.name);
            }
            rig.device.write_config(u64::MAX, &vec![0xff; width]);
            rig.device.write_config(0, &vec![0xff; width]);
        }
        let mut again = [0; 256];
        rig.device.read_config(0, &mut again);
        assert_eq!(again, space, "{}: nothing of it can be written", rig.name);
    });
}

#[test]
fn hostile_03_queues_that_share_their_rings_harm_nobody() {
    for_every_device(|rig, bystander| {
        let (memory, interrupt) = (memory(), Arc::default());
        let count = rig.device.queue_sizes().len();
        let mut queues: Vec<_> = (0..count).map(|_| DriverQueue::new(&memory, 0x1_0000, SIZE)).collect();
        rig.activate(&memory, &queues, &interrupt);
        memory.write_slice(&rig.request, GuestAddress(REQUEST)).unwrap();
        for _ in 0..3 {
            queues[0].add(&rig.buffers());
            queues.iter().for_each(DriverQueue::kick);
        }
        bystander();
        rig.works_after_a_reset();
    });
}

#[test]
fn hostile_04_available_index_that_jumps_asks_for_a_reset() {
    for_every_device(|rig, bystander| {
        for index in [SIZE + 1, 0x7fff, u16::MAX] {
            let mut session = rig.start();
            rig.queue(&mut session).set_avail(index);
            rig.queue(&mut session).kick();
            session.interrupt.wait_reset();
            bystander();
            rig.works_after_a_reset();
        }
    });
}

#[test]
fn hostile_04_available_index_that_jumps_later_asks_for_a_reset() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        for _ in 0..3 {
            assert!(rig.ask(&mut session).is_some());
        }
        rig.queue(&mut session).set_avail(2); // back
        rig.queue(&mut session).kick();
        session.interrupt.wait_reset();
        bystander();
        rig.works_after_a_reset();
    });
}

#[test]
fn hostile_04_head_that_the_queue_does_not_have_asks_for_a_reset() {
    for_every_device(|rig, bystander| {
        for head in [SIZE, SIZE + 1, 0x8000, u16::MAX] {
            let mut session = rig.start();
            rig.queue(&mut session).offer(head);
            rig.queue(&mut session).kick();
            session.interrupt.wait_reset();
            bystander();
            rig.works_after_a_reset();
        }
    });
}

/// CVE-2026-45782.
#[test]
fn hostile_04_same_head_many_times_in_flight_is_answered_as_often() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let buffers = rig.buffers();
        let queue = rig.queue(&mut session);
        let head = queue.add(&buffers);
        (1..SIZE).for_each(|_| queue.offer(head));
        queue.kick();
        for _ in 0..SIZE {
            assert_eq!(session.queues[usize::from(rig.queue)].wait_used(&session.interrupt).0, head, "{}", rig.name);
        }
        bystander();
        rig.works_after_a_reset();
    });
}

/// Endless submission: the ring is full again before the device has looked.
#[test]
fn hostile_04_driver_that_never_stops_submitting_starves_nobody() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let buffers = rig.buffers();
        let queue = rig.queue(&mut session);
        let head = queue.add(&buffers);
        (1..SIZE).for_each(|_| queue.offer(head));
        let (mut twin, stop) = (queue.twin(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            let _ends = Ends(&stop);
            scope.spawn(|| twin.flood(&stop));
            (0..20).for_each(|_| bystander());
            // While the flood goes on.
            rig.device.reset();
            bystander();
        });
        rig.works_after_a_reset();
    });
}

/// The most descriptors that a chain can have are in an indirect table, and the ring is full of it.
#[test]
fn hostile_04_longest_chains_that_there_can_be_do_not_hold_up_the_others() {
    for_every_device(|rig, bystander| {
        for len in [0, 1, 0x1000] {
            for flags in [0, WRITE] {
                let mut session = rig.start();
                let entries: Vec<_> = (1..=u16::MAX)
                    .map(|next| (WILD, len, flags | if next < u16::MAX { NEXT } else { 0 }, next))
                    .collect();
                let queue = rig.queue(&mut session);
                table(queue, queue.memory(), u32::from(u16::MAX) * 16, 0, &entries);
                (0..SIZE).for_each(|_| queue.offer(4));
                queue.kick();
                bystander();
                assert_eq!(
                    session.queues[usize::from(rig.queue)].wait_used_or_reset(&session.interrupt).map(|used| used.0),
                    Some(4),
                    "{}",
                    rig.name
                );
                rig.device.reset();
            }
        }
        rig.works_after_a_reset();
    });
}

/// A chain with something wrong, of descriptors from 4 on, readable or writable by `flags`; and its name.
type BrokenChain = (&'static str, fn(&DriverQueue, flags: u16));

/// Writes an indirect table.
fn table(queue: &DriverQueue, memory: &Memory, len: u32, flags: u16, entries: &[(u64, u32, u16, u16)]) {
    for (at, (address, len, flags, next)) in (TABLE..).step_by(16).zip(entries) {
        let words = [*address, u64::from(*len) | u64::from(*flags) << 32 | u64::from(*next) << 48];
        memory.write_slice(&words.map(u64::to_le_bytes).concat(), GuestAddress(at)).unwrap();
    }
    queue.descriptor(4, TABLE, len, INDIRECT | flags, 5);
}

const BROKEN_CHAINS: [BrokenChain; 21] = [
    ("names itself", |q, flags| q.descriptor(4, WILD, 16, NEXT | flags, 4)),
    ("goes round", |q, flags| {
        q.descriptor(4, WILD, 16, NEXT | flags, 5);
        q.descriptor(5, WILD, 16, NEXT | flags, 4);
    }),
    ("goes on beyond the table", |q, flags| q.descriptor(4, WILD, 16, NEXT | flags, SIZE)),
    ("goes on far beyond the table", |q, flags| q.descriptor(4, WILD, 16, NEXT | flags, u16::MAX)),
    ("indirect in indirect", |q, flags| table(q, q.memory(), 16, 0, &[(TABLE, 16, INDIRECT | flags, 0)])),
    ("indirect table that loops", |q, flags| {
        table(q, q.memory(), 32, 0, &[(WILD, 16, NEXT | flags, 1), (WILD, 16, NEXT | flags, 0)]);
    }),
    ("indirect table of 17 bytes", |q, flags| table(q, q.memory(), 17, 0, &[(WILD, 16, flags, 0)])),
    ("indirect table of 15 bytes", |q, flags| table(q, q.memory(), 15, 0, &[(WILD, 16, flags, 0)])),
    ("indirect table of no bytes", |q, _| table(q, q.memory(), 0, 0, &[])),
    ("indirect table of 65536 entries", |q, flags| table(q, q.memory(), 0x10_0000, 0, &[(WILD, 16, flags, 0)])),
    ("indirect table of 4 GiB", |q, flags| table(q, q.memory(), !15, 0, &[(WILD, 16, flags, 0)])),
    ("indirect table beyond memory", |q, _| q.descriptor(4, 1 << 40, 32, INDIRECT, 0)),
    ("indirect table that wraps", |q, _| q.descriptor(4, u64::MAX - 15, 32, INDIRECT, 0)),
    ("indirect and next", |q, flags| table(q, q.memory(), 16, NEXT, &[(WILD, 16, flags, 0)])),
    ("address that wraps", |q, flags| q.descriptor(4, u64::MAX - 7, 16, flags, 0)),
    ("no bytes", |q, flags| q.descriptor(4, WILD, 0, flags, 0)),
    ("4 GiB", |q, flags| q.descriptor(4, WILD, u32::MAX, flags, 0)),
    ("across the end of memory", |q, flags| q.descriptor(4, (16 << 20) - 8, 16, flags, 0)),
    ("more than 4 GiB in total", |q, flags| {
        // 600 times the upper half of the memory.
        let entries = (1..=600).map(|next| (WILD, 8 << 20, flags | if next < 600 { NEXT } else { 0 }, next));
        table(q, q.memory(), 600 * 16, 0, &entries.collect::<Vec<_>>());
    }),
    ("flags that nobody has defined", |q, flags| q.descriptor(4, WILD, 16, 0xfff8 | flags, 0)),
    ("readable after writable", |q, flags| {
        q.descriptor(4, WILD, 16, NEXT | (flags ^ WRITE), 5);
        q.descriptor(5, WILD, 16, NEXT | flags, 6);
        q.descriptor(6, WILD, 16, flags ^ WRITE, 0);
    }),
];

#[test]
fn hostile_05_broken_chains_are_given_back_or_stop_the_device_until_a_reset() {
    for_every_device(|rig, bystander| {
        for (name, broken) in BROKEN_CHAINS {
            for flags in [0, WRITE] {
                let mut session = rig.start();
                let queue = rig.queue(&mut session);
                broken(queue, flags);
                queue.offer(4);
                queue.kick();
                if rig.ask(&mut session).is_none() {
                    println!("{} needs a reset after a chain with {name}", rig.name);
                }
                bystander();
                rig.works_after_a_reset();
            }
        }
    });
}

#[test]
fn hostile_05_request_with_every_buffer_in_the_wrong_direction_is_given_back() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let wrong: Vec<_> = rig.buffers().into_iter().map(|(address, len, write)| (address, len, !write)).collect();
        let head = rig.queue(&mut session).add(&wrong);
        rig.queue(&mut session).kick();
        assert_eq!(session.queues[usize::from(rig.queue)].wait_used(&session.interrupt).0, head, "{}", rig.name);
        assert!(rig.ask(&mut session).is_some(), "{}", rig.name);
        bystander();
        rig.works_after_a_reset();
    });
}

/// Another vCPU rewrites the descriptors while the device walks them.
#[test]
fn hostile_06_descriptors_that_change_all_the_time_harm_nobody() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let buffers = rig.buffers();
        let queue = rig.queue(&mut session);
        let head = queue.add(&buffers);
        let (twin, stop) = (queue.twin(), AtomicBool::new(false));
        let (address, len, write) = buffers[0];
        let flags = if write { WRITE } else { 0 } | if buffers.len() > 1 { NEXT } else { 0 };
        std::thread::scope(|scope| {
            let _ends = Ends(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    twin.descriptor(head, address, len, flags, 1);
                    twin.descriptor(head, u64::MAX - 7, len, flags, 1);
                    twin.descriptor(head, address, u32::MAX, flags, 1);
                    twin.descriptor(head, address, len, flags ^ WRITE, 1);
                    twin.descriptor(head, address, len, flags | NEXT, head);
                    twin.descriptor(head, address, 32, INDIRECT, 0);
                    twin.descriptor(head, address, 0, flags, SIZE);
                }
            });
            for _ in 0..300 {
                rig.queue(&mut session).offer(head);
                rig.queue(&mut session).kick();
                if session.queues[usize::from(rig.queue)].wait_used_or_reset(&session.interrupt).is_none() {
                    break;
                }
            }
        });
        bystander();
        rig.works_after_a_reset();
    });
}

/// The words of the request, as another vCPU changes them: whatever the device makes of it, it is one request.
#[test]
fn hostile_06_requests_that_change_all_the_time_are_answered_each_once() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let (memory, request, stop) = (session.memory.clone(), rig.request.clone(), AtomicBool::new(false));
        let other: Vec<u8> = request.iter().map(|byte| !byte).collect();
        std::thread::scope(|scope| {
            let _ends = Ends(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    memory.write_slice(&other, GuestAddress(REQUEST)).unwrap();
                    memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
                }
            });
            for _ in 0..300 {
                assert!(rig.ask(&mut session).is_some(), "{}", rig.name);
            }
        });
        bystander();
        rig.works_after_a_reset();
    });
}

#[test]
fn hostile_07_broken_device_leaves_the_others_alone_and_works_after_every_reset() {
    for_every_device(|rig, bystander| {
        for _ in 0..20 {
            let mut session = rig.start();
            assert!(rig.ask(&mut session).is_some(), "{}", rig.name);
            rig.queue(&mut session).set_avail(1000);
            rig.queue(&mut session).kick();
            session.interrupt.wait_reset();
            // It is stopped, not only marked.
            rig.queue(&mut session).set_avail(1);
            rig.queue(&mut session).offer(0);
            rig.queue(&mut session).kick();
            bystander();
            assert_eq!(rig.queue(&mut session).take_used(), None, "{}", rig.name);
            rig.device.reset();
        }
        rig.works_after_a_reset();
    });
}

/// The rings are no memory any more: the guest's own page reporting took their contents.
#[test]
fn hostile_07_rings_that_are_wiped_stop_the_device_until_a_reset() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        for _ in 0..3 {
            assert!(rig.ask(&mut session).is_some(), "{}", rig.name);
        }
        assert!(crate::kvm::discard(&session.memory, 0x1_0000, 0x4_0000));
        rig.queue(&mut session).kick();
        session.interrupt.wait_reset();
        bystander();
        rig.works_after_a_reset();
    });
}

/// An interrupt that takes for ever, as a request to a hanging disk would.
struct Stuck {
    reached: Mutex<Sender<()>>,
    released: Mutex<Receiver<()>>,
}

impl Interrupt for Stuck {
    fn notify_queue(&self, _index: u16) {
        let _ = self.reached.lock().unwrap().send(());
        // Its end is the release.
        let _ = self.released.lock().unwrap().recv();
    }
    fn notify_config(&self) {}
    fn needs_reset(&self) {}
}

#[test]
fn hostile_08_disk_whose_thread_hangs_starves_no_other_device() {
    let mut builder = DeviceBuilder::new(None, Box::new(|| {})).unwrap();
    let device_loop = builder.event_loop();
    let mut build = |spec: DeviceSpec, file: Option<File>| {
        let fds = file.into_iter().map(OwnedFd::from).collect();
        let device = builder.build(&spec, &mut Descriptors::new(fds)).unwrap();
        Rig { device, ..rig(&spec, EventLoop::spawn().unwrap()) }
    };
    let block = DeviceSpec::Block { file: FdIndex(0), read_only: false, serial: String::new() };
    let image = tempfile::tempfile().unwrap();
    image.set_len(4096).unwrap();
    let mut disk = build(block, Some(image));

    let ((reached, hangs), (release, released)) = (channel(), channel());
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, 0x1_0000, SIZE);
    let mut activation = activation(&memory, 0, &[&queue], &Arc::default());
    activation.interrupt = Arc::new(Stuck { reached: Mutex::new(reached), released: Mutex::new(released) });
    disk.device.activate(activation).unwrap();
    queue.add(&disk.buffers());
    queue.kick();
    hangs.recv().unwrap();
    assert!(queue.take_used().is_some());
    queue.add(&disk.buffers());
    queue.kick();

    // With a frame that is one, so that it reaches the wire.
    let mut net = Rig { request: vec![0; NET_HEADER + 60], ..rig(&NET, device_loop) };
    let mut session = net.start();
    assert!(net.ask(&mut session).is_some());
    let wire = net.host.downcast_ref::<OwnedFd>().unwrap();
    let crossed = rustix::net::recv(wire, &mut [0; 128][..], rustix::net::RecvFlags::empty());
    assert_eq!(crossed.unwrap().1, NET_HEADER + 60);
    net.device.reset();

    let share = tempfile::tempdir().unwrap();
    for mut other in [
        net,
        build(DeviceSpec::Rng, None),
        build(DeviceSpec::Vsock, None),
        build(DeviceSpec::Balloon, None),
        build(DeviceSpec::Console { output: FdIndex(0) }, Some(File::create("/dev/null").unwrap())),
        build(DeviceSpec::Fs { tag: "x".into(), root: FdIndex(0) }, Some(File::open(share.path()).unwrap())),
    ] {
        let mut session = other.start();
        assert!(other.ask(&mut session).is_some(), "{}", other.name);
        other.works_after_a_reset();
    }
    assert_eq!(queue.take_used(), None, "the disk hangs as long as that");
    drop(release);
    // Its reset waits for the request.
    disk.device.reset();
    assert!(queue.take_used().is_some() || hangs.try_recv().is_err());
}

/// Section 5 of the specification has more than a machine can be built of. virtio-pmem (27) is not among these, so a guest
/// has no disk that it could write by way of memory (CVE-2026-24834); nor is there one with a window for DAX.
#[test]
fn hostile_12_there_is_no_pmem_device_and_no_other_kind_than_these() {
    let mut types = Vec::new();
    for_every_device(|rig, _| types.push(rig.device.device_type()));
    types.sort_unstable();
    assert_eq!(types, [1, 2, 3, 4, 5, 19, 24, 26]);
    for name in ["pmem", "gpu", "scsi", "iommu", "vhost"] {
        let spec = serde_json::from_value::<DeviceSpec>(serde_json::json!({ "type": name, "file": 0 }));
        assert!(spec.is_err(), "{name}");
    }
}

/// What a device is built of comes from the shim; an index that is wrong, or a descriptor of the wrong kind, is one error.
#[test]
fn hostile_15_device_whose_descriptor_is_missing_or_of_the_wrong_kind_is_refused_with_a_reason() {
    let refusal = |spec: &DeviceSpec, fds: Vec<OwnedFd>| {
        let mut builder = DeviceBuilder::new(None, Box::new(|| {})).unwrap();
        builder.build(spec, &mut Descriptors::new(fds)).err().map(|error| error.to_string())
    };
    let wrong = FdIndex(usize::MAX);
    let needy = [
        (DeviceSpec::Block { file: wrong, read_only: true, serial: String::new() }, "disk"),
        (DeviceSpec::Console { output: wrong }, "console"),
        (DeviceSpec::Fs { tag: "share".into(), root: wrong }, "share"),
        (DeviceSpec::Net { tap: wrong, mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }, "tap"),
    ];
    for (spec, name) in needy {
        let error = refusal(&spec, vec![File::open("/dev/null").unwrap().into()]).unwrap();
        assert_eq!(error, format!("descriptor {} for the {name} did not come with the spec", usize::MAX));
    }
    let pipe = || vec![std::io::pipe().unwrap().0.into()];
    let index = FdIndex(0);
    for (spec, words) in [
        (DeviceSpec::Block { file: index, read_only: true, serial: String::new() }, "is it an image file"),
        (DeviceSpec::Block { file: index, read_only: true, serial: "x".repeat(21) }, "disk"),
        (DeviceSpec::Fs { tag: "share".into(), root: index }, "no directory"),
        (DeviceSpec::Fs { tag: String::new(), root: index }, "tag"),
        (DeviceSpec::Net { tap: index, mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }, "tap"),
        (DeviceSpec::Net { tap: index, mac: [2, 0, 0, 0, 0, 1], mtu: 67 }, "MTU"),
        (DeviceSpec::Memory { requested_mib: u64::MAX }, "hotplug_mib"),
    ] {
        let error = refusal(&spec, pipe()).unwrap();
        assert!(error.contains(words), "{error}");
    }
}
