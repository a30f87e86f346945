use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventManager, SubscriberOps};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes, GuestAddress};

use super::segment::tests::{SENT, Sent, data, pseudo_sum};
use super::*;
use crate::memory::Memory;
use crate::virtio::testing::{DriverQueue, Ends, TestInterrupt, activation, memory};

const HEADER: usize = header::HEADER_LEN;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const TSO: u64 = MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x80_0000;

/// The device but for its tap, for which a socket that keeps the borders of messages stands in.
pub struct Wired {
    tap: Arc<Tap>,
    event_loop: EventLoop,
    worker: Option<WorkerGuard>,
}

impl Wired {
    /// The device and the other end of its wire.
    pub fn new(event_loop: EventLoop) -> (Self, OwnedFd) {
        let (wire, tap) = wire();
        rustix::fs::fcntl_setfl(&wire, rustix::fs::OFlags::empty()).unwrap();
        (Self { tap: Arc::new(Tap::for_test(tap)), event_loop, worker: None }, wire)
    }
}

impl VirtioDevice for Wired {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }
    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }
    fn features(&self) -> u64 {
        FEATURES.iter().fold(0, |all, bit| all | 1 << bit)
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let worker = Worker::new(self.tap.clone(), 1500, activation)?;
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }
    fn reset(&mut self) {
        self.worker = None;
    }
}

fn wire() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// A device with a driver.
struct Guest {
    memory: Memory,
    interrupt: Arc<TestInterrupt>,
    rx: DriverQueue,
    tx: DriverQueue,
    wire: OwnedFd,
    device: Wired,
}

impl Guest {
    fn new(features: u64) -> Self {
        let memory = memory();
        let (mut device, wire) = Wired::new(EventLoop::spawn().unwrap());
        let rx = DriverQueue::new(&memory, 0x1_0000, 64).with_event_idx();
        let tx = DriverQueue::new(&memory, 0x2_0000, 64);
        let interrupt = Arc::default();
        device.activate(activation(&memory, features, &[&rx, &tx], &interrupt)).unwrap();
        Self { memory, interrupt, rx, tx, wire, device }
    }

    /// Another driver, after a reset.
    fn restart(&mut self, features: u64) {
        self.device.reset();
        self.rx = DriverQueue::new(&self.memory, 0x1_0000, 64).with_event_idx();
        self.tx = DriverQueue::new(&self.memory, 0x2_0000, 64);
        self.device.activate(activation(&self.memory, features, &[&self.rx, &self.tx], &self.interrupt)).unwrap();
    }

    fn give_buffer(&mut self, len: u32) {
        let address = RX_BUFFERS + u64::from(self.rx.next_descriptor()) * 0x2000;
        self.rx.add(&[(address, len, true)]);
    }

    fn give_buffers(&mut self, count: u16, len: u32) {
        (0..count).for_each(|_| self.give_buffer(len));
        self.rx.kick();
    }

    /// The host sends a frame, behind a header of zeros.
    fn host_sends(&self, frame: &[u8]) {
        let message = [&[0xee; HEADER][..], frame].concat();
        rustix::net::send(&self.wire, &message, SendFlags::empty()).unwrap();
    }

    fn host_receives(&self) -> Vec<u8> {
        let mut bytes = vec![0; 0x2_0000];
        let (len, _) = rustix::net::recv(&self.wire, &mut bytes[..], RecvFlags::empty()).unwrap();
        bytes.truncate(len);
        bytes
    }

    /// One frame, of as many buffers as its header says; all of them must be there together.
    fn receive(&mut self) -> (u16, Vec<u8>) {
        let (head, len) = self.rx.wait_used(&self.interrupt);
        let mut frame = self.buffer(head, len);
        let count = u16::from_le_bytes([frame[10], frame[11]]);
        for _ in 1..count {
            let (head, len) = self.rx.take_used().expect("part of a frame is missing");
            frame.extend(self.buffer(head, len));
        }
        (count, frame.split_off(HEADER))
    }

    fn buffer(&self, head: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(RX_BUFFERS + u64::from(head) * 0x2000)).unwrap();
        bytes
    }

    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        let at = TX_BUFFERS + u64::from(self.tx.next_descriptor()) * 0x2000;
        self.memory.write_slice(&header, GuestAddress(at)).unwrap();
        self.memory.write_slice(frame, GuestAddress(at + 0x100)).unwrap();
        self.tx.add(&[(at, 12, false), (at + 0x100, u32::try_from(frame.len()).unwrap(), false)]);
        self.tx.kick();
    }
}

fn frame(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + seed).to_le_bytes()[0]).collect()
}

#[test]
fn frame_of_the_guest_reaches_the_host_with_a_clean_header() {
    let mut guest = Guest::new(MERGEABLE);
    let sent = frame(100, 1);
    guest.send([0xfe, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], &sent);
    let got = guest.host_receives();
    assert_eq!((&got[..HEADER], &got[HEADER..]), (&[0; HEADER][..], &sent[..]));
    guest.tx.wait_used(&guest.interrupt);
}

#[test]
fn frame_of_the_host_takes_as_many_buffers_as_it_needs() {
    let mut guest = Guest::new(MERGEABLE);
    guest.give_buffers(8, 512);
    let sent = frame(1300, 2);
    guest.host_sends(&sent);
    assert_eq!(guest.receive(), (3, sent));
    guest.give_buffers(8, 1530);
    guest.host_sends(&frame(60, 3));
    assert_eq!(guest.receive(), (1, frame(60, 3)));
}

#[test]
fn frame_without_mergeable_buffers_takes_one() {
    let mut guest = Guest::new(0);
    // Too small for a frame: returned unused.
    guest.give_buffers(1, 100);
    assert_eq!(guest.rx.wait_used(&guest.interrupt).1, 0);
    guest.give_buffers(2, 1530);
    guest.host_sends(&frame(1500, 4));
    assert_eq!(guest.receive(), (1, frame(1500, 4)));
}

#[test]
fn segmented_frame_spans_many_buffers() {
    let mut guest = Guest::new(TSO);
    guest.give_buffers(60, 1530);
    let sent = frame(65000, 5);
    guest.host_sends(&sent);
    assert_eq!(guest.receive(), (43, sent));
}

#[test]
fn small_ring_receives_what_fits() {
    let mut guest = Guest::new(TSO);
    // 64 buffers of 512 bytes are all that there is: less than the largest frame.
    guest.give_buffers(64, 512);
    guest.host_sends(&frame(40_000, 6));
    guest.host_sends(&frame(1000, 7));
    assert_eq!(guest.receive(), (2, frame(1000, 7)));
}

/// CVE-2020-16843.
#[test]
fn hostile_09_reception_resumes_after_a_flood_without_buffers() {
    let mut guest = Guest::new(MERGEABLE);
    for round in 0..20 {
        for i in 0..10 {
            guest.host_sends(&frame(1000, round * 10 + i));
        }
        guest.give_buffers(12, 1530);
        for i in 0..10 {
            assert_eq!(guest.receive().1, frame(1000, round * 10 + i));
        }
    }
}

#[test]
fn full_tap_blocks_transmission_until_it_drains() {
    let mut guest = Guest::new(0);
    let mut sent = 0;
    // More than the socket holds, in batches that fit the ring.
    while sent < 2000 {
        let before = sent;
        for _ in 0..16 {
            guest.send([0; HEADER], &frame(1400, sent));
            sent += 1;
        }
        for i in before..sent {
            let got = guest.host_receives();
            assert_eq!(got[HEADER..], frame(1400, i));
        }
        for _ in 0..16 {
            guest.tx.wait_used(&guest.interrupt);
        }
    }
    // And with nobody who reads until the ring is full.
    let small = rustix::net::sockopt::set_socket_send_buffer_size(guest.wire.as_fd(), 4096);
    small.unwrap();
    for i in 0..32 {
        guest.send([0; HEADER], &frame(8000, i));
    }
    for i in 0..32 {
        assert_eq!(guest.host_receives()[HEADER..], frame(8000, i));
    }
}

#[test]
fn hostile_09_frames_too_long_or_short_and_nonsense_are_dropped_and_the_device_goes_on() {
    let mut guest = Guest::new(0);
    // Too short for header or frame, too long, writable, outside of memory, segmentation that was not negotiated.
    guest.tx.add(&[(TX_BUFFERS, 11, false)]);
    guest.tx.add(&[(TX_BUFFERS, 12, false)]);
    guest.tx.add(&[(TX_BUFFERS, 0x4_0000, false)]);
    guest.tx.add(&[(TX_BUFFERS, 100, true)]);
    guest.tx.add(&[(u64::MAX, 100, false)]);
    guest.tx.kick();
    guest.send([1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0], &frame(1000, 8));
    guest.send([0; HEADER], &frame(60, 9));
    assert_eq!(guest.host_receives()[HEADER..], frame(60, 9));
    for _ in 0..7 {
        guest.tx.wait_used(&guest.interrupt);
    }
    // A readable buffer for reception.
    guest.rx.add(&[(RX_BUFFERS, 2000, false)]);
    guest.give_buffers(1, 2000);
    assert_eq!(guest.rx.wait_used(&guest.interrupt).1, 0);
    guest.host_sends(&frame(60, 10));
    assert_eq!(guest.receive().1, frame(60, 10));
}

#[test]
fn hostile_04_available_index_out_of_range_asks_for_a_reset() {
    let mut guest = Guest::new(0);
    guest.tx.set_avail(1000);
    guest.tx.kick();
    guest.interrupt.wait_reset();
}

#[test]
fn hostile_05_descriptor_loop_is_dropped() {
    let mut guest = Guest::new(0);
    guest.tx.descriptor(0, TX_BUFFERS, 100, crate::virtio::testing::NEXT, 0);
    guest.tx.offer(0);
    guest.tx.kick();
    assert_eq!(guest.tx.wait_used(&guest.interrupt), (0, 0));
}

#[test]
fn descriptor_that_is_no_tap_is_refused() {
    let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let result = Net::new(file, [2, 0, 0, 0, 0, 1], 1500, EventLoop::spawn().unwrap());
    assert!(matches!(result, Err(NetError::NoTap(_))));
}

/// A container under runc can do the same with CAP_NET_RAW: what a frame claims is for the node's network to judge.
#[test]
fn hostile_09_frame_with_a_spoofed_mac_address_crosses_as_it_is() {
    let mut guest = Guest::new(0);
    let mut spoofed = frame(60, 1);
    spoofed[..12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0xba, 0xd0, 0, 0, 1]);
    guest.send([0; HEADER], &spoofed);
    assert_eq!(guest.host_receives()[HEADER..], spoofed);
    // And the address that the guest is told is not its to change.
    let mut device = guest.device;
    device.write_config(0, &[0xff; 6]);
    let mut mac = [1; 6];
    device.read_config(0, &mut mac);
    assert_eq!(mac, [1; 6]);
}

#[test]
fn hostile_09_features_acknowledged_in_part_still_move_frames() {
    let all = FEATURES.iter().fold(0, |all, bit| all | 1 << bit);
    let ones = FEATURES.iter().map(|bit| 1 << bit);
    let mut guest = Guest::new(0);
    for features in ones.clone().chain(ones.map(|one| all & !one)).chain([0, all, u64::MAX]) {
        guest.restart(features);
        // Room for the largest frame, should the driver have asked for such.
        guest.rx.add(&[(RX_BUFFERS, 0x1_1000, true)]);
        guest.rx.kick();
        guest.send([0; HEADER], &frame(60, 1));
        assert_eq!(guest.host_receives()[HEADER..], frame(60, 1), "{features:#x}");
        guest.host_sends(&frame(1500, 2));
        assert_eq!(guest.receive(), (1, frame(1500, 2)), "{features:#x}");
    }
}

#[test]
fn hostile_09_offloads_of_the_driver_before_a_reset_are_not_those_of_the_next() {
    let segmented = [1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0];
    let mut guest = Guest::new(1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4);
    guest.send(segmented, &frame(1000, 1));
    assert_eq!(guest.host_receives()[..HEADER], segmented);
    guest.restart(0);
    guest.send(segmented, &frame(1000, 2));
    guest.send([0; HEADER], &frame(60, 3));
    assert_eq!(guest.host_receives()[HEADER..], frame(60, 3));
}

#[test]
fn hostile_09_reset_in_a_flood_without_buffers_does_not_stop_reception() {
    let mut guest = Guest::new(MERGEABLE);
    for round in 0..5 {
        (0..10).for_each(|i| guest.host_sends(&frame(1000, round * 10 + i)));
        guest.restart(MERGEABLE);
        guest.give_buffers(10, 1530);
        for i in 0..10 {
            assert_eq!(guest.receive().1, frame(1000, round * 10 + i));
        }
    }
}

/// The header that was checked is the one that the host gets, whatever stands in memory by then.
#[test]
fn hostile_06_header_that_changes_after_its_check_does_not_reach_the_host() {
    let mut guest = Guest::new(0);
    let (memory, stop) = (guest.memory.clone(), std::sync::atomic::AtomicBool::new(false));
    rustix::fs::fcntl_setfl(&guest.wire, rustix::fs::OFlags::NONBLOCK).unwrap();
    memory.write_slice(&frame(60, 1), GuestAddress(TX_BUFFERS + 0x100)).unwrap();
    let mut crossed = 0;
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                memory
                    .write_slice(&[1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], GuestAddress(TX_BUFFERS))
                    .unwrap();
                memory.write_slice(&[0; HEADER], GuestAddress(TX_BUFFERS)).unwrap();
            }
        });
        for _ in 0..20_000 {
            guest.tx.add(&[(TX_BUFFERS, 12, false), (TX_BUFFERS + 0x100, 60, false)]);
            guest.tx.kick();
            guest.tx.wait_used(&guest.interrupt);
            let mut bytes = [0; 0x100];
            if let Ok((len, _)) = rustix::net::recv(&guest.wire, &mut bytes[..], RecvFlags::empty()) {
                assert_eq!(bytes[..len], [&[0; HEADER][..], &frame(60, 1)].concat());
                crossed += 1;
            }
        }
    });
    assert!(crossed > 0);
}

#[test]
fn hostile_04_receive_buffer_that_is_given_twice_is_filled_twice() {
    let mut guest = Guest::new(MERGEABLE);
    let head = guest.rx.add(&[(RX_BUFFERS, 1530, true)]);
    guest.rx.offer(head);
    guest.give_buffers(2, 1530);
    for seed in 0..4 {
        guest.host_sends(&frame(1000, seed));
    }
    assert_eq!(guest.rx.wait_used(&guest.interrupt).0, head);
    assert_eq!(guest.rx.wait_used(&guest.interrupt).0, head);
    assert_eq!((guest.receive().1, guest.receive().1), (frame(1000, 2), frame(1000, 3)));
}

/// Buffers for reception that hold no frame come back as fast as the driver gives them.
#[test]
fn hostile_04_flood_of_buffers_too_small_for_a_frame_does_not_stop_the_device() {
    let mut guest = Guest::new(0);
    let stop = std::sync::atomic::AtomicBool::new(false);
    guest.give_buffers(64, 10);
    let mut twin = guest.rx.twin();
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| twin.flood(&stop));
        for seed in 0..50 {
            guest.send([0; HEADER], &frame(60, seed));
            assert_eq!(guest.host_receives()[HEADER..], frame(60, seed));
            guest.tx.wait_used(&guest.interrupt);
        }
        guest.device.reset();
    });
    guest.restart(0);
    guest.give_buffers(2, 1530);
    guest.host_sends(&frame(60, 1));
    assert_eq!(guest.receive().1, frame(60, 1));
}

/// A device whose loop the test turns, so that it finds at once what has come before.
struct Stepped {
    memory: Memory,
    interrupt: Arc<TestInterrupt>,
    rx: DriverQueue,
    tx: DriverQueue,
    wire: OwnedFd,
    device: EventManager<crate::event_loop::Worker>,
}

impl Stepped {
    /// With buffers of these lengths for reception.
    fn new(features: u64, buffers: &[u32]) -> Self {
        let (memory, (wire, tap)) = (memory(), wire());
        let mut rx = DriverQueue::new(&memory, 0x1_0000, 64).with_event_idx();
        let tx = DriverQueue::new(&memory, 0x2_0000, 64);
        let interrupt = Arc::default();
        let activation = activation(&memory, features, &[&rx, &tx], &interrupt);
        let worker = Worker::new(Arc::new(Tap::for_test(tap)), 1500, activation).unwrap();
        let mut device = EventManager::new().unwrap();
        device.add_subscriber(Box::new(worker) as crate::event_loop::Worker);
        for len in buffers {
            let address = RX_BUFFERS + u64::from(rx.next_descriptor()) * 0x2000;
            rx.add(&[(address, *len, true)]);
        }
        Self { memory, interrupt, rx, tx, wire, device }
    }

    fn turn(&mut self) {
        self.rx.kick();
        while self.device.run_with_timeout(0).unwrap() > 0 {}
    }

    fn host_sends(&self, frame: &[u8]) {
        rustix::net::send(&self.wire, frame, SendFlags::empty()).unwrap();
    }

    fn interrupts(&self) -> usize {
        self.interrupt.count(RX) + self.interrupt.count(TX)
    }

    /// The next frame that the driver has, with its header but for the number of buffers, which are given back.
    fn take(&mut self) -> Option<Vec<u8>> {
        let (mut frame, mut left) = (Vec::new(), 1);
        while left > 0 {
            let (head, len) = match self.rx.take_used() {
                None if frame.is_empty() => return None,
                used => used.expect("part of a frame is missing"),
            };
            let mut part = vec![0; usize::try_from(len).unwrap()];
            self.memory.read_slice(&mut part, GuestAddress(RX_BUFFERS + u64::from(head) * 0x2000)).unwrap();
            if frame.is_empty() {
                left = u16::from_le_bytes([part[10], part[11]]);
                part[10..12].fill(0);
            }
            frame.extend(part);
            left -= 1;
            self.rx.offer(head);
        }
        Some(frame)
    }
}

const RX: u16 = 0;
const TX: u16 = 1;
const TSO_BOTH: u64 = TSO | 1 << VIRTIO_NET_F_GUEST_TSO6;

#[test]
fn segments_that_wait_become_one_frame_for_each_connection() {
    let mut device = Stepped::new(TSO_BOTH, &[0x2000; 60]);
    let mut next = [0, 1, 2, 3].map(|port| Sent { port, ..SENT });
    for _ in 0..4 {
        for sent in &mut next {
            device.host_sends(&sent.frame());
            *sent = sent.next();
        }
    }
    device.turn();
    for port in 0..4 {
        let frame = device.take().unwrap();
        assert!(frame == Sent { port, payload: 4 * 2896, ..SENT }.frame(), "connection {port}");
    }
    assert_eq!((device.take(), device.interrupts()), (None, 1), "for 16 frames of the host");
}

#[test]
fn frame_is_full_when_its_length_is_and_the_next_one_begins() {
    let mut device = Stepped::new(TSO_BOTH, &[0x2000; 60]);
    let mut next = Sent { v6: true, payload: 10 * 1448, ..SENT };
    for _ in 0..6 {
        device.host_sends(&next.frame());
        next = next.next();
    }
    device.turn();
    let first = Sent { v6: true, payload: 40 * 1448, ..SENT };
    assert!(device.take().unwrap() == first.frame());
    assert!(device.take().unwrap() == Sent { payload: 20 * 1448, ..first.next() }.frame());
    assert_eq!(device.take(), None);
}

#[test]
fn frames_that_are_not_one_come_as_they_were_and_in_their_order() {
    let mut device = Stepped::new(TSO_BOTH, &[0x2000; 60]);
    let other = Sent { port: 2, ..SENT };
    let sent = [
        SENT.frame(),
        other.frame(),
        // Shorter than the headers that are read apart.
        Sent { payload: 0, packet: None, time: None, ..SENT.next() }.frame(),
        SENT.next().frame(),
        // Of another version, and longer headers.
        Sent { v6: true, ..SENT }.frame(),
        [&[0; HEADER][..], &frame(1000, 3)].concat(),
        SENT.next().next().frame(),
        [&[0; HEADER][..], &frame(14, 3)].concat(),
    ];
    sent.iter().for_each(|frame| device.host_sends(frame));
    device.turn();
    for (number, frame) in sent.iter().enumerate() {
        assert!(device.take().as_ref() == Some(frame), "frame {number}");
    }
    assert_eq!(device.take(), None);
}

#[test]
fn driver_without_mergeable_buffers_or_segmentation_gets_each_frame() {
    for features in [0, MERGEABLE, TSO & !MERGEABLE] {
        let mut device = Stepped::new(features, &[0x2000; 60]);
        if features & !MERGEABLE != 0 {
            // One buffer has to hold the largest frame.
            device = Stepped::new(features, &[]);
            for _ in 0..2 {
                device.rx.add(&[(RX_BUFFERS, 0x1_1000, true)]);
            }
        }
        let first = Sent { payload: 1448, packet: None, ..SENT };
        device.host_sends(&first.frame());
        device.host_sends(&first.next().frame());
        device.turn();
        let mut count = 0;
        while device.rx.take_used().is_some() {
            count += 1;
        }
        assert_eq!(count, 2, "{features:#x}");
    }
}

/// The acknowledgement of what the guest sends is often there when the write to the tap returns.
#[test]
fn what_was_sent_and_its_answer_are_one_interrupt() {
    let mut device = Stepped::new(TSO_BOTH, &[0x2000; 60]);
    for round in 1..=5 {
        device.host_sends(&[&[0; HEADER][..], &frame(60, round)].concat());
        device.memory.write_slice(&[0; 0x100], GuestAddress(TX_BUFFERS)).unwrap();
        device.tx.add(&[(TX_BUFFERS, 100, false)]);
        device.tx.kick();
        device.turn();
        assert!(device.take().is_some() && device.tx.take_used().is_some());
        assert_eq!(device.interrupts(), round);
    }
}

/// Whatever comes in whatever buffers: each connection's bytes arrive, once and in their order.
#[test]
fn hostile_09_mixture_of_frames_in_odd_buffers_loses_and_mixes_up_nothing() {
    let mut seed = 1_u32;
    let mut random = move |limit: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) % limit
    };
    let sizes: Vec<_> = (0..64).map(|_| 1200 + random(3000)).collect();
    let mut device = Stepped::new(TSO_BOTH, &sizes);
    let mut next = [(false, 1), (false, 2), (true, 1), (false, 3)].map(|(v6, port)| Sent { v6, port, ..SENT });
    let (mut sent, mut came) = (HashMap::<_, Vec<u8>>::new(), HashMap::<_, Vec<u8>>::new());
    let (mut frames_sent, mut frames_came) = (0, 0);
    for time in 0..2000 {
        for _ in 0..=random(12) {
            let packet = 1 + random(1448);
            let packets = random(4);
            let connection = &mut next[usize::try_from(random(4)).unwrap()];
            // Now and then another size, another flag, no time stamps, or an acknowledgement without data.
            connection.packet = Some(if random(8) == 0 { u16::try_from(packet).unwrap() } else { 1448 });
            connection.payload = usize::from(connection.packet.unwrap()) * usize::try_from(packets).unwrap();
            connection.flags = if random(8) == 0 { 0x11 } else { 0x10 };
            connection.time = (random(16) != 0).then_some(time);
            device.host_sends(&connection.frame());
            let key = (connection.v6, connection.port);
            sent.entry(key).or_default().extend(data(connection.number, connection.payload));
            *connection = connection.next();
            frames_sent += 1;
            if random(16) == 0 {
                device.host_sends(&[&[0; HEADER][..], &frame(60, 1)].concat());
                frames_sent += 1;
            }
        }
        device.turn();
        while let Some(frame) = device.take() {
            frames_came += 1;
            let v6 = frame[24..26] == [0x86, 0xdd];
            if !v6 && frame[24..26] != [8, 0] {
                continue;
            }
            let tcp = HEADER + if v6 { 54 } else { 34 };
            let port = u16::from_be_bytes([frame[tcp], frame[tcp + 1]]);
            let sum = u16::from_be_bytes([frame[tcp + 16], frame[tcp + 17]]);
            assert_eq!(sum % 0xffff, pseudo_sum(&frame, v6) % 0xffff);
            let payload = tcp + usize::from(frame[tcp + 12] >> 4) * 4;
            came.entry((v6, port)).or_default().extend(&frame[payload..]);
            // What is left when the driver had no buffers.
            device.turn();
        }
    }
    assert!(sent == came);
    assert!(frames_came < frames_sent * 49 / 50, "{frames_came} of {frames_sent}");
}
