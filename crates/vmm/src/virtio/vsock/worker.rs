//! The device's worker in the device loop: queues, commands and the timer.
//!
//! It lives as long as the device, not from activation to reset, because connections may be asked for before the driver
//! starts. Work for one event is bounded by [`BUDGET`] packets; what is left makes the queue's own kick readable.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Instant;

use bulkhead_protocol::guest::READY_PORT;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::connect::Connect;
use super::links::Links;
use super::packet::{HEADER_LEN, Header};
use crate::guest_log;
use crate::memory::Memory;
use crate::virtio::buffers::Buffers;
use crate::virtio::ring::{Ring, RingError, Step};
use crate::virtio::{ActivateError, Activation, ActiveQueue, Interrupt};

/// Packets for one event: 4 MiB of the largest, some milliseconds of copying.
const BUDGET: usize = 64;

/// Tokens of the worker's descriptors; a stream's token is its local port, which is larger.
const BELL: u32 = 0;
const TIMER: u32 = 1;
const RX: u32 = 2;
const TX: u32 = 3;

const RX_QUEUE: u16 = 0;
const TX_QUEUE: u16 = 1;
const EVENT_QUEUE: usize = 2;

/// What others ask of the worker.
pub enum Command {
    /// See [`super::VsockHandle::connect`].
    Connect(Connect),
    /// The driver is ready.
    Start(Box<Queues>),
    /// The driver resets the device; answered when the queues are let go.
    Stop(SyncSender<()>),
}

/// What the worker has while the driver runs.
pub struct Queues {
    memory: Memory,
    rx: Ring,
    tx: Ring,
    /// Transport events are for machines that move while connections are open. Kept, never used.
    _event: Option<ActiveQueue>,
    interrupt: Arc<dyn Interrupt>,
    /// Packets wait in `tx` until answers to earlier ones have been taken.
    tx_blocked: bool,
    ready_seen: bool,
}

impl Queues {
    pub fn new(mut activation: Activation) -> Result<Self, ActivateError> {
        Ok(Self {
            rx: Ring::take(&mut activation, RX_QUEUE)?,
            tx: Ring::take(&mut activation, TX_QUEUE)?,
            _event: activation.queues.get_mut(EVENT_QUEUE).and_then(Option::take),
            memory: activation.memory,
            interrupt: activation.interrupt,
            tx_blocked: false,
            ready_seen: false,
        })
    }

    /// Takes packets from the guest.
    fn receive(
        &mut self,
        links: &mut Links,
        on_ready: &mut (dyn FnMut() + Send),
        ops: &mut EventOps<'_>,
    ) -> Result<(), RingError> {
        let now = Instant::now();
        self.tx_blocked = false;
        self.tx.drain(BUDGET, |tx| {
            if !links.accepts_packets() {
                self.tx_blocked = true;
                return Ok(Step::Stop);
            }
            let Some(chain) = tx.pop()? else { return Ok(Step::Empty) };
            let head = chain.head_index();
            let mut header = [0; HEADER_LEN];
            // A chain that is no packet is dropped like one that nobody knows the sender of.
            if let Ok(buffers) = Buffers::readable(&self.memory, chain)
                && buffers.read(0, &mut header)
            {
                let refused = links.on_packet(&Header::decode(&header), &buffers, now, ops);
                if refused == Some(READY_PORT) && !self.ready_seen {
                    self.ready_seen = true;
                    on_ready();
                }
            }
            tx.push(head, 0)?;
            Ok(Step::Done)
        })
    }

    /// Gives packets to the guest.
    fn send(&mut self, links: &mut Links, ops: &mut EventOps<'_>) -> Result<(), RingError> {
        let now = Instant::now();
        if !links.has_output() {
            return Ok(());
        }
        self.rx.drain(BUDGET, |rx| {
            if !links.has_output() {
                return Ok(Step::Stop);
            }
            let Some(chain) = rx.pop()? else { return Ok(Step::Empty) };
            let head = chain.head_index();
            let Some(buffers) =
                Buffers::writable(&self.memory, chain).ok().filter(|buffers| buffers.size() > HEADER_LEN)
            else {
                rx.push(head, 0)?;
                return Ok(Step::Done);
            };
            match links.next_packet(&buffers, now, ops) {
                0 => {
                    rx.unpop();
                    Ok(Step::Stop)
                }
                len => {
                    rx.push(head, len)?;
                    Ok(Step::Done)
                }
            }
        })
    }
}

/// The worker.
pub struct Worker {
    inbox: Receiver<Command>,
    bell: Arc<EventFd>,
    timer: TimerFd,
    /// When the timer fires, if it is armed.
    armed: Option<Instant>,
    links: Links,
    queues: Option<Box<Queues>>,
    on_ready: Box<dyn FnMut() + Send>,
}

impl Worker {
    pub fn new(
        links: Links,
        inbox: Receiver<Command>,
        bell: Arc<EventFd>,
        on_ready: Box<dyn FnMut() + Send>,
    ) -> io::Result<Self> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        Ok(Self { inbox, bell, timer, armed: None, links, queues: None, on_ready })
    }

    fn on_command(&mut self, command: Command, ops: &mut EventOps<'_>) {
        match command {
            Command::Connect(request) => self.links.connect(request, Instant::now(), ops),
            Command::Start(queues) => {
                let watched = ops
                    .add(Events::with_data(queues.rx.kick(), RX, EventSet::IN))
                    .and_then(|()| ops.add(Events::with_data(queues.tx.kick(), TX, EventSet::IN)));
                self.queues = Some(queues);
                match watched {
                    Ok(()) => self.run(true, ops),
                    Err(_) => self.fail(ops),
                }
            }
            Command::Stop(stopped) => {
                self.stop(ops);
                let _ = stopped.send(());
            }
        }
    }

    /// Moves packets both ways until there is nothing left or the budget is spent.
    fn run(&mut self, receive: bool, ops: &mut EventOps<'_>) {
        let Some(queues) = &mut self.queues else { return };
        let (links, on_ready) = (&mut self.links, &mut *self.on_ready);
        let mut result = Ok(());
        if receive {
            result = queues.receive(links, on_ready, ops);
        }
        result = result.and_then(|()| queues.send(links, ops));
        if result.is_ok() && queues.tx_blocked && links.accepts_packets() {
            queues.tx.kick_self();
        }
        if let Err(error) = result {
            guest_log!("vsock: {error}");
            self.fail(ops);
        }
    }

    fn fail(&mut self, ops: &mut EventOps<'_>) {
        if let Some(queues) = &self.queues {
            queues.interrupt.needs_reset();
        }
        self.stop(ops);
    }

    fn stop(&mut self, ops: &mut EventOps<'_>) {
        if let Some(queues) = self.queues.take() {
            for kick in [queues.rx.kick(), queues.tx.kick()] {
                // One that was never added cannot be removed.
                let _ = ops.remove(Events::empty(kick));
            }
            self.links.stop(ops);
        }
    }

    /// Arms the timer for the next deadline, unless it will fire before that anyway.
    fn set_timer(&mut self, now: Instant) {
        let Some(at) = self.links.next_deadline() else { return };
        if self.armed.is_none() {
            // Zero would disarm it.
            let wait = at.saturating_duration_since(now).max(std::time::Duration::from_millis(1));
            self.armed = self.timer.reset(wait, None).is_ok().then_some(at);
        }
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        // Two descriptors in a fresh epoll set: it fails for want of kernel memory only, and then nothing works.
        let _ = ops.add(Events::with_data(&*self.bell, BELL, EventSet::IN));
        let _ = ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match events.data() {
            BELL => {
                let _ = self.bell.read();
                while let Ok(command) = self.inbox.try_recv() {
                    self.on_command(command, ops);
                }
                self.run(false, ops);
            }
            TIMER => {
                let _ = self.timer.wait();
                self.armed = None;
                self.links.expire(Instant::now(), ops);
                self.run(false, ops);
            }
            RX => {
                self.queues.iter().for_each(|queues| queues.rx.clear_kick());
                self.run(false, ops);
            }
            TX => {
                self.queues.iter().for_each(|queues| queues.tx.clear_kick());
                self.run(true, ops);
            }
            port => {
                self.links.on_stream(port, events.event_set(), Instant::now(), ops);
                self.run(false, ops);
            }
        }
        self.set_timer(Instant::now());
    }
}
