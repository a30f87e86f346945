//! The device's worker in the device loop.
//!
//! The tap is watched edge-triggered: while the guest gives no buffers, frames wait in the tap's own queue and cost
//! nothing, and the driver's next kick resumes (the freeze of CVE-2020-16843 came of waiting for the wrong one of the
//! two). Work for one event is bounded by [`BUDGET`] frames each way; what is left makes the queue's own kick readable.
//!
//! Each event is an occasion to look at both queues, first the one to the tap: what the guest sends to the node or to another
//! pod is often answered before the write returns. So the driver gets the answer with what was sent, by one interrupt.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::header::{HEADER_LEN, Offloads};
use super::reception::Reception;
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
    reception: Reception,
    tx: Ring,
    interrupt: Arc<dyn Interrupt>,
    offloads: Offloads,
    /// A write may succeed.
    writable: bool,
}

impl Worker {
    pub fn new(tap: Arc<Tap>, mtu: u16, mut activation: Activation) -> Result<Self, ActivateError> {
        let rx = Ring::take(&mut activation, RX_QUEUE)?;
        let Activation { features, ref memory, .. } = activation;
        Ok(Self {
            reception: Reception::new(Arc::clone(&tap), Arc::clone(memory), rx, mtu, features),
            tx: Ring::take(&mut activation, TX_QUEUE)?,
            tap,
            memory: activation.memory,
            interrupt: activation.interrupt,
            offloads: Offloads::new(features),
            writable: true,
        })
    }

    fn serve(&mut self, ops: &mut EventOps<'_>) -> Result<(), RingError> {
        self.reception.readable |= self.transmit(ops)?;
        self.reception.receive(BUDGET)?;
        self.reception.ring.notify_both(&mut self.tx)
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
        let _ = ops.remove(Events::empty(self.reception.ring.kick()));
        let _ = ops.remove(Events::empty(self.tx.kick()));
    }

    fn watch(&self, ops: &mut EventOps<'_>) -> Result<(), event_manager::Error> {
        ops.add(Events::with_data(&*self.tap, TAP, interest()))?;
        ops.add(Events::with_data(self.reception.ring.kick(), RX, EventSet::IN))?;
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
                self.reception.readable |=
                    events.event_set().intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
            }
            RX => self.reception.ring.clear_kick(),
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
