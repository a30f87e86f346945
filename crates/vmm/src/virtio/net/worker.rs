//! The device's worker in the device loop.
//!
//! The tap is watched edge-triggered: while the guest gives no buffers, frames wait in the tap's own queue and cost
//! nothing, and the driver's next kick resumes (the freeze of CVE-2020-16843 came of waiting for the wrong one of the
//! two). Work for one event is bounded by [`BUDGET`] frames each way; what is left makes the queue's own kick readable.
//!
//! Each event is an occasion to look at both queues, first the one to the tap: what the guest sends to the node or to another
//! pod is often answered before the write returns. So the driver gets the answer with what was sent, by one interrupt.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF};

use super::header::{ETHERNET_LEN, HEADER_LEN, MAX_FRAME, NUM_BUFFERS, Offloads};
use super::tap::Tap;
use crate::guest_log;
use crate::memory::Memory;
use crate::virtio::buffers::Buffers;
use crate::virtio::ring::{Ring, RingError, Step};
use crate::virtio::{ActivateError, Activation, Interrupt};

/// Frames for one event: 4 MiB of the largest, some milliseconds of copying.
const BUDGET: usize = 64;

const TAP: u32 = 0;
const RX: u32 = 1;
const TX: u32 = 2;

const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;

/// The worker.
pub struct Worker {
    tap: Arc<Tap>,
    memory: Memory,
    rx: Ring,
    tx: Ring,
    interrupt: Arc<dyn Interrupt>,
    offloads: Offloads,
    /// A frame may take several chains.
    mergeable: bool,
    /// Room that the largest frame takes, with its header.
    needed: usize,
    /// Chains that wait for a frame.
    supply: VecDeque<(u16, Buffers)>,
    /// A read may bring a frame.
    readable: bool,
    /// A write may succeed.
    writable: bool,
}

impl Worker {
    pub fn new(tap: Arc<Tap>, mtu: u16, mut activation: Activation) -> Result<Self, ActivateError> {
        let has = |bit: u32| activation.features & (1 << bit) != 0;
        let segmented = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        let frame = if segmented { MAX_FRAME } else { usize::from(mtu) + ETHERNET_LEN };
        let (mergeable, offloads) = (has(VIRTIO_NET_F_MRG_RXBUF), Offloads::new(activation.features));
        Ok(Self {
            tap,
            rx: Ring::take(&mut activation, RX_QUEUE)?,
            tx: Ring::take(&mut activation, TX_QUEUE)?,
            memory: activation.memory,
            interrupt: activation.interrupt,
            offloads,
            mergeable,
            needed: HEADER_LEN + frame,
            supply: VecDeque::new(),
            readable: true,
            writable: true,
        })
    }

    fn serve(&mut self, ops: &mut EventOps<'_>) -> Result<(), RingError> {
        self.readable |= self.transmit(ops)?;
        self.receive()?;
        self.rx.notify_both(&mut self.tx)
    }

    /// Tap to guest. The driver is not told.
    fn receive(&mut self) -> Result<(), RingError> {
        for _ in 0..BUDGET {
            if !self.readable || !self.stock_up()? {
                return Ok(());
            }
            let chains = if self.mergeable { self.supply.len() } else { 1 };
            match Buffers::read_from(&*self.tap, self.supply.iter().take(chains).map(|(_, buffers)| buffers)) {
                Ok(len) => self.deliver(len, chains)?,
                // Nothing there; or the interface is down or gone, and the edge tells when that changes.
                Err(_) => self.readable = false,
            }
        }
        self.rx.kick_self();
        Ok(())
    }

    /// Takes chains until they hold the largest frame. `false` if there are too few; then the driver will kick.
    fn stock_up(&mut self) -> Result<bool, RingError> {
        let mut room: usize = self.supply.iter().map(|(_, buffers)| buffers.size()).sum();
        self.rx.suppress_kicks()?;
        let size = usize::from(self.rx.size());
        // Bounded: a driver can make useless chains available as fast as they are returned.
        for _ in 0..2 * size {
            // A driver whose whole ring holds less than the largest frame must do with that.
            if room >= self.needed || self.supply.len() >= size {
                return Ok(true);
            }
            let Some(chain) = self.rx.pop()? else {
                if self.rx.expect_kicks()? {
                    self.rx.suppress_kicks()?;
                    continue;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            let least = if self.mergeable { HEADER_LEN } else { self.needed };
            match Buffers::writable(&self.memory, chain) {
                Ok(buffers) if buffers.size() >= least => {
                    room += buffers.size();
                    self.supply.push_back((head, buffers));
                }
                _ => self.rx.push(head, 0)?,
            }
        }
        self.rx.kick_self();
        Ok(false)
    }

    /// Gives the driver the frame of `len` bytes, with its header, that is in the first chains.
    fn deliver(&mut self, len: usize, chains: usize) -> Result<(), RingError> {
        let room: usize = self.supply.iter().take(chains).map(|(_, buffers)| buffers.size()).sum();
        // Cut off, it is useless, and the chains are free for the next. The kernel does not say so.
        if len < HEADER_LEN || (len >= room && room < self.needed) {
            return Ok(());
        }
        let mut left = len;
        let used = self.supply.iter().take_while(|(_, buffers)| {
            let needed = left > 0;
            left = left.saturating_sub(buffers.size());
            needed
        });
        let used = used.count();
        if let Some((_, first)) = self.supply.front() {
            let count = u16::try_from(used).unwrap_or(u16::MAX);
            // It has room: every chain holds a header.
            let _ = first.write(NUM_BUFFERS, &count.to_le_bytes());
        }
        let mut left = len;
        for (head, buffers) in self.supply.drain(..used) {
            let part = left.min(buffers.size());
            left -= part;
            self.rx.stage(head, part)?;
        }
        // All at once: the driver takes a frame of which a chain is missing for an error.
        self.rx.publish()
    }

    /// Guest to tap. Whether there was a frame.
    fn transmit(&mut self, ops: &mut EventOps<'_>) -> Result<bool, RingError> {
        let (tap, offloads, memory, writable) = (&*self.tap, self.offloads, &self.memory, &mut self.writable);
        let mut sent = false;
        self.tx.drain_quietly(BUDGET, |tx| {
            if !*writable {
                return Ok(Step::Stop);
            }
            let Some(chain) = tx.pop()? else { return Ok(Step::Empty) };
            let head = chain.head_index();
            if let Ok(buffers) = Buffers::readable(memory, chain)
                && send(tap, offloads, &buffers) == Sent::Blocked
            {
                tx.unpop();
                *writable = false;
                // The tap says that it can be written to only to those who asked after it could not.
                return match ops.modify(Events::with_data(tap, TAP, interest())) {
                    Ok(()) => Ok(Step::Stop),
                    Err(_) => Err(RingError::Watch),
                };
            }
            tx.push(head, 0)?;
            sent = true;
            Ok(Step::Done)
        })?;
        Ok(sent)
    }

    fn fail(&mut self, ops: &mut EventOps<'_>) {
        self.interrupt.needs_reset();
        // What was not added cannot be removed.
        let _ = ops.remove(Events::empty(&*self.tap));
        let _ = ops.remove(Events::empty(self.rx.kick()));
        let _ = ops.remove(Events::empty(self.tx.kick()));
    }

    fn watch(&self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(&*self.tap, TAP, interest()))?;
        ops.add(Events::with_data(self.rx.kick(), RX, EventSet::IN))?;
        ops.add(Events::with_data(self.tx.kick(), TX, EventSet::IN))
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if self.watch(ops).is_err() {
            self.fail(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            TAP => {
                self.writable |= events.event_set().contains(EventSet::OUT);
                self.readable |= events.event_set().intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
            }
            RX => self.rx.clear_kick(),
            _ => self.tx.clear_kick(),
        }
        if let Err(error) = self.serve(ops) {
            guest_log!("net: {error}");
            self.fail(ops);
        }
    }
}

#[derive(Eq, PartialEq)]
enum Sent {
    /// To the tap, or dropped.
    Done,
    /// The tap's buffer is full.
    Blocked,
}

fn send(tap: &Tap, offloads: Offloads, buffers: &Buffers) -> Sent {
    let mut header = [0; HEADER_LEN];
    if !buffers.read(0, &mut header) {
        return Sent::Done;
    }
    let Some(header) = offloads.check(header, buffers.size() - HEADER_LEN) else { return Sent::Done };
    match buffers.write_to(tap, &header, HEADER_LEN) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Sent::Blocked,
        // What the tap refuses (no interface, a header that it does not like) is lost, as on a wire.
        _ => Sent::Done,
    }
}

fn interest() -> EventSet {
    EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED
}
