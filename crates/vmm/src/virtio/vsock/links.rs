//! Connections with their streams: moves payloads between guest buffers and sockets, and says what is to be sent next.
//!
//! Streams are watched edge-triggered, so that a socket which nobody can serve (no credit, no buffers, both ends shut)
//! costs nothing; `readable` remembers what the edge told. Nothing here grows with what the guest sends: connections are
//! the host's, [`Link::backlog`] is bounded by credit, answers to strays by [`MAX_REPLIES`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events};
use rustix::net::{SendFlags, Shutdown};

use super::connect::{Connect, ConnectError, MAX_CONNECTIONS};
use super::connection::{Connection, Event};
use super::packet::{HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, TYPE_STREAM, op};
use crate::virtio::buffers::Buffers;

/// Answers to packets that belong to no connection, until the guest takes them: a full receive queue's worth.
const MAX_REPLIES: usize = 128;

/// Ports below this are tokens of the worker's own descriptors, see [`super::worker`].
const FIRST_PORT: u32 = 1024;

/// All connections of the device.
pub struct Links {
    cid: u64,
    /// [`ANSWER_TIMEOUT`](super::connect::ANSWER_TIMEOUT), less in tests.
    timeout: Duration,
    table: HashMap<u32, Link>,
    next_port: u32,
    /// Local ports of links that may have something to send, each at most once ([`Link::queued`]).
    ready: VecDeque<u32>,
    replies: VecDeque<Header>,
    /// In order of time, since all last equally long. An entry counts if the link still has that deadline.
    deadlines: VecDeque<(Instant, u32)>,
}

struct Link {
    connection: Connection,
    stream: OwnedFd,
    request: Option<Connect>,
    /// A read may bring something: data, end of stream or an error.
    readable: bool,
    queued: bool,
    /// What the stream did not take yet. At most [`super::connection::BUF_ALLOC`].
    backlog: VecDeque<u8>,
    watches_write: bool,
    write_shut: bool,
    read_shut: bool,
    deadline: Option<Instant>,
}

impl Links {
    pub fn new(cid: u64, timeout: Duration) -> Self {
        Self {
            cid,
            timeout,
            table: HashMap::new(),
            next_port: FIRST_PORT,
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            deadlines: VecDeque::new(),
        }
    }

    /// Begins a connection.
    pub fn connect(&mut self, mut request: Connect, now: Instant, ops: &mut EventOps<'_>) {
        let Some(stream) = request.stream.take() else { return };
        if self.table.len() >= MAX_CONNECTIONS {
            return request.fail(ConnectError::TooMany);
        }
        let port = self.free_port();
        if ops.add(Events::with_data(&stream, port, interest(false))).is_err() {
            return request.fail(ConnectError::Stream);
        }
        let deadline = now + self.timeout;
        self.deadlines.push_back((deadline, port));
        let link = Link {
            connection: Connection::new(self.cid, port, request.port),
            stream,
            request: Some(request),
            readable: false,
            queued: true,
            backlog: VecDeque::new(),
            watches_write: false,
            write_shut: false,
            read_shut: false,
            deadline: Some(deadline),
        };
        self.table.insert(port, link);
        self.ready.push_back(port);
    }

    fn free_port(&mut self) -> u32 {
        // Ends: there are far fewer connections than ports.
        loop {
            let port = self.next_port;
            self.next_port = port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.table.contains_key(&port) {
                return port;
            }
        }
    }

    /// Drops every connection that the guest knows of. Those that wait for a driver go on waiting.
    pub fn stop(&mut self, ops: &mut EventOps<'_>) {
        self.replies.clear();
        let known: Vec<u32> =
            self.table.iter().filter(|(_, link)| !link.connection.is_new()).map(|(port, _)| *port).collect();
        for port in known {
            self.remove(port, ConnectError::Stopped, ops);
        }
    }

    /// When the next deadline is, for the timer.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.front().map(|(at, _)| *at)
    }

    /// Ends what has waited too long.
    pub fn expire(&mut self, now: Instant, ops: &mut EventOps<'_>) {
        while let Some((at, port)) = self.deadlines.front().copied().filter(|(at, _)| *at <= now) {
            self.deadlines.pop_front();
            let Some(link) = self.table.get_mut(&port).filter(|link| link.deadline == Some(at)) else { continue };
            link.connection.abort();
            link.discard_backlog();
            link.fail(ConnectError::TimedOut);
            self.settle(port, now, ops);
        }
    }

    /// Epoll events of a stream.
    pub fn on_stream(&mut self, port: u32, set: EventSet, now: Instant, ops: &mut EventOps<'_>) {
        let Some(link) = self.table.get_mut(&port) else { return };
        let gone = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if gone && link.connection.is_pending() {
            link.connection.abort();
            link.fail(ConnectError::Abandoned);
        } else if gone {
            link.reader_gone();
        }
        link.readable |= gone || set.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        if set.contains(EventSet::OUT) {
            link.flush();
        }
        self.settle(port, now, ops);
    }

    /// Room for the answers that a packet of the guest may need.
    pub fn accepts_packets(&self) -> bool {
        self.replies.len() < MAX_REPLIES
    }

    /// A packet of the guest. Its payload is in `buffers`, behind the header. `true` if it is a REQUEST, which is
    /// refused, and then for which port.
    pub fn on_packet(
        &mut self,
        packet: &Header,
        buffers: &Buffers,
        now: Instant,
        ops: &mut EventOps<'_>,
    ) -> Option<u32> {
        // As Linux' vhost does: what claims to come from or go to somebody else is dropped without an answer.
        if packet.src_cid != self.cid || packet.dst_cid != HOST_CID {
            return None;
        }
        let port = packet.dst_port;
        let link = self.table.get_mut(&port).filter(|link| link.connection.peer_port() == packet.src_port);
        let Some(link) = link.filter(|_| packet.kind == TYPE_STREAM) else {
            if packet.op != op::RST {
                self.replies.push_back(Header::reset_for(packet));
            }
            return (packet.op == op::REQUEST && packet.kind == TYPE_STREAM).then_some(port);
        };
        let len = usize::try_from(packet.len).unwrap_or(usize::MAX);
        if len > MAX_PAYLOAD || len > buffers.size().saturating_sub(HEADER_LEN) {
            link.violation();
        } else {
            link.on_event(packet, buffers, len);
        }
        self.settle(port, now, ops);
        None
    }

    /// There may be a packet for the guest.
    pub fn has_output(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// Writes the next packet into `buffers`, which hold more than a header. The number of bytes, 0 if there is none.
    pub fn next_packet(&mut self, buffers: &Buffers, now: Instant, ops: &mut EventOps<'_>) -> usize {
        if let Some(reply) = self.replies.pop_front() {
            return put(&reply, buffers);
        }
        while let Some(port) = self.ready.pop_front() {
            let Some(link) = self.table.get_mut(&port) else { continue };
            link.queued = false;
            let written = link.next_packet(buffers);
            self.settle(port, now, ops);
            if written > 0 {
                return written;
            }
        }
        0
    }

    /// Brings the outside into line with a connection that may have changed.
    fn settle(&mut self, port: u32, now: Instant, ops: &mut EventOps<'_>) {
        let Some(link) = self.table.get_mut(&port) else { return };
        if link.backlog.is_empty() {
            if link.connection.is_closed() {
                return self.remove(port, ConnectError::Stopped, ops);
            }
            if !link.connection.guest_sends() && !link.write_shut {
                link.write_shut = true;
                let _ = rustix::net::shutdown(&link.stream, Shutdown::Write);
            }
        }
        if !link.connection.guest_receives() && !link.read_shut {
            link.read_shut = true;
            let _ = rustix::net::shutdown(&link.stream, Shutdown::Read);
        }
        if link.watches_write == link.backlog.is_empty() {
            link.watches_write = !link.backlog.is_empty();
            // It can only fail for want of memory; then the stream is lost, and says so at its next use.
            if ops.modify(Events::with_data(&link.stream, port, interest(link.watches_write))).is_err() {
                link.violation();
            }
        }
        if link.connection.awaits_reset() && link.deadline.is_none() {
            link.deadline = Some(now + self.timeout);
            self.deadlines.push_back((now + self.timeout, port));
        }
        if link.readable {
            link.connection.starve();
        }
        if !link.queued && link.has_output() {
            link.queued = true;
            self.ready.push_back(port);
        }
    }

    fn remove(&mut self, port: u32, reason: ConnectError, ops: &mut EventOps<'_>) {
        if let Some(mut link) = self.table.remove(&port) {
            link.fail(reason);
            let _ = ops.remove(Events::empty_raw(link.stream.as_raw_fd()));
        }
    }
}

impl Link {
    fn on_event(&mut self, packet: &Header, buffers: &Buffers, len: usize) {
        match self.connection.receive(packet) {
            Event::None | Event::Shutdown => {}
            Event::Opened => {
                self.deadline = None;
                if let Some(request) = self.request.take() {
                    request.succeed();
                }
            }
            Event::Data => self.on_data(buffers, len),
            Event::Reset => self.fail(ConnectError::Refused(packet.src_port)),
            Event::Violation => self.violation(),
        }
    }

    fn on_data(&mut self, buffers: &Buffers, len: usize) {
        let mut sent = 0;
        if self.backlog.is_empty() {
            sent = match buffers.send(&self.stream, HEADER_LEN, len) {
                Ok(sent) => sent,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => {
                    self.connection.host_receives_no_more();
                    len
                }
            };
            self.forwarded(sent);
        }
        let rest = len.saturating_sub(sent);
        if rest > 0 {
            let mut bytes = vec![0; rest];
            if buffers.read(HEADER_LEN + sent, &mut bytes) {
                self.backlog.extend(bytes);
            }
        }
    }

    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match rustix::net::send(&self.stream, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.backlog.drain(..sent.min(front.len()));
                    self.forwarded(sent);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => return self.reader_gone(),
            }
        }
        // A reader that was slow once must not keep the memory.
        self.backlog = VecDeque::new();
    }

    fn forwarded(&mut self, len: usize) {
        self.connection.data_forwarded(u32::try_from(len).unwrap_or(u32::MAX));
    }

    fn reader_gone(&mut self) {
        self.connection.host_receives_no_more();
        self.discard_backlog();
    }

    fn discard_backlog(&mut self) {
        self.forwarded(self.backlog.len());
        self.backlog = VecDeque::new();
    }

    fn violation(&mut self) {
        self.connection.abort();
        self.fail(ConnectError::Stopped);
    }

    fn fail(&mut self, error: ConnectError) {
        if let Some(request) = self.request.take() {
            request.fail(error);
        }
    }

    fn has_output(&self) -> bool {
        self.connection.has_control() || (self.readable && self.connection.sendable() > 0)
    }

    /// One packet for the guest; 0 if there turns out to be none.
    fn next_packet(&mut self, buffers: &Buffers) -> usize {
        loop {
            if let Some(header) = self.connection.next_control() {
                return put(&header, buffers);
            }
            let room = buffers.size().saturating_sub(HEADER_LEN).min(MAX_PAYLOAD).min(self.connection.sendable());
            if !self.readable || room == 0 {
                return 0;
            }
            match buffers.receive(&self.stream, HEADER_LEN, room) {
                Ok(0) => {
                    self.readable = false;
                    self.connection.host_sends_no_more();
                }
                Ok(len) => return self.data_packet(len, buffers),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(_) => {
                    self.readable = false;
                    self.connection.host_sends_no_more();
                    self.reader_gone();
                }
            }
        }
    }

    fn data_packet(&mut self, len: usize, buffers: &Buffers) -> usize {
        let bytes = u32::try_from(len).unwrap_or(u32::MAX);
        self.connection.data_sent(bytes);
        let header = Header { len: bytes, ..self.connection.header(op::RW) };
        put(&header, buffers) + len
    }
}

fn put(header: &Header, buffers: &Buffers) -> usize {
    if buffers.write(0, &header.encode()) { HEADER_LEN } else { 0 }
}

fn interest(write: bool) -> EventSet {
    let read = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if write { read | EventSet::OUT } else { read }
}
