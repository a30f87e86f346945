//! Descriptor chains that are too long, lead nowhere, or lead in the wrong direction.

use vm_memory::{Bytes, GuestAddress};

use super::{SIZE, for_every_device};
use crate::memory::Memory;
use crate::virtio::testing::{DriverQueue, INDIRECT, NEXT, WRITE};

/// Half of the memory.
const WILD: u64 = 0x80_0000;
const TABLE: u64 = 0x60_0000;

/// The most descriptors that a chain can have are in an indirect table, and the ring is full of it.
#[test]
fn hostile_04_longest_chains_that_there_can_be_do_not_hold_up_the_others() {
    for_every_device(|rig, bystander| {
        for len in [0, 1, 0x1000] {
            for flags in [0, WRITE] {
                let mut session = rig.start();
                let entries: Vec<_> = (1..=u16::MAX)
                    .map(|next| (WILD, len, flags | if next < u16::MAX { NEXT } else { 0 }, next))
                    .collect();
                let queue = rig.queue(&mut session);
                table(queue, queue.memory(), u32::from(u16::MAX) * 16, 0, &entries);
                (0..SIZE).for_each(|_| queue.offer(4));
                queue.kick();
                bystander();
                assert_eq!(
                    session.queues[usize::from(rig.queue)].wait_used_or_reset(&session.interrupt).map(|used| used.0),
                    Some(4),
                    "{}",
                    rig.name
                );
                rig.device.reset();
            }
        }
        rig.works_after_a_reset();
    });
}

/// A chain with something wrong, of descriptors from 4 on, readable or writable by `flags`; and its name.
type BrokenChain = (&'static str, fn(&DriverQueue, flags: u16));

/// Writes an indirect table.
fn table(queue: &DriverQueue, memory: &Memory, len: u32, flags: u16, entries: &[(u64, u32, u16, u16)]) {
    for (at, (address, len, flags, next)) in (TABLE..).step_by(16).zip(entries) {
        let words = [*address, u64::from(*len) | u64::from(*flags) << 32 | u64::from(*next) << 48];
        memory.write_slice(&words.map(u64::to_le_bytes).concat(), GuestAddress(at)).unwrap();
    }
    queue.descriptor(4, TABLE, len, INDIRECT | flags, 5);
}

const BROKEN_CHAINS: [BrokenChain; 21] = [
    ("names itself", |q, flags| q.descriptor(4, WILD, 16, NEXT | flags, 4)),
    ("goes round", |q, flags| {
        q.descriptor(4, WILD, 16, NEXT | flags, 5);
        q.descriptor(5, WILD, 16, NEXT | flags, 4);
    }),
    ("goes on beyond the table", |q, flags| q.descriptor(4, WILD, 16, NEXT | flags, SIZE)),
    ("goes on far beyond the table", |q, flags| q.descriptor(4, WILD, 16, NEXT | flags, u16::MAX)),
    ("indirect in indirect", |q, flags| table(q, q.memory(), 16, 0, &[(TABLE, 16, INDIRECT | flags, 0)])),
    ("indirect table that loops", |q, flags| {
        table(q, q.memory(), 32, 0, &[(WILD, 16, NEXT | flags, 1), (WILD, 16, NEXT | flags, 0)]);
    }),
    ("indirect table of 17 bytes", |q, flags| table(q, q.memory(), 17, 0, &[(WILD, 16, flags, 0)])),
    ("indirect table of 15 bytes", |q, flags| table(q, q.memory(), 15, 0, &[(WILD, 16, flags, 0)])),
    ("indirect table of no bytes", |q, _| table(q, q.memory(), 0, 0, &[])),
    ("indirect table of 65536 entries", |q, flags| table(q, q.memory(), 0x10_0000, 0, &[(WILD, 16, flags, 0)])),
    ("indirect table of 4 GiB", |q, flags| table(q, q.memory(), !15, 0, &[(WILD, 16, flags, 0)])),
    ("indirect table beyond memory", |q, _| q.descriptor(4, 1 << 40, 32, INDIRECT, 0)),
    ("indirect table that wraps", |q, _| q.descriptor(4, u64::MAX - 15, 32, INDIRECT, 0)),
    ("indirect and next", |q, flags| table(q, q.memory(), 16, NEXT, &[(WILD, 16, flags, 0)])),
    ("address that wraps", |q, flags| q.descriptor(4, u64::MAX - 7, 16, flags, 0)),
    ("no bytes", |q, flags| q.descriptor(4, WILD, 0, flags, 0)),
    ("4 GiB", |q, flags| q.descriptor(4, WILD, u32::MAX, flags, 0)),
    ("across the end of memory", |q, flags| q.descriptor(4, (16 << 20) - 8, 16, flags, 0)),
    ("more than 4 GiB in total", |q, flags| {
        // 600 times the upper half of the memory.
        let entries = (1..=600).map(|next| (WILD, 8 << 20, flags | if next < 600 { NEXT } else { 0 }, next));
        table(q, q.memory(), 600 * 16, 0, &entries.collect::<Vec<_>>());
    }),
    ("flags that nobody has defined", |q, flags| q.descriptor(4, WILD, 16, 0xfff8 | flags, 0)),
    ("readable after writable", |q, flags| {
        q.descriptor(4, WILD, 16, NEXT | (flags ^ WRITE), 5);
        q.descriptor(5, WILD, 16, NEXT | flags, 6);
        q.descriptor(6, WILD, 16, flags ^ WRITE, 0);
    }),
];

#[test]
fn hostile_05_broken_chains_are_given_back_or_stop_the_device_until_a_reset() {
    for_every_device(|rig, bystander| {
        for (name, broken) in BROKEN_CHAINS {
            for flags in [0, WRITE] {
                let mut session = rig.start();
                let queue = rig.queue(&mut session);
                broken(queue, flags);
                queue.offer(4);
                queue.kick();
                if rig.ask(&mut session).is_none() {
                    println!("{} needs a reset after a chain with {name}", rig.name);
                }
                bystander();
                rig.works_after_a_reset();
            }
        }
    });
}

#[test]
fn hostile_05_request_with_every_buffer_in_the_wrong_direction_is_given_back() {
    for_every_device(|rig, bystander| {
        let mut session = rig.start();
        let wrong: Vec<_> = rig.buffers().into_iter().map(|(address, len, write)| (address, len, !write)).collect();
        let head = rig.queue(&mut session).add(&wrong);
        rig.queue(&mut session).kick();
        assert_eq!(session.queues[usize::from(rig.queue)].wait_used(&session.interrupt).0, head, "{}", rig.name);
        assert!(rig.ask(&mut session).is_some(), "{}", rig.name);
        bystander();
        rig.works_after_a_reset();
    });
}
