mod attributes;
mod hostile;
mod locks;
mod private;

use std::ffi::CString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::Arc;

use bulkhead_protocol::vmspec::{IdMap, IdMaps};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::Fs;
use crate::memory::Memory;
use crate::virtio::VirtioDevice;
use crate::virtio::counts::Counts;
use crate::virtio::testing::{DriverQueue, TestInterrupt, activation, memory, wait_stopped};

/// Opcodes of fuse.h.
mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const FLUSH: u32 = 25;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const GETLK: u32 = 31;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const READDIRPLUS: u32 = 44;
    pub const TMPFILE: u32 = 51;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
}

const ROOT: u64 = 1;
const SUBMOUNTS: u32 = 1 << 27;
const REQUEST: u64 = 0x10_0000;
const FORGOTTEN: u64 = 0x20_0000;
const REPLY: u64 = 0x30_0000;

/// A guest that speaks FUSE.
struct Guest {
    memory: Memory,
    interrupt: Arc<TestInterrupt>,
    hiprio: DriverQueue,
    requests: DriverQueue,
    device: Fs,
    counts: Arc<Counts>,
    unique: u64,
}

impl Guest {
    fn new(root: &Path) -> Self {
        Self::of(fs::File::open(root).unwrap().into())
    }

    fn of(root: OwnedFd) -> Self {
        Self::with_ids(root, &IdMaps::default())
    }

    fn with_ids(root: OwnedFd, ids: &IdMaps) -> Self {
        let memory = memory();
        let mut guest = Self {
            hiprio: DriverQueue::new(&memory, 0x1_0000, 16),
            requests: DriverQueue::new(&memory, 0x2_0000, 16).with_event_idx(),
            interrupt: Arc::default(),
            memory,
            device: Fs::new("share", root, ids, true).unwrap(),
            counts: Arc::default(),
            unique: 0,
        };
        guest.start();
        guest
    }

    fn start(&mut self) {
        let activation = activation(&self.memory, 0, &[&self.hiprio, &self.requests], &self.interrupt);
        self.counts = Arc::clone(&activation.counts);
        self.device.activate(activation).unwrap();
        self.init(SUBMOUNTS).unwrap();
    }

    fn restart(&mut self) {
        self.device.reset();
        wait_stopped(&self.device);
        self.hiprio = DriverQueue::new(&self.memory, 0x1_0000, 16);
        self.requests = DriverQueue::new(&self.memory, 0x2_0000, 16);
        self.start();
    }

    fn init(&mut self, flags: u32) -> Result<Vec<u8>, i32> {
        let mut body = Vec::new();
        for word in [7, 38, 0, flags] {
            body.extend(u32::to_le_bytes(word));
        }
        self.call(opcode::INIT, 0, &body)
    }

    fn write_request(&mut self, opcode: u32, node: u64, body: &[u8]) -> u32 {
        self.unique += 1;
        let len = u32::try_from(40 + body.len()).unwrap();
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(self.unique.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]); // uid, gid, pid, extensions
        bytes.extend(body);
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        len
    }

    /// One request; the reply's body, or errno.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let len = self.write_request(opcode, node, body);
        self.requests.add(&[(REQUEST, len, false), (REPLY, 0x2_0000, true)]);
        self.requests.kick();
        let (_, written) = self.requests.wait_used(&self.interrupt);
        assert!(written >= 16, "no reply to opcode {opcode}");
        let mut reply = vec![0; usize::try_from(written).unwrap()];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        let (unique, error) = (u64_at(&reply, 8), i32::from_le_bytes(reply[4..8].try_into().unwrap()));
        assert_eq!(unique, self.unique);
        if error == 0 { Ok(reply.split_off(16)) } else { Err(-error) }
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.call(opcode::LOOKUP, parent, &cstr(name)).map(|entry| u64_at(&entry, 0))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let mut body = flags.to_le_bytes().to_vec();
        body.extend([0; 4]);
        self.call(opcode::OPEN, node, &body).map(|open| u64_at(&open, 0))
    }

    fn read(&mut self, node: u64, handle: u64) -> Result<Vec<u8>, i32> {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(0_u64.to_le_bytes());
        body.extend(0x1000_u32.to_le_bytes());
        body.extend([0; 20]);
        self.call(opcode::READ, node, &body)
    }

    /// struct fuse_entry_out and struct fuse_open_out.
    fn create_with(&mut self, name: &str, flags: i32) -> Result<Vec<u8>, i32> {
        let body = words(&[flags.cast_unsigned(), 0o100_644, 0, 0], &[name]);
        self.call(opcode::CREATE, ROOT, &body)
    }

    fn forget(&mut self, node: u64, count: u64) {
        let len = self.write_request(opcode::FORGET, node, &count.to_le_bytes());
        self.hiprio.add(&[(REQUEST, len, false)]);
        self.hiprio.kick();
        self.hiprio.wait_used(&self.interrupt);
    }

    fn create(&mut self, name: &str) -> Result<(u64, u64), i32> {
        let reply = self.create_with(name, libc::O_RDWR)?;
        Ok((u64_at(&reply, 0), u64_at(&reply, 128)))
    }
}

fn cstr(name: &str) -> Vec<u8> {
    CString::new(name).unwrap().into_bytes_with_nul()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn words(words: &[u32], names: &[&str]) -> Vec<u8> {
    let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    names.iter().for_each(|name| body.extend(cstr(name)));
    body
}

/// A share, and a file beside it that nobody may reach.
fn share() -> (TempDir, std::path::PathBuf) {
    let dir = TempDir::new().unwrap();
    let share = dir.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(dir.path().join("secret"), "host").unwrap();
    fs::write(share.join("file"), "content").unwrap();
    (dir, share)
}

#[test]
fn file_is_looked_up_read_and_written() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let attr = guest.call(opcode::GETATTR, node, &[0; 16]).unwrap();
    assert_eq!(u64_at(&attr, 16), fs::metadata(share.join("file")).unwrap().ino());
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle).unwrap(), b"content");

    let (node, handle) = guest.create("new").unwrap();
    let mut body = handle.to_le_bytes().to_vec();
    body.extend([0; 8]);
    body.extend(3_u32.to_le_bytes());
    body.extend([0; 20]);
    body.extend(b"abc");
    guest.call(opcode::WRITE, node, &body).unwrap();
    assert_eq!(fs::read(share.join("new")).unwrap(), b"abc");
    assert_eq!(guest.lookup(ROOT, "missing"), Err(libc::ENOENT));
}

/// As of a pod whose files are kept by the ids that its user namespace has on the host.
#[test]
fn owners_that_have_other_ids_in_the_guest_are_mapped_both_ways() {
    let (_dir, share) = share();
    let (host, group) = (100_000, 200_000);
    std::os::unix::fs::chown(share.join("file"), Some(host + 7), Some(group)).unwrap();
    let map = |host| vec![IdMap { guest: 0, host, count: 65536 }];
    let ids = IdMaps { uids: map(host), gids: map(group) };
    let mut guest = Guest::with_ids(fs::File::open(&share).unwrap().into(), &ids);
    let mut owner = |name: &str| {
        let node = guest.lookup(ROOT, name).unwrap();
        let attr = guest.call(opcode::GETATTR, node, &[0; 16]).unwrap();
        u64_at(&attr, 84)
    };
    assert_eq!(owner("file"), 7);
    fs::write(share.join("unmapped"), "").unwrap();
    assert_eq!(owner("unmapped"), 0, "what has none of these ids is as it is");
    guest.create("new").unwrap();
    let new = fs::metadata(share.join("new")).unwrap();
    assert_eq!((new.uid(), new.gid()), (host, group));
}

/// FOPEN_* of the second open of a file, in the reply behind the handle.
#[test]
fn opens_say_what_the_guest_may_leave_out() {
    const KEEP_CACHE: u8 = 2;
    const NOFLUSH: u8 = 1 << 5;
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let mut open = |flags: i32| {
        let body = [flags.to_le_bytes(), [0; 4]].concat();
        guest.call(opcode::OPEN, node, &body).unwrap()[8]
    };
    assert_eq!(open(libc::O_RDONLY) & (KEEP_CACHE | NOFLUSH), NOFLUSH);
    assert_eq!(open(libc::O_RDONLY) & (KEEP_CACHE | NOFLUSH), KEEP_CACHE | NOFLUSH);
    assert_eq!(open(libc::O_RDWR) & KEEP_CACHE, KEEP_CACHE);
    let changed = || fs::metadata(share.join("file")).map(|file| (file.ctime(), file.ctime_nsec())).unwrap();
    let before = changed();
    // Until the clock has gone on.
    while changed() == before {
        fs::write(share.join("file"), "changed").unwrap();
    }
    assert_eq!(open(libc::O_RDWR) & KEEP_CACHE, 0);
}

#[test]
fn file_that_was_open_to_be_written_is_flushed_where_its_file_system_may_want_that() {
    const NOFLUSH: u8 = 1 << 5;
    let open = |share: &Path, name: &str| {
        let mut guest = Guest::new(share);
        let node = guest.lookup(ROOT, name).unwrap();
        let body = [libc::O_RDWR.to_le_bytes(), [0; 4]].concat();
        guest.call(opcode::OPEN, node, &body).unwrap()[8] & NOFLUSH
    };
    let memory = TempDir::new_in("/dev/shm").unwrap();
    fs::write(memory.path().join("file"), "").unwrap();
    assert_eq!(open(memory.path(), "file"), NOFLUSH);
    let mut guest = Guest::new(memory.path());
    assert_eq!(guest.create_with("new", libc::O_RDWR).unwrap()[136] & NOFLUSH, NOFLUSH);
    assert_eq!(open(Path::new("/proc/sys/vm"), "swappiness"), 0);
}

#[test]
fn hosts_change_is_seen_by_the_next_open() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    fs::write(share.join("tmp"), "swapped").unwrap();
    fs::rename(share.join("tmp"), share.join("file")).unwrap();
    let swapped = guest.lookup(ROOT, "file").unwrap();
    assert_ne!(node, swapped);
    let handle = guest.open(swapped, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(swapped, handle).unwrap(), b"swapped");
}

#[test]
fn hostile_11_names_that_lead_out_of_the_share_are_refused() {
    let (dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let outside = dir.path().join("new").to_str().unwrap().to_owned();
    for bad in ["..", ".", "../secret", "a/b", "/", &outside, "../new"] {
        let bad: &str = bad;
        assert_eq!(guest.lookup(ROOT, bad), Err(libc::EINVAL), "lookup {bad}");
        assert_eq!(guest.create(bad).unwrap_err(), libc::EINVAL, "create {bad}");
        for (opcode, body) in [
            (opcode::SYMLINK, words(&[], &[bad, "target"])),
            (opcode::MKDIR, words(&[0o755, 0], &[bad])),
            (opcode::MKNOD, words(&[libc::S_IFREG | 0o644, 0, 0, 0], &[bad])),
            (opcode::UNLINK, words(&[], &[bad])),
            (opcode::RENAME, words(&[1, 0], &[bad, "x"])),
            (opcode::RENAME, words(&[1, 0], &["file", bad])),
            (opcode::LINK, words(&[u32::try_from(node).unwrap(), 0], &[bad])),
        ] {
            assert_eq!(guest.call(opcode, ROOT, &body), Err(libc::EINVAL), "opcode {opcode} {bad}");
        }
    }
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["secret", "share"]);
}

#[test]
fn hostile_11_symlink_of_the_share_is_not_followed_by_the_host() {
    let (dir, share) = share();
    symlink(dir.path().join("secret"), share.join("link")).unwrap();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "link").unwrap();
    assert!(guest.open(node, libc::O_RDONLY).is_err());
}

#[test]
fn hostile_11_device_nodes_and_security_labels_are_refused() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        let body = words(&[kind | 0o666, 0x103, 0, 0], &["null"]);
        assert_eq!(guest.call(opcode::MKNOD, ROOT, &body), Err(libc::EPERM));
    }
    assert_eq!(guest.call(opcode::MKNOD, ROOT, &words(&[libc::S_IFBLK | 0o666, 0, 0, 0], &["b"])), Err(libc::EPERM));
    let node = guest.lookup(ROOT, "file").unwrap();
    let body = words(&[1, 0], &["security.selinux", ""]);
    assert_eq!(guest.call(opcode::SETXATTR, node, &body), Err(libc::EOPNOTSUPP));
}

#[test]
fn hostile_11_malformed_messages_leave_the_server_running() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    for room in [0, 1, 15] {
        for opcode in [opcode::READ, opcode::READDIRPLUS, opcode::LOOKUP, opcode::TMPFILE, 9999] {
            let len = guest.write_request(opcode, node, &[&handle.to_le_bytes()[..], &[0; 32]].concat());
            guest.requests.add(&[(REQUEST, len, false), (REPLY, room, true)]);
            guest.requests.kick();
            assert_eq!(guest.requests.wait_used(&guest.interrupt).1, 0);
        }
    }
    // Too short for its header, no header at all, outside of memory, length larger than the chain.
    for request in [(REQUEST, 39, false), (REQUEST, 0, false), (u64::MAX - 4, 40, false)] {
        guest.requests.add(&[request, (REPLY, 0x1000, true)]);
        guest.requests.kick();
        assert_eq!(guest.requests.wait_used(&guest.interrupt).1, 0);
    }
    guest.write_request(opcode::LOOKUP, ROOT, &cstr("file"));
    guest.memory.write_obj(u32::MAX, GuestAddress(REQUEST)).unwrap();
    guest.requests.add(&[(REQUEST, 45, false), (REPLY, 0x1000, true)]);
    guest.requests.kick();
    guest.requests.wait_used(&guest.interrupt);
    assert_eq!(guest.read(node, handle).unwrap(), b"content");
}

#[test]
fn hostile_11_forgetting_more_than_was_looked_up_is_harmless() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    for forgotten in [node, node, 999, ROOT] {
        guest.forget(forgotten, u64::MAX);
    }
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EBADF));
    guest.init(SUBMOUNTS).unwrap();
    guest.lookup(ROOT, "file").unwrap();
}

/// The guest's kernel kicks once for many.
#[test]
fn what_is_forgotten_without_a_kick_is_forgotten_before_the_next_request() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let len = guest.write_request(opcode::FORGET, node, &1_u64.to_le_bytes());
    let mut message = vec![0; usize::try_from(len).unwrap()];
    guest.memory.read_slice(&mut message, GuestAddress(REQUEST)).unwrap();
    guest.memory.write_slice(&message, GuestAddress(FORGOTTEN)).unwrap();
    guest.hiprio.add(&[(FORGOTTEN, len, false)]);
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::EBADF));
    guest.hiprio.wait_used(&guest.interrupt);
}

#[test]
fn hostile_11_open_files_of_the_guest_are_limited() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    guest.device.guest_fds = 8;
    guest.restart();
    let node = guest.lookup(ROOT, "file").unwrap();
    let handles: Vec<u64> = (0..6).map(|_| guest.open(node, libc::O_RDONLY).unwrap()).collect();
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ENFILE));
    assert_eq!(guest.create("new").unwrap_err(), libc::ENFILE);
    let mut body = handles[0].to_le_bytes().to_vec();
    body.extend([0; 16]);
    guest.call(opcode::RELEASE, node, &body).unwrap();
    guest.open(node, libc::O_RDONLY).unwrap();
}

#[test]
fn requests_are_counted_by_kind_with_their_bytes() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    guest.read(node, handle).unwrap();
    let counted = guest.counts.told(0, 26);
    let of = |kind| {
        let requests = counted.requests.iter().find(|requests| requests.kind == kind).unwrap();
        (requests.count, requests.received, requests.replied)
    };
    assert_eq!(of(opcode::READ), (1, 40 + 40, 16 + 7));
    assert_eq!([of(opcode::INIT).0, of(opcode::LOOKUP).0, of(opcode::OPEN).0], [1, 1, 1]);
    // How many of each is a matter of who is faster.
    assert!(counted.kicks > 0 && counted.interrupts > 0);
}

#[test]
fn init_without_submounts_is_refused() {
    let (_dir, share) = share();
    assert_eq!(Guest::new(&share).init(0), Err(libc::EPROTO));
}

#[test]
fn hostile_07_broken_ring_asks_for_a_reset_and_the_device_survives_it() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    guest.requests.set_avail(1000);
    guest.requests.kick();
    guest.interrupt.wait_reset();
    guest.restart();
    guest.lookup(ROOT, "file").unwrap();
}

#[test]
fn server_leaves_the_processs_working_directory_alone() {
    let before = std::env::current_dir().unwrap();
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    guest.lookup(ROOT, "file").unwrap();
    assert_eq!(std::env::current_dir().unwrap(), before);
}

#[test]
fn tags_are_checked() {
    let root = || fs::File::open("/").unwrap().into();
    assert!(Fs::new("", root(), &IdMaps::default(), true).is_err());
    assert!(Fs::new(&"x".repeat(37), root(), &IdMaps::default(), true).is_err());
    let device = Fs::new(&"x".repeat(36), root(), &IdMaps::default(), true).unwrap();
    let mut config = [0; 44];
    device.read_config(0, &mut config);
    assert_eq!((config[35], &config[36..44]), (b'x', &[1, 0, 0, 0, 0, 0, 0, 0][..]));
    device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 44]);
    assert!(Fs::new("x", fs::File::open("/proc/version").unwrap().into(), &IdMaps::default(), true).is_err());
}
