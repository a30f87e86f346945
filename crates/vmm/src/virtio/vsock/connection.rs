//! One connection as the protocol sees it (section 5.10.6): who may send what, credit, half-close. Pure: it holds no
//! descriptor and does no I/O, the [worker](super::worker) does what it says.

use super::packet::{HOST_CID, Header, TYPE_STREAM, op, shutdown};

/// Our receive buffer for each connection: what a guest can have in flight, and thus the most that the VMM holds for it.
/// Two packets of the largest size, so that one can be on the way while the other is written out; with every connection
/// stuffed by a hostile guest that makes 128 MiB, and nothing while readers keep up.
pub const BUF_ALLOC: u32 = 128 * 1024;

/// What a packet of the guest means for the connection's owner.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// Nothing to do but to look at [`Connection::next_control`] and [`Connection::sendable`] again.
    None,
    /// The guest accepted.
    Opened,
    /// The packet's payload is for the stream.
    Data,
    /// The guest has half-closed; see [`Connection::guest_sends`] and [`Connection::guest_receives`].
    Shutdown,
    /// The guest reset the connection: refused it, if it was not open yet.
    Reset,
    /// The packet breaks the protocol; the connection is to be aborted.
    Violation,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    /// REQUEST is to be sent.
    New,
    /// REQUEST is sent.
    Requested,
    /// RESPONSE is received.
    Open,
    /// RST is to be sent.
    Aborted,
    /// RST is sent or received: nothing more will be.
    Closed,
}

/// A connection from the host to a port of the guest.
#[derive(Debug)]
pub struct Connection {
    guest_cid: u64,
    local_port: u32,
    peer_port: u32,
    phase: Phase,
    /// Bytes sent to the guest, and its view of its buffer. All counts are modulo 2^32.
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// Bytes received from the guest, written out of our buffer, and last told to the guest.
    received: u32,
    forwarded: u32,
    announced: u32,
    /// Shutdown flags: what the guest has said, what the host wants said, what we have said.
    guest_shutdown: u32,
    host_shutdown: u32,
    sent_shutdown: u32,
    credit_update: bool,
    /// Data waits for credit: `Some(true)` when the guest has been asked for it.
    starved: Option<bool>,
}

impl Connection {
    /// A connection that begins with a REQUEST.
    pub fn new(guest_cid: u64, local_port: u32, peer_port: u32) -> Self {
        Self {
            guest_cid,
            local_port,
            peer_port,
            phase: Phase::New,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            received: 0,
            forwarded: 0,
            announced: 0,
            guest_shutdown: 0,
            host_shutdown: 0,
            sent_shutdown: 0,
            credit_update: false,
            starved: None,
        }
    }

    /// The guest's port.
    pub fn peer_port(&self) -> u32 {
        self.peer_port
    }

    /// The REQUEST has not been sent yet.
    pub fn is_new(&self) -> bool {
        self.phase == Phase::New
    }

    /// The guest has not answered yet.
    pub fn is_pending(&self) -> bool {
        matches!(self.phase, Phase::New | Phase::Requested)
    }

    /// Established, and not reset by either side.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Neither side will send anything.
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// `false` once the guest has said that it sends no more.
    pub fn guest_sends(&self) -> bool {
        self.guest_shutdown & shutdown::SEND == 0 && self.phase != Phase::Closed
    }

    /// `false` once the guest has said that it receives no more.
    pub fn guest_receives(&self) -> bool {
        self.guest_shutdown & shutdown::RECEIVE == 0 && self.phase != Phase::Closed
    }

    /// Both sides have been told that nothing will flow to the guest and nothing is wanted from it: only its RST is
    /// missing.
    pub fn awaits_reset(&self) -> bool {
        self.is_open() && self.sent_shutdown == shutdown::BOTH
    }

    /// A packet for this connection arrived.
    pub fn receive(&mut self, packet: &Header) -> Event {
        if packet.op == op::RST {
            self.phase = Phase::Closed;
            return Event::Reset;
        }
        match (self.phase, packet.op) {
            (Phase::Requested, op::RESPONSE) => {
                self.take_credit(packet);
                self.phase = Phase::Open;
                Event::Opened
            }
            (Phase::Open, op::RW) => self.receive_data(packet),
            (Phase::Open, op::SHUTDOWN) => self.receive_shutdown(packet),
            (Phase::Open, op::CREDIT_UPDATE) => {
                self.take_credit(packet);
                Event::None
            }
            (Phase::Open, op::CREDIT_REQUEST) => {
                self.take_credit(packet);
                self.credit_update = true;
                Event::None
            }
            // Sent before the guest saw our RST.
            (Phase::Aborted | Phase::Closed, _) => Event::None,
            _ => Event::Violation,
        }
    }

    fn receive_data(&mut self, packet: &Header) -> Event {
        self.take_credit(packet);
        let in_buffer = self.received.wrapping_sub(self.forwarded);
        let room = BUF_ALLOC.saturating_sub(in_buffer);
        if packet.len > room || !self.guest_sends() {
            return Event::Violation;
        }
        self.received = self.received.wrapping_add(packet.len);
        Event::Data
    }

    fn receive_shutdown(&mut self, packet: &Header) -> Event {
        self.take_credit(packet);
        // Section 5.10.6.6: hints are permanent.
        self.guest_shutdown |= packet.flags & shutdown::BOTH;
        if self.guest_shutdown == shutdown::BOTH {
            // The guest has closed and waits for the RST. What it sent before stays ours to deliver.
            self.phase = Phase::Aborted;
        }
        Event::Shutdown
    }

    fn take_credit(&mut self, packet: &Header) {
        self.peer_buf_alloc = packet.buf_alloc;
        self.peer_fwd_cnt = packet.fwd_cnt;
        if self.credit() > 0 {
            self.starved = None;
        }
    }

    /// Room in the guest's buffer. A guest that shrinks it, or claims to have taken more than it got, gets nothing.
    fn credit(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd_cnt))
    }

    /// Bytes that may be sent to the guest now.
    pub fn sendable(&self) -> usize {
        let open = self.is_open() && self.guest_receives() && self.host_shutdown & shutdown::SEND == 0;
        if open { usize::try_from(self.credit()).unwrap_or(usize::MAX) } else { 0 }
    }

    /// There is data for the guest, but no credit.
    pub fn starve(&mut self) {
        if self.is_open() && self.guest_receives() && self.credit() == 0 {
            self.starved.get_or_insert(false);
        }
    }

    /// Bytes of an RW packet were sent.
    pub fn data_sent(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Bytes left our buffer for the stream, or were dropped because nobody reads it any more.
    pub fn data_forwarded(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
        // As the guest sees it: it may send that much before it must wait. Below one largest packet it is told.
        let seen = BUF_ALLOC.saturating_sub(self.received.wrapping_sub(self.announced));
        self.credit_update |= self.forwarded != self.announced && seen < BUF_ALLOC / 2;
    }

    /// The stream has ended: nothing more will be sent to the guest.
    pub fn host_sends_no_more(&mut self) {
        self.host_shutdown |= shutdown::SEND;
    }

    /// Nobody reads the stream any more.
    pub fn host_receives_no_more(&mut self) {
        self.host_shutdown |= shutdown::RECEIVE;
    }

    /// Ends the connection with a RST.
    pub fn abort(&mut self) {
        // A REQUEST that was never sent needs no RST.
        self.phase = if matches!(self.phase, Phase::New | Phase::Closed) { Phase::Closed } else { Phase::Aborted };
    }

    /// A packet without payload is to be sent.
    pub fn has_control(&self) -> bool {
        match self.phase {
            Phase::New | Phase::Aborted => true,
            Phase::Requested | Phase::Closed => false,
            Phase::Open => {
                self.credit_update || self.host_shutdown != self.sent_shutdown || self.starved == Some(false)
            }
        }
    }

    /// The next packet without payload, if there is one, as sent.
    pub fn next_control(&mut self) -> Option<Header> {
        match self.phase {
            Phase::New => {
                self.phase = Phase::Requested;
                Some(self.header(op::REQUEST))
            }
            Phase::Aborted => {
                self.phase = Phase::Closed;
                Some(self.header(op::RST))
            }
            Phase::Requested | Phase::Closed => None,
            Phase::Open if self.credit_update => Some(self.header(op::CREDIT_UPDATE)),
            Phase::Open if self.host_shutdown != self.sent_shutdown => {
                self.sent_shutdown = self.host_shutdown;
                Some(Header { flags: self.sent_shutdown, ..self.header(op::SHUTDOWN) })
            }
            Phase::Open if self.starved == Some(false) => {
                self.starved = Some(true);
                Some(self.header(op::CREDIT_REQUEST))
            }
            Phase::Open => None,
        }
    }

    /// The header of a packet to the guest. Every header carries our credit.
    pub fn header(&mut self, op: u16) -> Header {
        self.announced = self.forwarded;
        self.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.local_port,
            dst_port: self.peer_port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded,
        }
    }
}
