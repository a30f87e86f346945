//! What a guest asks, against other open files of the same host.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use tempfile::NamedTempFile;

use super::*;

const NODE: u64 = 7;

/// A guest's open files, and one of the host's beside them. Handles below 10 can be written.
struct Rig {
    path: NamedTempFile,
    files: Files,
    locks: Locks<u32>,
}

struct Files(HashMap<(u64, u64), File>);

impl OpenFiles for Files {
    fn with(&self, node: u64, handle: u64, act: &mut dyn FnMut(&File) -> io::Result<()>) -> io::Result<()> {
        act(self.0.get(&(node, handle)).ok_or_else(|| errno(libc::EBADF))?)
    }
}

impl Rig {
    fn new(watches: usize) -> Self {
        let path = NamedTempFile::new().unwrap();
        let files = (1..20).map(|handle| {
            let file = File::options().read(true).write(handle < 10).open(path.path()).unwrap();
            ((NODE, handle), file)
        });
        let files = Files(files.collect());
        let descriptors = File::open("/proc/self/fd").unwrap().into();
        let watches = Watches::start(watches, File::open("/").unwrap()).unwrap();
        let locks = Locks::new(Arc::new(watches), descriptors);
        Self { path, files, locks }
    }

    fn host(&self) -> File {
        File::options().read(true).write(true).open(self.path.path()).unwrap()
    }

    fn set(&self, wish: &Wish) -> Result<(), i32> {
        self.locks.set(&self.files, wish).map_err(|error| error.raw_os_error().unwrap())
    }

    /// `None` if it waits; its number is that of the request, too.
    fn wait_for(&self, wish: &Wish, number: u32) -> Option<Result<(), i32>> {
        let (_, result) = self.locks.set_waiting(&self.files, *wish, number.into(), number)?;
        Some(result.map_err(|error| error.raw_os_error().unwrap()))
    }

    fn settled(&self) -> Vec<(u32, Result<(), i32>)> {
        self.locks.look_at_watches();
        let settled = self.locks.settled(&self.files).into_iter();
        settled.map(|(reply, result)| (reply, result.map_err(|error| error.raw_os_error().unwrap()))).collect()
    }

    /// Waits until a thread's wait has ended.
    fn settled_later(&self) -> Vec<(u32, Result<(), i32>)> {
        loop {
            self.wait_for_a_thread();
            let settled = self.settled();
            if !settled.is_empty() {
                return settled;
            }
        }
    }

    fn wait_for_a_thread(&self) {
        let event = self.locks.watches().event();
        // SAFETY: the event is borrowed.
        #[allow(unsafe_code)]
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) };
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
        assert_eq!(poll(&mut fds, Some(&limit)).unwrap(), 1, "no wait has ended");
    }
}

fn bytes(owner: u64, how: How, start: u64, end: u64) -> Wish {
    Wish { node: NODE, handle: 1, owner, whole: false, how, span: Span { start, end }, pid: 100 }
}

fn whole(handle: u64, how: How) -> Wish {
    Wish { handle, owner: handle, whole: true, ..bytes(0, how, 0, Span::LAST) }
}

#[test]
fn hosts_locks_are_in_the_guests_way_and_the_other_way_round() {
    let rig = Rig::new(0);
    let host = rig.host();
    host::set(&host, How::Write, Span { start: 0, end: 9 }).unwrap();
    assert_eq!(rig.set(&bytes(1, How::Read, 9, 9)), Err(libc::EAGAIN));
    rig.set(&bytes(1, How::Write, 10, 19)).unwrap();
    assert!(is_conflict(&host::set(&host, How::Read, Span { start: 0, end: 10 }).unwrap_err()));

    host::set_whole(&host, How::Read).unwrap();
    assert_eq!(rig.set(&whole(1, How::Write)), Err(libc::EAGAIN));
    rig.set(&whole(1, How::Read)).unwrap();
    assert!(is_conflict(&host::set_whole(&host, How::Write).unwrap_err()));
    rig.set(&whole(1, How::Unlock)).unwrap();
    host::set_whole(&host, How::Write).unwrap();
}

#[test]
fn owners_of_one_guest_exclude_each_other_and_are_named() {
    let rig = Rig::new(0);
    rig.set(&Wish { pid: 42, ..bytes(1, How::Write, 5, 9) }).unwrap();
    assert_eq!(rig.set(&bytes(2, How::Read, 9, 20)), Err(libc::EAGAIN));
    let found = rig.locks.conflict(&rig.files, &bytes(2, How::Read, 0, 100)).unwrap();
    assert_eq!(found, Some((How::Write, Span { start: 5, end: 9 }, 42)));
    // Its own are in nobody's way, by whatever open file.
    let own = Wish { handle: 2, ..bytes(1, How::Write, 0, Span::LAST) };
    assert_eq!(rig.locks.conflict(&rig.files, &own).unwrap(), None);
    rig.set(&own).unwrap();
    let found = rig.locks.conflict(&rig.files, &bytes(2, How::Read, 3, 3)).unwrap();
    assert_eq!(found, Some((How::Write, Span { start: 0, end: Span::LAST }, 100)));
}

#[test]
fn closing_lets_go() {
    let rig = Rig::new(0);
    let host = rig.host();
    let free = || host::set(&host, How::Write, Span { start: 0, end: 9 });
    for let_go in [
        &|rig: &Rig| rig.locks.closed_by(NODE, 1) as (),
        &|rig: &Rig| rig.locks.closed(NODE, 1),
        &|rig: &Rig| rig.set(&bytes(1, How::Unlock, 0, Span::LAST)).unwrap(),
        &|rig: &Rig| rig.locks.clear(),
    ] as [&dyn Fn(&Rig); 4]
    {
        rig.set(&bytes(1, How::Read, 0, 3)).unwrap();
        rig.set(&bytes(1, How::Write, 8, 9)).unwrap();
        rig.locks.closed_by(NODE, 2);
        rig.locks.closed(NODE, 2);
        assert!(free().is_err());
        let_go(&rig);
        free().unwrap();
        host::set(&host, How::Unlock, Span { start: 0, end: 9 }).unwrap();
        assert_eq!(rig.locks.state().spans, 0);
    }
}

#[test]
fn reader_that_writes_too_keeps_what_it_has() {
    let rig = Rig::new(0);
    let host = rig.host();
    let reader = Wish { handle: 11, ..bytes(1, How::Read, 0, 4) };
    rig.set(&reader).unwrap();
    // That file cannot be written, whatever the guest's kernel thinks.
    assert_eq!(rig.set(&Wish { how: How::Write, ..reader }), Err(libc::EBADF));
    rig.set(&bytes(1, How::Write, 20, 29)).unwrap();
    assert!(host::set(&host, How::Write, Span { start: 0, end: 0 }).is_err());
    assert!(host::set(&host, How::Read, Span { start: 29, end: 29 }).is_err());
    host::set(&host, How::Write, Span { start: 5, end: 19 }).unwrap();
}

#[test]
fn who_waits_for_the_same_guest_comes_in_turn() {
    let rig = Rig::new(0);
    rig.set(&bytes(1, How::Write, 0, 9)).unwrap();
    assert_eq!(rig.wait_for(&bytes(2, How::Read, 0, 0), 2), None);
    assert_eq!(rig.wait_for(&bytes(3, How::Write, 0, 0), 3), None);
    assert_eq!(rig.wait_for(&bytes(4, How::Read, 0, 0), 4), None);
    assert_eq!(rig.settled(), []);
    rig.set(&bytes(1, How::Unlock, 0, 0)).unwrap();
    assert_eq!(rig.settled(), [(2, Ok(())), (4, Ok(()))]);
    rig.locks.closed_by(NODE, 2);
    assert_eq!(rig.settled(), []);
    rig.locks.closed_by(NODE, 4);
    assert_eq!(rig.settled(), [(3, Ok(()))]);

    rig.set(&whole(1, How::Write)).unwrap();
    assert_eq!(rig.wait_for(&whole(2, How::Write), 5), None);
    rig.locks.closed(NODE, 1);
    // As the file server has closed the open file by then.
    rig.files.with(NODE, 1, &mut |file| host::set_whole(file, How::Unlock)).unwrap();
    assert_eq!(rig.settled(), [(5, Ok(()))]);
}

#[test]
fn who_waits_for_the_host_is_told() {
    let rig = Rig::new(2);
    let host = rig.host();
    host::set(&host, How::Write, Span { start: 0, end: 9 }).unwrap();
    host::set_whole(&host, How::Write).unwrap();
    assert_eq!(rig.wait_for(&bytes(1, How::Write, 0, 0), 1), None);
    // Two who want the same share a thread.
    assert_eq!(rig.wait_for(&bytes(2, How::Write, 0, 0), 2), None);
    assert_eq!(rig.wait_for(&whole(1, How::Read), 3), None);
    assert_eq!(rig.wait_for(&bytes(3, How::Write, 5, 5), 4), Some(Err(libc::ENOLCK)), "there are two threads");
    host::set(&host, How::Unlock, Span { start: 0, end: 9 }).unwrap();
    assert_eq!(rig.settled_later(), [(1, Ok(()))]);
    assert!(host::set(&host, How::Read, Span { start: 0, end: 0 }).is_err());
    rig.locks.closed_by(NODE, 1);
    assert_eq!(rig.settled(), [(2, Ok(()))]);
    drop(host);
    assert_eq!(rig.settled_later(), [(3, Ok(()))]);
}

#[test]
fn signal_ends_a_wait_and_its_thread_is_free_again() {
    let rig = Rig::new(1);
    let host = rig.host();
    host::set_whole(&host, How::Write).unwrap();
    host::set(&host, How::Write, Span { start: 0, end: 9 }).unwrap();
    for number in 0..500 {
        let wish = match number % 3 {
            0 => whole(1, How::Read),
            1 => whole(1, How::Write),
            _ => bytes(1, How::Write, 0, 0),
        };
        assert_eq!(rig.wait_for(&wish, number), None);
        // The thread waits, or is on its way there, or has not looked yet.
        match number % 4 {
            0 => std::thread::sleep(std::time::Duration::from_millis(1)),
            1 => std::thread::yield_now(),
            _ => {}
        }
        rig.locks.interrupt(number.into());
        assert_eq!(rig.settled(), [(number, Err(libc::EINTR))]);
        rig.wait_for_a_thread();
        assert_eq!(rig.settled(), []);
    }
}

#[test]
fn who_wants_what_somebody_was_interrupted_at_is_not_interrupted() {
    let rig = Rig::new(1);
    let host = rig.host();
    host::set_whole(&host, How::Write).unwrap();
    for number in (0..200).step_by(2) {
        assert_eq!(rig.wait_for(&whole(1, How::Write), number), None);
        rig.locks.interrupt(number.into());
        assert_eq!(rig.settled(), [(number, Err(libc::EINTR))]);
        // Before the thread is back.
        assert_eq!(rig.wait_for(&whole(2, How::Write), number + 1), None);
        rig.wait_for_a_thread();
        assert_eq!(rig.settled(), []);
        host::set_whole(&host, How::Unlock).unwrap();
        assert_eq!(rig.settled_later(), [(number + 1, Ok(()))]);
        rig.set(&whole(2, How::Unlock)).unwrap();
        assert_eq!(rig.settled(), []);
        host::set_whole(&host, How::Write).unwrap();
    }
}

#[test]
fn hostile_11_interrupts_of_what_does_not_wait_are_few_to_remember() {
    let rig = Rig::new(0);
    for unique in 0..10_000 {
        rig.locks.interrupt(unique);
    }
    assert_eq!(rig.locks.state().early.len(), MAX_EARLY);
    rig.set(&bytes(1, How::Write, 0, 9)).unwrap();
    // One came before its request, as it may: another queue brings it.
    assert_eq!(rig.wait_for(&bytes(2, How::Write, 0, 9), 9_999), Some(Err(libc::EINTR)));
    assert_eq!(rig.wait_for(&bytes(2, How::Write, 0, 9), 9_999), None);
}

#[test]
fn hostile_11_locks_owners_and_waits_are_limited() {
    let rig = Rig::new(0);
    for owner in 0..MAX_OWNERS as u64 {
        rig.set(&bytes(owner, How::Read, 0, 0)).unwrap();
    }
    assert_eq!(rig.set(&bytes(u64::MAX, How::Read, 0, 0)), Err(libc::ENOLCK));
    assert_eq!(rig.wait_for(&bytes(u64::MAX, How::Read, 0, 0), 1), Some(Err(libc::ENOLCK)));
    // Those that are there can have more, up to the limit of that.
    let mut start = 2;
    while rig.set(&bytes(0, How::Read, start, start)) == Ok(()) {
        start += 2;
        assert!(start < 4 * MAX_SPANS as u64);
    }
    assert_eq!(rig.locks.state().spans, MAX_SPANS);
    rig.locks.clear();
    rig.set(&bytes(1, How::Write, 0, Span::LAST)).unwrap();
    for number in 0..u32::try_from(MAX_WAITING).unwrap() {
        assert_eq!(rig.wait_for(&bytes(2, How::Write, 0, 0), number), None);
    }
    assert_eq!(rig.wait_for(&bytes(2, How::Write, 0, 0), u32::MAX), Some(Err(libc::ENOLCK)));
    rig.locks.clear();
    let settled = rig.settled();
    assert_eq!(settled.len(), MAX_WAITING);
    assert!(settled.iter().all(|(_, result)| *result == Err(libc::EINTR)));
}

#[test]
fn two_readers_that_both_want_to_write_are_told() {
    let rig = Rig::new(1);
    let host = rig.host();
    host::set(&host, How::Read, Span { start: 0, end: 9 }).unwrap();
    rig.set(&bytes(1, How::Read, 0, 9)).unwrap();
    assert_eq!(rig.wait_for(&bytes(1, How::Write, 0, 9), 1), Some(Err(libc::EDEADLK)));
    // And keep what they have.
    assert!(host::set(&host, How::Write, Span { start: 0, end: 9 }).is_err());
}

#[test]
fn hostile_11_handles_that_are_not_open_have_no_locks() {
    let rig = Rig::new(1);
    for wish in [bytes(1, How::Write, 0, 9), whole(1, How::Write)] {
        let wish = Wish { handle: 999, ..wish };
        assert_eq!(rig.set(&wish), Err(libc::EBADF));
        assert_eq!(rig.wait_for(&wish, 1), Some(Err(libc::EBADF)));
        assert!(rig.locks.conflict(&rig.files, &Wish { whole: false, ..wish }).is_err());
    }
    assert!(rig.locks.state().owners.is_empty());
}

/// Everything at once, with the host in competition: nobody waits for ever, and nobody has what another has.
#[test]
fn locks_under_contention_exclude_and_are_granted() {
    let rig = Rig::new(4);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _ends = crate::virtio::testing::Ends(&stop);
        scope.spawn(|| {
            let host = rig.host();
            while !stop.load(Ordering::Relaxed) {
                if host::set(&host, How::Write, Span { start: 0, end: 0 }).is_ok() {
                    std::thread::yield_now();
                    host::set(&host, How::Unlock, Span { start: 0, end: 0 }).unwrap();
                }
            }
        });
        for number in 0..300 {
            match rig.wait_for(&bytes(number.into(), How::Write, 0, 0), number) {
                Some(result) => assert_eq!(result, Ok(())),
                None => assert_eq!(rig.settled_later(), [(number, Ok(()))]),
            }
            assert!(host::set(&rig.host(), How::Read, Span { start: 0, end: 0 }).is_err());
            rig.locks.closed_by(NODE, number.into());
            assert_eq!(rig.settled(), []);
        }
    });
}
