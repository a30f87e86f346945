//! Rings: their place, their indices, and what is in flight when a device is reset.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vm_memory::{Bytes, GuestAddress};

use super::{REQUEST, SIZE, for_every_device};
use crate::virtio::testing::{DriverQueue, Ends, memory};

#[test]
fn hostile_01_reset_with_requests_in_flight_ends_what_the_device_does_to_the_rings() {
    for_every_device(|rig, bystander| {
        for _ in 0..10 {
            let mut session = rig.start();
            rig.fill(&mut session);
            rig.queue(&mut session).kick();
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
            rig.breaks(&mut session, bystander);
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
        rig.breaks(&mut session, bystander);
    });
}

#[test]
fn hostile_04_head_that_the_queue_does_not_have_asks_for_a_reset() {
    for_every_device(|rig, bystander| {
        for head in [SIZE, SIZE + 1, 0x8000, u16::MAX] {
            let mut session = rig.start();
            rig.queue(&mut session).offer(head);
            rig.breaks(&mut session, bystander);
        }
    });
}

/// CVE-2026-45782.
#[test]
fn hostile_04_same_head_many_times_in_flight_is_answered_as_often() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let head = rig.fill(&mut session);
        rig.queue(&mut session).kick();
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
        rig.fill(&mut session);
        let (mut twin, stop) = (rig.queue(&mut session).twin(), AtomicBool::new(false));
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
        assert!(crate::memory::discard(&session.memory, 0x1_0000, 0x4_0000));
        rig.breaks(&mut session, bystander);
    });
}
