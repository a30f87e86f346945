mod hostile;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use bulkhead_protocol::guest::READY_PORT;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::{Bytes, GuestAddress};

use super::connection::{BUF_ALLOC, Connection, Event};
use super::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op, shutdown};
use super::{ConnectError, Vsock, VsockHandle};
use crate::event_loop::EventLoop;
use crate::memory::Memory;
use crate::virtio::VirtioDevice;
use crate::virtio::testing::{DriverQueue, TestInterrupt, activation, memory};

const CID: u64 = 3;
const PORT: u32 = 1024;
const GUEST_BUFFER: u32 = 8 * 1024;

fn packet(op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: PORT,
        dst_port: 5000,
        kind: TYPE_STREAM,
        op,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

fn open() -> Connection {
    let mut connection = Connection::new(CID, 5000, PORT);
    assert_eq!(connection.next_control().unwrap().op, op::REQUEST);
    assert_eq!(connection.receive(&packet(op::RESPONSE)), Event::Opened);
    connection
}

#[test]
fn header_encoded_decodes_to_itself() {
    let header = Header { len: 7, flags: 3, fwd_cnt: u32::MAX, ..packet(op::RW) };
    assert_eq!(Header::decode(&header.encode()), header);
}

#[test]
fn hostile_10_credit_wraps_around_with_the_counters() {
    let mut connection = open();
    let mut fwd_cnt = 0_u32;
    // Twice around 2^32 in steps that do not divide it.
    for _ in 0..(2 * (u32::MAX / 8000)) {
        connection.data_sent(8000);
        fwd_cnt = fwd_cnt.wrapping_add(8000);
        assert_eq!(connection.sendable(), 192);
        connection.receive(&Header { fwd_cnt, ..packet(op::CREDIT_UPDATE) });
        assert_eq!(connection.sendable(), 8192);
    }
}

#[test]
fn hostile_10_credit_shrunk_below_what_is_in_flight_stops_data() {
    let mut connection = open();
    connection.data_sent(5000);
    connection.receive(&Header { buf_alloc: 100, ..packet(op::CREDIT_UPDATE) });
    assert_eq!(connection.sendable(), 0);
    connection.receive(&Header { buf_alloc: u32::MAX, fwd_cnt: 6000, ..packet(op::CREDIT_UPDATE) });
    // More taken than sent is nonsense; it must not become a window.
    assert!(connection.sendable() < 1000);
}

#[test]
fn credit_missing_is_asked_for_once() {
    let mut connection = open();
    connection.data_sent(GUEST_BUFFER);
    connection.starve();
    assert_eq!(connection.next_control().unwrap().op, op::CREDIT_REQUEST);
    connection.starve();
    assert_eq!(connection.next_control(), None);
    connection.receive(&Header { fwd_cnt: 1, ..packet(op::CREDIT_UPDATE) });
    assert_eq!(connection.sendable(), 1);
}

#[test]
fn hostile_10_data_beyond_our_buffer_is_a_violation() {
    let mut connection = open();
    assert_eq!(connection.receive(&Header { len: BUF_ALLOC, ..packet(op::RW) }), Event::Data);
    assert_eq!(connection.receive(&Header { len: 1, ..packet(op::RW) }), Event::Violation);
}

#[test]
fn forwarded_data_is_announced_before_the_guest_must_stop() {
    let mut connection = open();
    connection.receive(&Header { len: BUF_ALLOC / 4, ..packet(op::RW) });
    connection.data_forwarded(BUF_ALLOC / 4);
    assert!(!connection.has_control());
    connection.receive(&Header { len: BUF_ALLOC / 2, ..packet(op::RW) });
    connection.data_forwarded(BUF_ALLOC / 2);
    let update = connection.next_control().unwrap();
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, BUF_ALLOC / 4 * 3));
    assert!(!connection.has_control());
}

#[test]
fn shutdown_flags_add_up_and_end_in_reset() {
    let mut connection = open();
    connection.receive(&Header { flags: shutdown::SEND, ..packet(op::SHUTDOWN) });
    assert!(!connection.guest_sends() && connection.guest_receives());
    assert_eq!(connection.receive(&Header { len: 1, ..packet(op::RW) }), Event::Violation);
    connection.receive(&Header { flags: shutdown::RECEIVE, ..packet(op::SHUTDOWN) });
    assert_eq!(connection.next_control().unwrap().op, op::RST);
    assert!(connection.is_closed());
}

#[test]
fn hostile_10_packets_out_of_place_are_violations() {
    for op in [0, op::REQUEST, op::RESPONSE, 8, u16::MAX] {
        assert_eq!(open().receive(&packet(op)), Event::Violation, "op {op}");
    }
    let mut fresh = Connection::new(CID, 5000, PORT);
    assert_eq!(fresh.receive(&packet(op::RESPONSE)), Event::Violation);
}

/// A device with a driver.
struct Guest {
    memory: Memory,
    interrupt: Arc<TestInterrupt>,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    device: Vsock,
    event_loop: EventLoop,
    handle: VsockHandle,
    ready: Receiver<()>,
    tx_slot: u64,
}

const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x80_0000;
const SLOT: u64 = 0x1_1000;

impl Guest {
    fn new() -> Self {
        Self::with_timeout(super::connect::ANSWER_TIMEOUT)
    }

    fn with_timeout(timeout: Duration) -> Self {
        let memory = memory();
        let (send_ready, ready) = channel();
        let event_loop = EventLoop::spawn().unwrap();
        let on_ready = Box::new(move || send_ready.send(()).unwrap());
        let (device, handle) = Vsock::with_timeout(CID, event_loop.clone(), on_ready, timeout).unwrap();
        Self {
            rx: DriverQueue::new(&memory, 0x1_0000, 64),
            tx: DriverQueue::new(&memory, 0x2_0000, 64),
            event: DriverQueue::new(&memory, 0x3_0000, 16),
            interrupt: Arc::default(),
            memory,
            device,
            event_loop,
            handle,
            ready,
            tx_slot: 0,
        }
    }

    fn started() -> Self {
        let mut guest = Self::new();
        guest.start();
        guest
    }

    fn start(&mut self) {
        let activation = activation(&self.memory, 0, &[&self.rx, &self.tx, &self.event], &self.interrupt);
        self.device.activate(activation).unwrap();
    }

    /// Returns when the device has seen every kick: its loop has been through twice, for a worker to come and to go.
    fn settle(&self) {
        struct Idle;
        impl MutEventSubscriber for Idle {
            fn init(&mut self, _: &mut EventOps) {}
            fn process(&mut self, _: Events, _: &mut EventOps) {}
        }
        drop(self.event_loop.add(Box::new(Idle)).unwrap());
    }

    /// Gives the device a buffer of 4 KiB for a packet.
    fn give_buffer(&mut self) {
        let address = RX_BUFFERS + u64::from(self.rx_next()) * 0x1000;
        self.rx.add(&[(address, 0x1000, true)]);
        self.rx.kick();
    }

    fn rx_next(&self) -> u16 {
        // One descriptor for a chain, so the next descriptor names the buffer.
        self.rx.next_descriptor()
    }

    /// Receives one packet.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.give_buffer();
        let (head, len) = self.rx.wait_used(&self.interrupt);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(RX_BUFFERS + u64::from(head) * 0x1000)).unwrap();
        let payload = bytes.split_off(HEADER_LEN);
        let header = Header::decode(bytes.as_slice().try_into().unwrap());
        assert_eq!(usize::try_from(header.len).unwrap(), payload.len());
        (header, payload)
    }

    /// Receives packets until one has this operation.
    fn receive_op(&mut self, op: u16) -> (Header, Vec<u8>) {
        loop {
            let packet = self.receive();
            if packet.0.op == op {
                return packet;
            }
        }
    }

    /// Sends a packet with `payload` in a buffer of its own, and waits until the device has taken it.
    fn send(&mut self, header: Header, payload: &[u8]) {
        self.post(header, payload);
        self.tx.wait_used(&self.interrupt);
    }

    fn post(&mut self, header: Header, payload: &[u8]) {
        let at = TX_BUFFERS + self.tx_slot * SLOT;
        self.tx_slot = (self.tx_slot + 1) % 64;
        self.memory.write_slice(&header.encode(), GuestAddress(at)).unwrap();
        self.memory.write_slice(payload, GuestAddress(at + 0x1000)).unwrap();
        let (header_len, len) = (u32::try_from(HEADER_LEN).unwrap(), u32::try_from(payload.len()).unwrap());
        self.tx.add(&[(at, header_len, false), (at + 0x1000, len, false)]);
        self.tx.kick();
    }

    fn connect(&self) -> (UnixStream, Receiver<Result<(), ConnectError>>) {
        let (host, device) = UnixStream::pair().unwrap();
        host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let (done, result) = channel();
        self.handle.connect(PORT, device.into(), Box::new(move |r| done.send(r).unwrap()));
        (host, result)
    }

    /// An established connection: the host's end and a header as the guest sends it.
    fn established(&mut self) -> (UnixStream, Header) {
        let (host, result) = self.connect();
        let (request, _) = self.receive_op(op::REQUEST);
        assert_eq!((request.src_cid, request.dst_cid, request.dst_port), (HOST_CID, CID, PORT));
        let header = Header { dst_port: request.src_port, ..packet(op::RESPONSE) };
        self.send(header, &[]);
        assert_eq!(result.recv().unwrap(), Ok(()));
        (host, header)
    }
}

fn rw(header: Header, len: usize) -> Header {
    Header { op: op::RW, len: u32::try_from(len).unwrap(), ..header }
}

#[test]
fn bytes_cross_both_ways_and_half_closes_end_them() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    host.write_all(b"to the guest").unwrap();
    assert_eq!(guest.receive_op(op::RW).1, b"to the guest");
    guest.send(rw(header, 11), b"to the host");
    let mut bytes = [0; 11];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");

    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive_op(op::SHUTDOWN).0.flags, shutdown::SEND);
    guest.send(rw(header, 4), b"last");
    guest.send(Header { op: op::SHUTDOWN, flags: shutdown::BOTH, ..header }, &[]);
    guest.receive_op(op::RST);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last");
}

#[test]
fn stream_closed_by_host_is_shut_down_and_forgotten_on_reset() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    host.write_all(b"bye").unwrap();
    drop(host);
    let mut flags = 0;
    let mut data = Vec::new();
    while flags != shutdown::BOTH {
        let (packet, payload) = guest.receive();
        data.extend(payload);
        flags |= packet.flags;
    }
    assert_eq!(data, b"bye");
    guest.send(Header { op: op::RST, ..header }, &[]);
    // Whatever comes now belongs to nobody.
    guest.send(rw(header, 1), b"x");
    assert_eq!(guest.receive().0.op, op::RST);
}

#[test]
fn large_transfer_respects_the_guests_credit() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    let data: Vec<u8> = (0..300_000_u32).map(|i| i.to_le_bytes()[1]).collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        host.write_all(&sent).unwrap();
        host
    });
    let (mut got, mut in_flight) = (Vec::<u8>::new(), 0);
    while got.len() < data.len() {
        let (packet, payload) = guest.receive();
        got.extend(&payload);
        in_flight += payload.len();
        assert!(in_flight <= usize::try_from(GUEST_BUFFER).unwrap(), "credit overrun");
        if packet.op == op::CREDIT_REQUEST || in_flight == usize::try_from(GUEST_BUFFER).unwrap() {
            in_flight = 0;
            let fwd_cnt = u32::try_from(got.len()).unwrap();
            guest.send(Header { op: op::CREDIT_UPDATE, fwd_cnt, ..header }, &[]);
        }
    }
    assert_eq!(got, data);
    drop(writer.join().unwrap());
}

#[test]
fn hostile_10_slow_reader_gets_everything_and_memory_stays_within_the_window() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    let chunk = vec![7; 32 * 1024];
    let (mut sent, mut told) = (0_u32, 0_u32);
    // Fill socket and backlog until the device's window is closed.
    for _ in 0..64 {
        if sent.wrapping_sub(told) + 32 * 1024 > BUF_ALLOC {
            break;
        }
        guest.send(rw(header, chunk.len()), &chunk);
        sent += 32 * 1024;
        guest.give_buffer();
        while let Some((head, _)) = guest.rx.take_used() {
            let mut bytes = [0; HEADER_LEN];
            guest.memory.read_slice(&mut bytes, GuestAddress(RX_BUFFERS + u64::from(head) * 0x1000)).unwrap();
            told = Header::decode(&bytes).fwd_cnt;
        }
    }
    let mut bytes = vec![0; usize::try_from(sent).unwrap()];
    host.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|b| *b == 7));
    // The window opens again.
    let announced = guest.receive_op(op::CREDIT_UPDATE).0.fwd_cnt;
    assert!(announced > told);
}

#[test]
fn hostile_10_guest_that_overruns_the_window_is_reset() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    let chunk = vec![1; 64 * 1024];
    // More than the socketpair and the window hold together.
    for _ in 0..32 {
        guest.send(rw(header, chunk.len()), &chunk);
    }
    guest.receive_op(op::RST);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 32 * 64 * 1024);
}

#[test]
fn refused_connection_is_reported() {
    let mut guest = Guest::started();
    let (mut host, result) = guest.connect();
    let (request, _) = guest.receive_op(op::REQUEST);
    guest.send(Header { op: op::RST, dst_port: request.src_port, ..packet(op::RST) }, &[]);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Refused(PORT)));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn connection_before_the_driver_waits_for_it() {
    let mut guest = Guest::new();
    let (_host, result) = guest.connect();
    // As a driver's probe does.
    guest.device.reset();
    guest.start();
    let (request, _) = guest.receive_op(op::REQUEST);
    guest.send(Header { dst_port: request.src_port, ..packet(op::RESPONSE) }, &[]);
    assert_eq!(result.recv().unwrap(), Ok(()));
}

#[test]
fn abandoned_connection_is_reset() {
    let mut guest = Guest::started();
    let (host, result) = guest.connect();
    guest.receive_op(op::REQUEST);
    drop(host);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Abandoned));
    guest.receive_op(op::RST);
}

#[test]
fn hostile_10_guest_that_does_not_answer_a_request_is_given_up() {
    let mut guest = Guest::with_timeout(Duration::from_millis(50));
    let (_host, early) = guest.connect();
    assert_eq!(early.recv().unwrap(), Err(ConnectError::TimedOut));
    guest.start();
    // There before the request, which then leaves at once.
    guest.give_buffer();
    let (_host, result) = guest.connect();
    assert_eq!(result.recv().unwrap(), Err(ConnectError::TimedOut));
    let (request, _) = guest.receive_op(op::REQUEST);
    let (reset, _) = guest.receive_op(op::RST);
    assert_eq!(reset.src_port, request.src_port);
}

#[test]
fn hostile_10_guest_that_does_not_answer_a_shutdown_is_reset() {
    let mut guest = Guest::with_timeout(Duration::from_secs(1));
    guest.start();
    let (host, header) = guest.established();
    drop(host);
    guest.receive_op(op::SHUTDOWN);
    guest.receive_op(op::RST);
    // It is forgotten: this belongs to nobody.
    guest.send(Header { op: op::CREDIT_UPDATE, ..header }, &[]);
    assert_eq!(guest.receive().0.op, op::RST);
}

#[test]
fn hostile_10_device_reset_ends_connections_and_device_works_again() {
    let mut guest = Guest::started();
    let (mut host, _) = guest.established();
    guest.device.reset();
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    guest.rx = DriverQueue::new(&guest.memory, 0x1_0000, 64);
    guest.tx = DriverQueue::new(&guest.memory, 0x2_0000, 64);
    guest.start();
    guest.established();
}

#[test]
fn dropped_device_answers_who_waits() {
    let guest = Guest::started();
    let (_host, result) = guest.connect();
    let Guest { device, .. } = guest;
    drop(device);
    assert_eq!(result.recv().unwrap(), Err(ConnectError::Stopped));
}

#[test]
fn guests_connections_are_reset_and_the_ready_sign_is_given_once() {
    let mut guest = Guest::started();
    for _ in 0..3 {
        guest.send(Header { src_port: 99, dst_port: READY_PORT, ..packet(op::REQUEST) }, &[]);
        let (reply, _) = guest.receive();
        assert_eq!((reply.op, reply.src_port, reply.dst_port), (op::RST, READY_PORT, 99));
    }
    guest.send(Header { src_port: 98, dst_port: READY_PORT + 7, ..packet(op::REQUEST) }, &[]);
    assert_eq!(guest.receive().0.op, op::RST);
    assert_eq!(guest.ready.iter().take(1).count(), 1);
    assert!(guest.ready.try_recv().is_err());
}

#[test]
fn hostile_10_flood_of_strays_stops_at_the_reply_queue_and_recovers() {
    let mut guest = Guest::started();
    for round in 0..4_u32 {
        for i in 0..32 {
            guest.post(Header { src_port: round * 32 + i, ..packet(op::RW) }, &[]);
        }
        if round < 3 {
            for _ in 0..32 {
                guest.tx.wait_used(&guest.interrupt);
            }
        }
    }
    for _ in 0..32 {
        guest.tx.wait_used(&guest.interrupt);
    }
    // 128 answers wait, nothing more is taken.
    guest.post(Header { src_port: 999, ..packet(op::RW) }, &[]);
    guest.settle();
    assert_eq!(guest.tx.take_used(), None);
    for i in 0..128 {
        assert_eq!(guest.receive().0.dst_port, i);
    }
    assert_eq!(guest.receive().0.dst_port, 999);
    // Resets are never answered, or two ends could go on for ever.
    guest.send(packet(op::RST), &[]);
    guest.established();
}

#[test]
fn hostile_10_length_that_the_buffer_does_not_hold_and_nonsense_are_dropped() {
    let mut guest = Guest::started();
    let spoofed = Header { src_cid: 77, ..packet(op::RW) };
    guest.send(spoofed, &[]);
    let elsewhere = Header { dst_cid: 77, ..packet(op::RW) };
    guest.send(elsewhere, &[]);
    // Too short for a header, writable, outside of memory.
    guest.tx.add(&[(TX_BUFFERS, 43, false)]);
    guest.tx.add(&[(TX_BUFFERS, 44, true)]);
    guest.tx.add(&[(u64::MAX - 10, 44, false)]);
    guest.tx.add(&[(TX_BUFFERS, 0, false)]);
    guest.tx.kick();
    for _ in 0..4 {
        guest.tx.wait_used(&guest.interrupt);
    }
    // A length that the chain does not hold ends the connection, not the device.
    let (_host, header) = guest.established();
    guest.send(Header { len: 1000, ..rw(header, 0) }, b"short");
    guest.receive_op(op::RST);
    guest.established();
}

#[test]
fn hostile_04_available_index_out_of_range_asks_for_a_reset_and_the_device_survives_it() {
    let mut guest = Guest::started();
    guest.tx.set_avail(1000);
    guest.tx.kick();
    guest.interrupt.wait_reset();
    guest.device.reset();
    guest.rx = DriverQueue::new(&guest.memory, 0x1_0000, 64);
    guest.tx = DriverQueue::new(&guest.memory, 0x2_0000, 64);
    guest.start();
    guest.established();
}
