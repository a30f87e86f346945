//! Every kind of device before a driver that breaks the rules which all devices share: what happens to one that is not
//! written for it must not depend on which one it is. A source of entropy in the same device loop is the bystander that
//! has to go on working.

mod chains;
mod kinds;
mod races;
mod rings;

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, IdMaps};
use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::balloon::Balloon;
use super::block::{Block, DiskThreads};
use super::console::Console;
use super::fs::Fs;
use super::mem::Mem;
use super::net::tests::Wired;
use super::pmem::Pmem;
use super::rng::Rng;
use super::testing::{DriverQueue, TestInterrupt, activation, memory, wait_stopped};
use super::vsock::Vsock;
use crate::event_loop::EventLoop;
use crate::layout::MEMORY_BLOCK;
use crate::memory::{Backing, ImageRegion, Memory};

/// Small enough for every device; a power of two.
const SIZE: u16 = 8;
/// Where requests are, apart from where broken chains lead.
const REQUEST: u64 = 0x40_0000;
const REPLY: u64 = 0x50_0000;

const NET: DeviceSpec = DeviceSpec::Net { tap: FdIndex(0), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };

/// One of each. What the machine can be built of is this and nothing else: [`rig`] would not compile without an arm for it.
fn every_spec() -> Vec<DeviceSpec> {
    vec![
        DeviceSpec::Balloon,
        DeviceSpec::Block { file: FdIndex(0), read_only: false, serial: "disk".into() },
        DeviceSpec::Console { output: FdIndex(0) },
        DeviceSpec::Fs { tag: "share".into(), root: FdIndex(0), ids: IdMaps::default(), private_roots: true },
        DeviceSpec::Memory { requested_mib: 0 },
        NET,
        DeviceSpec::Pmem { images: vec![] },
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

impl ImageRegion for NoBacking {
    fn start(&self) -> u64 {
        8 << 30
    }
    fn size(&self) -> u64 {
        2 << 20
    }
}

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
            let threads = DiskThreads::start(1).unwrap();
            let device = Block::new(file.into(), *read_only, serial, &threads).unwrap();
            rig("block", Box::new(device), 0, vec![0; 16], 513, Box::new(()))
        }
        DeviceSpec::Console { .. } => {
            let (reader, writer) = std::io::pipe().unwrap();
            let device = Console::new(writer.into(), event_loop).unwrap();
            rig("console", Box::new(device), 1, b"hello".to_vec(), 0, Box::new(reader))
        }
        DeviceSpec::Fs { tag, .. } => {
            let share = tempfile::tempdir().unwrap();
            let device = Fs::new(tag, File::open(share.path()).unwrap().into(), &IdMaps::default(), true).unwrap();
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
        DeviceSpec::Pmem { .. } => {
            let device = Pmem::new(Box::new(NoBacking), event_loop, EventLoop::spawn().unwrap());
            rig("pmem", Box::new(device), 0, vec![0; 4], 4, Box::new(()))
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
        wait_stopped(self.device.as_ref());
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

    /// Fills the ring with one chain, the request, offered again and again. Answers its head.
    fn fill(&self, session: &mut Session) -> u16 {
        let buffers = self.buffers();
        let queue = self.queue(session);
        let head = queue.add(&buffers);
        (1..SIZE).for_each(|_| queue.offer(head));
        head
    }

    /// Sends the request and waits for its answer; `None` if the device asks for a reset instead.
    fn ask(&self, session: &mut Session) -> Option<()> {
        let head = self.queue(session).add(&self.buffers());
        self.queue(session).kick();
        while session.queues[usize::from(self.queue)].wait_used_or_reset(&session.interrupt)?.0 != head {}
        Some(())
    }

    /// The device looks at its queue and asks for a reset; the bystander goes on, and so does the device after a reset.
    fn breaks(&mut self, session: &mut Session, bystander: &mut dyn FnMut()) {
        self.queue(session).kick();
        session.interrupt.wait_reset();
        bystander();
        self.works_after_a_reset();
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
