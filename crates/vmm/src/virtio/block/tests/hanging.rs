//! A disk of the host that does not answer: nobody waits for it but its own thread.

use std::sync::Weak;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::virtio::testing::wait_stopped;

/// A disk whose requests wait to be let through, one by one; when nobody can any more, all are.
struct Hanging {
    block: Block,
    /// Requests that have come to the host.
    reached: Receiver<()>,
    release: Sender<()>,
    /// What stands for the open file.
    file: Weak<()>,
}

fn hanging(threads: &DiskThreads) -> Hanging {
    let ((reach, reached), (release, released)) = (channel(), channel());
    let file = Arc::new(());
    let weak = Arc::downgrade(&file);
    let disk = fixture(false).disk;
    let block = Block::over(4, false, threads, move |chain| {
        let _file = &file;
        let _ = reach.send(());
        let _ = released.recv();
        disk.answer(chain)
    });
    Hanging { block, reached, release, file: weak }
}

/// A driver with requests for the first sector in its queue.
struct Session {
    memory: Memory,
    interrupt: Arc<TestInterrupt>,
    queue: DriverQueue,
}

impl Session {
    fn start(block: &mut Block, requests: usize) -> Self {
        let (memory, interrupt) = (memory(), Arc::default());
        let mut queue = DriverQueue::new(&memory, 0x1_0000, 128);
        memory.write_obj(u64::from(IN), GuestAddress(HEADER)).unwrap();
        for _ in 0..requests {
            queue.add(&[HEADER_BUFFER, (DATA, 512, true), STATUS_BUFFER]);
        }
        block.activate(activation(&memory, 0, &[&queue], &interrupt)).unwrap();
        queue.kick();
        Self { memory, interrupt, queue }
    }

    /// Bytes written to the next request that is answered, and its status.
    fn answer(&mut self) -> (u32, u8) {
        let (_, written) = self.queue.wait_used(&self.interrupt);
        (written, self.memory.read_obj(GuestAddress(STATUS)).unwrap())
    }
}

/// Waits until the thread has let go of what stands for its file.
fn wait_closed(file: &Weak<()>) {
    while file.strong_count() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn hostile_08_disk_that_hangs_holds_up_neither_its_reset_nor_its_removal_nor_another_disk() {
    let threads = DiskThreads::start(2).unwrap();
    let mut disk = hanging(&threads);
    let session = Session::start(&mut disk.block, 1);
    disk.reached.recv().unwrap();
    disk.block.reset();
    assert!(!disk.block.is_stopped(), "the buffers are still the device's");

    let mut other = hanging(&threads);
    let mut others = Session::start(&mut other.block, 1);
    other.release.send(()).unwrap();
    assert_eq!(others.answer(), (513, 0));
    drop(other.block);
    wait_closed(&other.file);

    drop(disk.block);
    assert_eq!(disk.file.strong_count(), 1, "its thread holds it as long as the request is in the host");
    drop(disk.release);
    wait_closed(&disk.file);
    drop(session);
}

#[test]
fn hostile_08_reset_is_looked_for_after_every_request_and_what_comes_back_later_is_nobodys() {
    let mut disk = hanging(&DiskThreads::start(1).unwrap());
    let mut session = Session::start(&mut disk.block, 3);
    disk.reached.recv().unwrap();
    disk.block.reset();
    // The driver may use the ring for something else from here on.
    session.memory.write_slice(&[0; 0x4000], GuestAddress(0x1_0000)).unwrap();
    drop(disk.release);
    wait_stopped(&disk.block);
    assert!(disk.reached.try_recv().is_err(), "the second request was not begun");
    assert!(session.queue.take_used().is_none() && session.interrupt.count(0) == 0);
    let mut ring = vec![0; 0x4000];
    session.memory.read_slice(&mut ring, GuestAddress(0x1_0000)).unwrap();
    assert!(ring.iter().all(|byte| *byte == 0), "the ring was written to");
}

#[test]
fn hostile_08_disk_is_not_started_anew_before_the_last_request_has_come_back() {
    let mut disk = hanging(&DiskThreads::start(1).unwrap());
    let session = Session::start(&mut disk.block, 1);
    disk.reached.recv().unwrap();
    for _ in 0..3 {
        disk.block.reset();
        let activation = activation(&session.memory, 0, &[&session.queue], &session.interrupt);
        assert!(matches!(disk.block.activate(activation), Err(ActivateError::Busy)));
    }
    drop(disk.release);
    wait_stopped(&disk.block);
    assert_eq!(Session::start(&mut disk.block, 1).answer(), (513, 0));
}

#[test]
fn hostile_08_disk_that_is_taken_away_answers_what_is_in_the_host_and_fails_what_comes_after() {
    let mut disk = hanging(&DiskThreads::start(1).unwrap());
    let mut session = Session::start(&mut disk.block, 3);
    disk.reached.recv().unwrap();
    assert!(!disk.block.withdraw(), "a request is in the host");
    drop(disk.release);
    assert_eq!(session.answer().0, 513);
    assert_eq!(session.answer(), (1, 1));
    assert_eq!(session.answer(), (1, 1));
    wait_closed(&disk.file);
    assert!(disk.block.withdraw());
    assert!(disk.reached.try_recv().is_err(), "nothing more has come to the host");
}

#[test]
fn disk_that_nobody_uses_is_taken_away_at_once() {
    let mut disk = hanging(&DiskThreads::start(1).unwrap());
    assert!(disk.block.withdraw());
    let mut disk = hanging(&DiskThreads::start(1).unwrap());
    let mut session = Session::start(&mut disk.block, 1);
    drop(disk.release);
    assert_eq!(session.answer(), (513, 0));
    // The answer is there a moment before the worker is back at its rings.
    while !disk.block.withdraw() {
        std::thread::yield_now();
    }
}
