//! A guest that breaks the protocol, and what its connections cost the host then.

use std::io::ErrorKind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Instant;

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::*;
use crate::virtio::testing::Ends;

#[test]
fn hostile_10_length_beyond_the_buffer_or_the_largest_packet_ends_the_connection() {
    let mut guest = Guest::started();
    let largest = vec![1; 0x1_0001];
    for (len, payload) in [(6, &b"short"[..]), (0x1_0000, b"short"), (u32::MAX, b"short"), (0x1_0001, &largest)] {
        let (mut host, header) = guest.established();
        guest.send(Header { len, ..rw(header, 0) }, payload);
        guest.receive_op(op::RST);
        assert_eq!(host.read(&mut [0]).unwrap(), 0, "{len:#x}");
    }
    guest.established();
}

#[test]
fn hostile_10_buffer_longer_than_the_length_gives_no_more_than_the_length() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    guest.send(rw(header, 3), b"abcdef");
    guest.send(rw(header, 0), b"ghi");
    guest.send(rw(header, 2), b"jk");
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"abcjk");
}

/// What the guest has promised room for is not kept for it: the host's writer waits.
#[test]
fn hostile_10_huge_buffer_of_a_guest_that_takes_nothing_costs_no_memory() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    guest.send(Header { op: op::CREDIT_UPDATE, buf_alloc: u32::MAX, ..header }, &[]);
    host.set_nonblocking(true).unwrap();
    let mut written = 0;
    let refused = loop {
        match host.write(&[7; 4096]) {
            Ok(len) => written += len,
            Err(error) => break error,
        }
        assert!(written < 16 << 20, "somebody keeps what the guest does not take");
    };
    assert_eq!(refused.kind(), ErrorKind::WouldBlock);
    let mut received = 0;
    while received < written {
        received += guest.receive_op(op::RW).1.len();
    }
    assert_eq!(received, written);
}

#[test]
fn hostile_10_credit_that_shrinks_to_nothing_and_claims_too_much_stops_the_flow_until_it_grows() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    let update = |buf_alloc, fwd_cnt| Header { op: op::CREDIT_UPDATE, buf_alloc, fwd_cnt, ..header };
    for (buf_alloc, fwd_cnt) in [(0, 0), (0, u32::MAX), (1, 0x8000_0000), (100, 1000)] {
        guest.send(update(buf_alloc, fwd_cnt), &[]);
    }
    host.write_all(b"waits").unwrap();
    guest.receive_op(op::CREDIT_REQUEST);
    guest.send(update(GUEST_BUFFER, 0), &[]);
    assert_eq!(guest.receive_op(op::RW).1, b"waits");
}

#[test]
fn hostile_10_packets_after_a_reset_belong_to_nobody() {
    let mut guest = Guest::started();
    let (mut host, header) = guest.established();
    guest.send(rw(header, 4), b"last");
    guest.send(Header { op: op::RST, ..header }, &[]);
    for op in [op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 99] {
        guest.send(Header { op, flags: shutdown::BOTH, ..header }, &[]);
        let (reply, _) = guest.receive();
        assert_eq!((reply.op, reply.dst_port, reply.src_port), (op::RST, PORT, header.dst_port), "{op}");
    }
    // What came before the reset was delivered, in order.
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last");
}

#[test]
fn hostile_10_reset_of_the_device_answers_who_waits_and_forgets_the_guests_packets() {
    let mut guest = Guest::started();
    for _ in 0..3 {
        let (_open, _) = guest.established();
        let (_host, pending) = guest.connect();
        let (request, _) = guest.receive_op(op::REQUEST);
        // An answer that was on its way when the driver reset the device.
        guest.device.reset();
        assert_eq!(pending.recv().unwrap(), Err(ConnectError::Stopped));
        guest.rx = DriverQueue::new(&guest.memory, 0x1_0000, 64);
        guest.tx = DriverQueue::new(&guest.memory, 0x2_0000, 64);
        guest.start();
        guest.send(Header { dst_port: request.src_port, ..packet(op::RESPONSE) }, &[]);
        assert_eq!(guest.receive().0.op, op::RST);
    }
    guest.established();
}

#[test]
fn hostile_10_data_for_a_host_that_has_closed_is_dropped_and_credited() {
    let mut guest = Guest::started();
    let (host, header) = guest.established();
    drop(host);
    guest.receive_op(op::SHUTDOWN);
    let chunk = vec![1; 64 * 1024];
    let mut credited = 0;
    // Far more than a window.
    for _ in 0..16 {
        guest.send(rw(header, chunk.len()), &chunk);
        guest.give_buffer();
        while let Some((head, _)) = guest.rx.take_used() {
            let mut bytes = [0; HEADER_LEN];
            guest.memory.read_slice(&mut bytes, GuestAddress(RX_BUFFERS + u64::from(head) * 0x1000)).unwrap();
            credited = credited.max(Header::decode(&bytes).fwd_cnt);
        }
    }
    assert!(credited > BUF_ALLOC);
}

/// Tells which thread a device loop runs in.
struct WhoAmI(Sender<i32>);

impl MutEventSubscriber for WhoAmI {
    fn init(&mut self, _ops: &mut EventOps<'_>) {
        self.0.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
    }
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}
}

/// How long a thread of this process has run or wanted to, in /proc/pid/schedstat's nanoseconds. A thread that waits for
/// its descriptors does neither, however busy the machine is.
fn busy(thread: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap();
    let times = stat.split_whitespace().take(2).map(|field| field.parse::<u64>().unwrap());
    Duration::from_nanos(times.sum())
}

#[test]
fn hostile_10_streams_that_are_closed_or_stuck_do_not_make_the_loop_spin() {
    let mut guest = Guest::started();
    let (tell, told) = channel();
    let _who = guest.event_loop.add(Box::new(WhoAmI(tell))).unwrap();
    let thread = told.recv().unwrap();
    let no_credit = |header| Header { op: op::CREDIT_UPDATE, buf_alloc: 0, ..header };

    // Closed by the host with data that the guest has no credit for, and without any.
    let (mut full, header) = guest.established();
    guest.send(no_credit(header), &[]);
    full.write_all(b"never taken").unwrap();
    drop(full);
    let (empty, header) = guest.established();
    guest.send(no_credit(header), &[]);
    drop(empty);
    // Half-closed by the host, and by the guest while the host writes on.
    let (half, _) = guest.established();
    half.shutdown(Shutdown::Write).unwrap();
    let (mut deaf, header) = guest.established();
    guest.send(Header { op: op::SHUTDOWN, flags: shutdown::RECEIVE, ..header }, &[]);
    let _ = deaf.write(b"to nobody");
    // The host does not read.
    let (_slow, header) = guest.established();
    for _ in 0..2 {
        guest.send(rw(header, 0x1_0000), &[1; 0x1_0000]);
    }

    let (before, start) = (busy(thread), Instant::now());
    std::thread::sleep(Duration::from_millis(500));
    let busy = busy(thread) - before;
    assert!(busy < start.elapsed() / 4, "busy for {busy:?}");
    guest.established();
}

/// There is a packet to send, and the guest gives buffers without end that hold none.
#[test]
fn hostile_04_flood_of_buffers_too_small_for_a_packet_does_not_stop_the_device() {
    let mut guest = Guest::started();
    let (_host, result) = guest.connect();
    let stop = AtomicBool::new(false);
    for _ in 0..64 {
        guest.rx.add(&[(RX_BUFFERS, 10, true)]);
    }
    let mut twin = guest.rx.twin();
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| twin.flood(&stop));
        // The other queue is served meanwhile.
        for _ in 0..20 {
            guest.send(packet(op::RST), &[]);
        }
        guest.device.reset();
    });
    guest.rx = DriverQueue::new(&guest.memory, 0x1_0000, 64);
    guest.tx = DriverQueue::new(&guest.memory, 0x2_0000, 64);
    guest.start();
    // The packet that waited leaves now.
    let (request, _) = guest.receive_op(op::REQUEST);
    guest.send(Header { dst_port: request.src_port, ..packet(op::RESPONSE) }, &[]);
    assert_eq!(result.recv().unwrap(), Ok(()));
}

/// Another vCPU changes the length after the packet was sent: it is one length or the other.
#[test]
fn hostile_06_header_that_changes_all_the_time_is_one_packet_or_the_other() {
    let mut guest = Guest::started();
    let (memory, stop) = (guest.memory.clone(), AtomicBool::new(false));
    // Held while a packet without data is on its way, whose length is not to change.
    let still = Mutex::new(());
    let length = |slot: u64| GuestAddress(TX_BUFFERS + slot * SLOT + 24);
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for slot in 0..64 {
                    let _turn = still.lock().unwrap();
                    // Only where a packet with data is, by its operation.
                    if memory.read_obj::<u16>(GuestAddress(length(slot).0 + 6)).unwrap() == op::RW {
                        memory.write_obj(u32::MAX, length(slot)).unwrap();
                        memory.write_obj(5_u32, length(slot)).unwrap();
                    }
                }
            }
        });
        for _ in 0..200 {
            let turn = still.lock().unwrap();
            let (mut host, header) = guest.established();
            drop(turn);
            guest.send(rw(header, 5), b"hello");
            let turn = still.lock().unwrap();
            guest.send(Header { op: op::RST, len: 0, ..header }, &[]);
            drop(turn);
            let mut bytes = Vec::new();
            host.read_to_end(&mut bytes).unwrap();
            assert!(bytes.is_empty() || bytes == b"hello", "{bytes:?}");
        }
    });
    guest.established();
}
