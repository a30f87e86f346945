//! Locks as the guest's kernel asks for them.

use std::fs::File;

use rustix::fs::{FlockOperation, flock};

use super::*;

const READ: u32 = 0;
const WRITE: u32 = 1;
const UNLOCK: u32 = 2;
const TO_THE_END: u64 = i64::MAX.cast_unsigned();
const WHOLE: u32 = 1;

/// struct fuse_lk_in.
fn lock(handle: u64, owner: u64, bytes: [u64; 2], kind: u32, flags: u32) -> Vec<u8> {
    let mut body = [handle, owner, bytes[0], bytes[1]].map(u64::to_le_bytes).concat();
    body.extend([kind, 77, flags, 0].map(u32::to_le_bytes).concat());
    body
}

fn release(handle: u64) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0; 16]);
    body
}

/// A guest with its `file` open twice.
fn guest(share: &Path) -> (Guest, u64, [u64; 2]) {
    let mut guest = Guest::new(share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let handles = [(); 2].map(|()| guest.open(node, libc::O_RDWR).unwrap());
    (guest, node, handles)
}

impl Guest {
    /// Sends a request whose reply may come later, to a place of its own.
    fn post(&mut self, opcode: u32, node: u64, body: &[u8], at: u64) -> u16 {
        let len = self.write_request(opcode, node, body);
        let mut message = vec![0; usize::try_from(len).unwrap()];
        self.memory.read_slice(&mut message, GuestAddress(REQUEST)).unwrap();
        self.memory.write_slice(&message, GuestAddress(at)).unwrap();
        let head = self.requests.add(&[(at, len, false), (at + 0x800, 0x100, true)]);
        self.requests.kick();
        head
    }

    /// The next request that is answered, with errno.
    fn answered(&mut self, at: u64) -> (u16, i32) {
        let (head, written) = self.requests.wait_used(&self.interrupt);
        assert_eq!(written, 16);
        (head, -self.memory.read_obj::<i32>(GuestAddress(at + 0x804)).unwrap())
    }

    fn interrupt(&mut self, unique: u64) {
        let len = self.write_request(opcode::INTERRUPT, 0, &unique.to_le_bytes());
        self.hiprio.add(&[(REQUEST, len, false)]);
        self.hiprio.kick();
        self.hiprio.wait_used(&self.interrupt);
    }
}

#[test]
fn guest_may_lock_and_its_locks_are_the_hosts() {
    const POSIX_LOCKS: u32 = 1 << 1;
    const FLOCK_LOCKS: u32 = 1 << 10;
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let reply = guest.init(SUBMOUNTS | POSIX_LOCKS | FLOCK_LOCKS).unwrap();
    let flags = u32::from_le_bytes(reply[12..16].try_into().unwrap());
    assert_eq!(flags & (POSIX_LOCKS | FLOCK_LOCKS), POSIX_LOCKS | FLOCK_LOCKS);

    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    let host = File::open(share.join("file")).unwrap();
    guest.call(opcode::SETLK, node, &lock(handle, 1, [0, TO_THE_END], WRITE, WHOLE)).unwrap();
    assert!(flock(&host, FlockOperation::NonBlockingLockShared).is_err());
    guest.call(opcode::RELEASE, node, &release(handle)).unwrap();
    flock(&host, FlockOperation::NonBlockingLockExclusive).unwrap();
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    let body = lock(handle, 1, [0, TO_THE_END], READ, WHOLE);
    assert_eq!(guest.call(opcode::SETLK, node, &body), Err(libc::EAGAIN));
    // Directories too.
    let opened = u64_at(&guest.call(opcode::OPENDIR, ROOT, &[0; 8]).unwrap(), 0);
    guest.call(opcode::SETLK, ROOT, &lock(opened, 1, [0, TO_THE_END], WRITE, WHOLE)).unwrap();
    let host = File::open(&share).unwrap();
    assert!(flock(&host, FlockOperation::NonBlockingLockShared).is_err());
    // All of them go with the guest, whose thread nobody waits for.
    drop(guest);
    flock(&host, FlockOperation::LockExclusive).unwrap();
}

#[test]
fn locks_that_are_waited_for_are_answered_when_they_are_free_or_interrupted() {
    const FIRST: u64 = 0x50_0000;
    const SECOND: u64 = 0x60_0000;
    let (_dir, share) = share();
    let (mut guest, node, [one, two]) = guest(&share);
    let all = [0, TO_THE_END];
    guest.call(opcode::SETLK, node, &lock(one, 1, all, WRITE, 0)).unwrap();
    let found = guest.call(opcode::GETLK, node, &lock(two, 2, all, READ, 0)).unwrap();
    assert_eq!((u64_at(&found, 0), u64_at(&found, 8), u64_at(&found, 16)), (0, TO_THE_END, 77 << 32 | 1));
    // By another owner, and by the host.
    let first = guest.post(opcode::SETLKW, node, &lock(two, 2, [5, 5], WRITE, 0), FIRST);
    guest.call(opcode::SETLK, node, &lock(one, 1, all, UNLOCK, 0)).unwrap();
    assert_eq!(guest.answered(FIRST), (first, 0));
    let host = File::open(share.join("file")).unwrap();
    flock(&host, FlockOperation::LockExclusive).unwrap();
    let second = guest.post(opcode::SETLKW, node, &lock(one, 3, all, WRITE, WHOLE), SECOND);
    // Others are served meanwhile.
    assert_eq!(guest.read(node, one).unwrap(), b"content");
    drop(host);
    assert_eq!(guest.answered(SECOND), (second, 0));
    // By a signal.
    let second = guest.post(opcode::SETLKW, node, &lock(two, 4, all, WRITE, WHOLE), SECOND);
    guest.lookup(ROOT, "file").unwrap();
    let unique = guest.unique - 1;
    guest.interrupt(unique);
    assert_eq!(guest.answered(SECOND), (second, libc::EINTR));
    // The first close of the file by who has a lock lets go of it.
    let first = guest.post(opcode::SETLKW, node, &lock(one, 5, [0, 9], READ, 0), FIRST);
    let mut flush = two.to_le_bytes().to_vec();
    flush.extend([0; 8]);
    flush.extend(2_u64.to_le_bytes());
    guest.post(opcode::FLUSH, node, &flush, SECOND);
    let answers = [guest.answered(FIRST).0, guest.answered(FIRST).0];
    assert!(answers.contains(&first));
}

#[test]
fn signal_ends_a_wait_for_what_the_host_has_locked() {
    const WAITS: u64 = 0x50_0000;
    let (_dir, share) = share();
    let (mut guest, node, [one, _]) = guest(&share);
    let host = File::options().read(true).write(true).open(share.join("file")).unwrap();
    flock(&host, FlockOperation::LockExclusive).unwrap();
    guest.call(opcode::SETLK, node, &lock(one, 1, [0, 9], WRITE, WHOLE)).unwrap_err();
    for number in 0..20 {
        let kind = if number % 2 == 0 { READ } else { WRITE };
        let waits = guest.post(opcode::SETLKW, node, &lock(one, 1, [0, 9], kind, WHOLE), WAITS);
        let unique = guest.unique;
        // It has been seen already, or may be overtaken.
        if number % 4 < 2 {
            guest.lookup(ROOT, "file").unwrap();
        }
        guest.interrupt(unique);
        assert_eq!(guest.answered(WAITS), (waits, libc::EINTR));
    }
    drop(host);
    guest.call(opcode::SETLKW, node, &lock(one, 1, [0, 9], WRITE, WHOLE)).unwrap();
}

#[test]
fn hostile_11_locks_of_what_is_not_and_nonsense_are_refused() {
    let (_dir, share) = share();
    let (mut guest, node, [one, _]) = guest(&share);
    for opcode in [opcode::GETLK, opcode::SETLK, opcode::SETLKW] {
        for bytes in [[1, 0], [0, u64::MAX], [u64::MAX, u64::MAX], [TO_THE_END + 1, TO_THE_END + 2]] {
            assert_eq!(guest.call(opcode, node, &lock(one, 1, bytes, WRITE, 0)), Err(libc::EINVAL), "{bytes:?}");
        }
        for kind in [3, u32::MAX] {
            assert_eq!(guest.call(opcode, node, &lock(one, 1, [0, 9], kind, 0)), Err(libc::EINVAL), "{kind}");
        }
        for (node, handle) in [(node, 999), (node, u64::MAX), (ROOT, one), (999, one), (0, 0)] {
            for flags in [0, WHOLE] {
                let body = lock(handle, 1, [0, 9], WRITE, flags);
                assert_eq!(guest.call(opcode, node, &body), Err(libc::EBADF), "{opcode} {node} {handle}");
            }
        }
    }
    for unique in [0, 1, u64::MAX] {
        guest.interrupt(unique);
    }
    // A queue whose requests have no reply has no locks.
    let len = guest.write_request(opcode::SETLKW, node, &lock(one, 1, [0, 9], WRITE, 0));
    guest.hiprio.add(&[(REQUEST, len, false)]);
    guest.hiprio.kick();
    guest.hiprio.wait_used(&guest.interrupt);
    assert_eq!(guest.read(node, one).unwrap(), b"content");
    guest.call(opcode::SETLK, node, &lock(one, 2, [0, 9], WRITE, 0)).unwrap();
}

#[test]
fn hostile_11_requests_that_wait_end_with_a_reset_or_a_new_beginning() {
    let (_dir, share) = share();
    let (mut guest, node, [one, two]) = guest(&share);
    let all = [0, TO_THE_END];
    guest.call(opcode::SETLK, node, &lock(one, 1, all, WRITE, 0)).unwrap();
    for at in [0x50_0000, 0x60_0000] {
        guest.post(opcode::SETLKW, node, &lock(two, 2, all, WRITE, 0), at);
    }
    guest.restart();
    let node = guest.lookup(ROOT, "file").unwrap();
    let [one, two] = [(); 2].map(|()| guest.open(node, libc::O_RDWR).unwrap());
    guest.call(opcode::SETLK, node, &lock(one, 1, all, WRITE, 0)).unwrap();
    let waits = guest.post(opcode::SETLKW, node, &lock(two, 2, all, WRITE, 0), 0x50_0000);
    guest.post(opcode::INIT, 0, &words(&[7, 38, 0, SUBMOUNTS], &[]), 0x60_0000);
    let heads = [(); 2].map(|()| guest.requests.wait_used(&guest.interrupt).0);
    assert!(heads.contains(&waits), "{heads:?}");
    guest.lookup(ROOT, "file").unwrap();
}
