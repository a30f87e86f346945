//! A second vCPU that changes descriptors and requests while the device reads them.

use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress};

use super::{REQUEST, SIZE, for_every_device};
use crate::virtio::testing::{Ends, INDIRECT, NEXT, WRITE};

/// Another vCPU rewrites the descriptors while the device walks them.
#[test]
fn hostile_06_descriptors_that_change_all_the_time_harm_nobody() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let buffers = rig.buffers();
        let queue = rig.queue(&mut session);
        let head = queue.add(&buffers);
        let (twin, stop) = (queue.twin(), AtomicBool::new(false));
        let (address, len, write) = buffers[0];
        let flags = if write { WRITE } else { 0 } | if buffers.len() > 1 { NEXT } else { 0 };
        std::thread::scope(|scope| {
            let _ends = Ends(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    twin.descriptor(head, address, len, flags, 1);
                    twin.descriptor(head, u64::MAX - 7, len, flags, 1);
                    twin.descriptor(head, address, u32::MAX, flags, 1);
                    twin.descriptor(head, address, len, flags ^ WRITE, 1);
                    twin.descriptor(head, address, len, flags | NEXT, head);
                    twin.descriptor(head, address, 32, INDIRECT, 0);
                    twin.descriptor(head, address, 0, flags, SIZE);
                }
            });
            for _ in 0..300 {
                rig.queue(&mut session).offer(head);
                rig.queue(&mut session).kick();
                if session.queues[usize::from(rig.queue)].wait_used_or_reset(&session.interrupt).is_none() {
                    break;
                }
            }
        });
        bystander();
        rig.works_after_a_reset();
    });
}

/// The words of the request, as another vCPU changes them: whatever the device makes of it, it is one request.
#[test]
fn hostile_06_requests_that_change_all_the_time_are_answered_each_once() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let (memory, request, stop) = (session.memory.clone(), rig.request.clone(), AtomicBool::new(false));
        let other: Vec<u8> = request.iter().map(|byte| !byte).collect();
        std::thread::scope(|scope| {
            let _ends = Ends(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    memory.write_slice(&other, GuestAddress(REQUEST)).unwrap();
                    memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
                }
            });
            for _ in 0..300 {
                assert!(rig.ask(&mut session).is_some(), "{}", rig.name);
            }
        });
        bystander();
        rig.works_after_a_reset();
    });
}
