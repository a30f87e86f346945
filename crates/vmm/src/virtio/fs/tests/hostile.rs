//! What a guest's kernel would never ask.

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_remount};
use rustix::thread::UnshareFlags;

use super::*;
use crate::virtio::ring::MAX_DESCRIPTORS;
use crate::virtio::testing::{Ends, INDIRECT, NEXT, WRITE};

/// struct fuse_write_in and data.
fn write_request(handle: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(offset.to_le_bytes());
    body.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    body.extend([0; 20]);
    body.extend(data);
    body
}

/// struct fuse_setattr_in that sets the size to 0.
fn truncation() -> Vec<u8> {
    const FATTR_SIZE: u32 = 1 << 3;
    let mut body = words(&[FATTR_SIZE, 0], &[]);
    body.resize(88, 0);
    body
}

/// struct fuse_read_in.
fn read_request(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(offset.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.extend([0; 20]);
    body
}

#[test]
fn hostile_11_directory_is_not_searched_for_an_offset_in_small_pieces() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let handle = u64_at(&guest.call(opcode::OPENDIR, ROOT, &[0; 8]).unwrap(), 0);
    let most = i64::MAX.unsigned_abs();
    for opcode in [opcode::READDIR, opcode::READDIRPLUS] {
        let mut read = |offset, size| guest.call(opcode, ROOT, &read_request(handle, offset, size));
        for (offset, size) in [(most + 1, 4095), (u64::MAX, 1), (u64::MAX, 280)] {
            assert_eq!(read(offset, size), Err(libc::EINVAL), "{offset:#x} {size}");
        }
        // What is no entry's is searched for, and not found.
        assert_eq!(read(most + 1, 4096), Ok(vec![]));
        assert_eq!(read(u64::MAX, 0x8000), Ok(vec![]));
        assert!(!read(0, 512).unwrap().is_empty());
    }
}

#[test]
fn hostile_11_renames_with_flags_do_not_leave_the_share_either() {
    let (dir, share) = share();
    let mut guest = Guest::new(&share);
    fs::write(share.join("other"), "x").unwrap();
    let absolute = dir.path().join("secret").to_str().unwrap().to_owned();
    for flags in [0, 1, 2, 4, u32::MAX] {
        for bad in ["../secret", "..", "a/b", "/", absolute.as_str()] {
            for names in [["file", bad], [bad, "file"]] {
                let body = words(&[1, 0, flags, 0], &names);
                assert_eq!(guest.call(opcode::RENAME2, ROOT, &body), Err(libc::EINVAL), "{flags:#x} {names:?}");
            }
        }
    }
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"host");
    assert_eq!(fs::read(share.join("file")).unwrap(), b"content");
}

/// What is beside a container's upper and work directory is containerd's: an image that is planted there would be mounted on the
/// node when the snapshot is committed.
#[test]
fn hostile_11_directory_of_a_snapshot_shows_two_names_and_is_changed_by_nobody() {
    let (_dir, share) = share();
    let window = share.join(".bulkhead-upper");
    for name in ["fs", "work"] {
        fs::create_dir_all(window.join(name)).unwrap();
    }
    fs::write(window.join("layer.erofs"), "image").unwrap();
    let mut guest = Guest::new(&share);
    let other = guest.lookup(ROOT, "file").unwrap();
    let node = guest.lookup(ROOT, ".bulkhead-upper").unwrap();
    // It is held twice, and then once.
    assert_eq!(guest.lookup(ROOT, ".bulkhead-upper").unwrap(), node);
    guest.forget(node, 1);
    let (low, file) = (u32::try_from(node).unwrap(), u32::try_from(other).unwrap());
    for name in ["layer.erofs", "fsmeta.erofs", ".erofslayer", "new"] {
        assert_eq!(guest.lookup(node, name), Err(libc::ENOENT), "{name}");
        for (opcode, node, body) in [
            (opcode::MKNOD, node, words(&[libc::S_IFREG | 0o600, 0, 0, 0], &[name])),
            (opcode::MKDIR, node, words(&[0o700, 0], &[name])),
            (opcode::SYMLINK, node, words(&[], &[name, "/etc/passwd"])),
            (opcode::LINK, node, words(&[file, 0], &[name])),
            (opcode::UNLINK, node, words(&[], &[name])),
            (opcode::RENAME, node, words(&[1, 0], &[name, "taken"])),
            (opcode::RENAME, ROOT, words(&[low, 0], &["file", name])),
            (opcode::RENAME2, ROOT, words(&[low, 0, 2, 0], &["file", name])),
            (opcode::CREATE, node, words(&[2, 0o100_644, 0, 0], &[name])),
        ] {
            assert_eq!(guest.call(opcode, node, &body), Err(libc::EPERM), "{opcode} {name}");
        }
    }
    for (opcode, body) in [
        (opcode::RENAME, words(&[1, 0], &["fs", "moved"])),
        (opcode::RMDIR, words(&[], &["work"])),
        (opcode::OPENDIR, vec![0; 8]),
        (opcode::SETATTR, truncation()),
        (opcode::SETXATTR, words(&[1, 0], &["user.x", ""])),
        (opcode::REMOVEXATTR, words(&[], &["user.x"])),
    ] {
        assert_eq!(guest.call(opcode, node, &body), Err(libc::EPERM), "{opcode}");
    }
    assert_eq!(fs::read(window.join("layer.erofs")).unwrap(), b"image");
    assert_eq!(fs::read_dir(&window).unwrap().count(), 3);
    assert!(share.join("file").exists());
    // In the two it makes what it likes, and renames it from one to the other.
    let (files, work) = (guest.lookup(node, "fs").unwrap(), guest.lookup(node, "work").unwrap());
    guest.call(opcode::MKDIR, work, &words(&[0o700, 0], &["new"])).unwrap();
    let to = u32::try_from(files).unwrap();
    guest.call(opcode::RENAME, work, &words(&[to, 0], &["new", "new"])).unwrap();
    assert!(window.join("fs/new").is_dir());
    guest.forget(node, 1);
    assert_eq!(guest.call(opcode::GETATTR, node, &[0; 16]), Err(libc::EBADF), "it is forgotten with the last look-up");
}

/// CVE-2026-47243, CVE-2026-41326: a link may say what it likes, the host does not go where it says.
#[test]
fn hostile_11_symlink_of_the_guest_leads_the_host_nowhere() {
    let (dir, share) = share();
    let mut guest = Guest::new(&share);
    let secret = dir.path().join("secret");
    for (name, target) in [("absolute", secret.to_str().unwrap()), ("relative", "../secret"), ("up", "..")] {
        guest.call(opcode::SYMLINK, ROOT, &words(&[], &[name, target])).unwrap();
        let node = guest.lookup(ROOT, name).unwrap();
        assert_eq!(guest.call(opcode::READLINK, node, &[]).unwrap(), target.as_bytes());
        assert!(guest.open(node, libc::O_RDONLY).is_err(), "{name}");
        assert!(guest.open(node, libc::O_RDWR | libc::O_TRUNC).is_err(), "{name}");
        assert!(guest.call(opcode::SETATTR, node, &truncation()).is_err(), "{name}");
        // Nor below it, nor by making a file of its name.
        assert!(guest.lookup(node, "secret").is_err(), "{name}");
        assert!(guest.create(name).is_err() || fs::symlink_metadata(share.join(name)).unwrap().is_symlink());
        // A hard link is one to the link itself.
        let body = words(&[u32::try_from(node).unwrap(), 0], &[&format!("{name}-2")]);
        guest.call(opcode::LINK, ROOT, &body).unwrap();
        assert!(fs::symlink_metadata(share.join(format!("{name}-2"))).unwrap().is_symlink());
    }
    assert_eq!(fs::read(&secret).unwrap(), b"host");
}

/// Opening one could block the server for ever, or reach a device of the host.
#[test]
fn hostile_11_fifos_sockets_and_devices_of_the_share_are_not_opened() {
    let (_dir, share) = share();
    mknodat(CWD, share.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _socket = UnixListener::bind(share.join("socket")).unwrap();
    // The device 0:0, which overlayfs uses for what is gone; a real one takes a privilege to make.
    mknodat(CWD, share.join("whiteout"), FileType::CharacterDevice, Mode::RWXU, 0).unwrap();
    let mut guest = Guest::new(&share);
    for name in ["fifo", "socket", "whiteout"] {
        let node = guest.lookup(ROOT, name).unwrap();
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
            assert!(guest.open(node, flags).is_err(), "{name}");
        }
    }
    guest.lookup(ROOT, "file").unwrap();
}

#[test]
fn hostile_11_inodes_that_the_guest_knows_are_limited() {
    let (_dir, share) = share();
    for i in 0..20 {
        fs::write(share.join(i.to_string()), "").unwrap();
    }
    let mut guest = Guest::new(&share);
    guest.device.guest_fds = 8;
    guest.restart();
    let known: Vec<_> = (0..20).map(|i| guest.lookup(ROOT, &i.to_string())).collect();
    assert_eq!(known.iter().filter(|node| node.is_ok()).count(), 7, "and the root");
    assert_eq!(known[19], Err(libc::ENFILE));
    // What it forgets makes room.
    let len = guest.write_request(opcode::FORGET, known[0].unwrap(), &1_u64.to_le_bytes());
    guest.hiprio.add(&[(REQUEST, len, false)]);
    guest.hiprio.kick();
    guest.hiprio.wait_used(&guest.interrupt);
    guest.lookup(ROOT, "19").unwrap();
}

#[test]
fn hostile_11_nodes_and_handles_that_were_not_given_are_refused() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    for wrong in [0, node + 1, node + 1000, u64::MAX] {
        assert!(guest.lookup(wrong, "file").is_err(), "{wrong}");
        assert!(guest.open(wrong, libc::O_RDONLY).is_err(), "{wrong}");
    }
    for wrong in [handle + 1, handle + 1000, u64::MAX] {
        assert_eq!(guest.read(node, wrong), Err(libc::EBADF));
        assert_eq!(guest.call(opcode::WRITE, node, &write_request(wrong, 0, b"x")), Err(libc::EBADF));
    }
    // A handle belongs to its file.
    let other = guest.create("other").unwrap().0;
    assert_eq!(guest.read(other, handle), Err(libc::EBADF));
}

#[test]
fn hostile_11_sizes_and_offsets_beyond_any_file_are_errors() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let (node, handle) = guest.create("new").unwrap();
    for offset in [i64::MAX.unsigned_abs(), u64::MAX, 1 << 63] {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(0x1000_u32.to_le_bytes());
        body.extend([0; 20]);
        assert_eq!(guest.call(opcode::READ, node, &body), Err(libc::EINVAL), "{offset:#x}");
        assert!(guest.call(opcode::WRITE, node, &write_request(handle, offset, b"x")).is_err(), "{offset:#x}");
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(offset.to_le_bytes());
        body.extend(offset.to_le_bytes());
        body.extend([0; 8]);
        assert!(guest.call(opcode::FALLOCATE, node, &body).is_err(), "{offset:#x}");
    }
    // A write that claims more data than there is.
    let mut body = write_request(handle, 0, b"abc");
    body[16..20].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    let _ = guest.call(opcode::WRITE, node, &body);
    assert!(fs::metadata(share.join("new")).unwrap().len() <= 3);
}

/// CVE-2026-46695. Needs the right to mount, as the shim has it.
#[test]
#[allow(unsafe_code)] // unshare(2)
fn hostile_11_read_only_mount_of_the_host_takes_no_writes_whatever_the_guest_says() {
    let (_dir, share) = share();
    let export = share.clone();
    // In a mount namespace of its own, which the descriptor keeps.
    let root = std::thread::spawn(move || {
        // SAFETY: this thread shares nothing with the others of which a mount namespace is a part.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS) }
            .expect("cannot make a mount namespace; run as root");
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        mount_bind(&export, &export).unwrap();
        mount_remount(&export, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
        OwnedFd::from(fs::File::open(&export).unwrap())
    });
    let mut guest = Guest::of(root.join().unwrap());
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle).unwrap(), b"content");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC, libc::O_WRONLY | libc::O_APPEND] {
        assert_eq!(guest.open(node, flags), Err(libc::EROFS));
    }
    assert!(guest.call(opcode::WRITE, node, &write_request(handle, 0, b"x")).is_err());
    assert_eq!(guest.create("new").unwrap_err(), libc::EROFS);
    let name = u32::try_from(node).unwrap();
    for (opcode, of, body) in [
        (opcode::SETATTR, node, truncation()),
        (opcode::SYMLINK, ROOT, words(&[], &["new", "target"])),
        (opcode::MKDIR, ROOT, words(&[0o755, 0], &["new"])),
        (opcode::MKNOD, ROOT, words(&[libc::S_IFREG | 0o644, 0, 0, 0], &["new"])),
        (opcode::UNLINK, ROOT, words(&[], &["file"])),
        (opcode::RENAME, ROOT, words(&[1, 0], &["file", "new"])),
        (opcode::LINK, ROOT, words(&[name, 0], &["new"])),
        (opcode::SETXATTR, node, words(&[1, 0], &["user.x", ""])),
    ] {
        assert_eq!(guest.call(opcode, of, &body), Err(libc::EROFS), "opcode {opcode}");
    }
    assert_eq!(fs::read(share.join("file")).unwrap(), b"content");
    assert_eq!(fs::read_dir(&share).unwrap().count(), 1);
}

/// There is no window of shared memory, so no file of the host is ever mapped: nothing can raise SIGBUS.
#[test]
fn hostile_11_dax_is_not_offered_and_mappings_are_refused() {
    const MAP_ALIGNMENT: u64 = 1 << 26;
    const HAS_INODE_DAX: u64 = 1 << 33;
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let mut body = words(&[7, 38, 0, u32::MAX, u32::MAX], &[]);
    body.resize(64, 0);
    let reply = guest.call(opcode::INIT, 0, &body).unwrap();
    let word = |at: usize| u64::from(u32::from_le_bytes(reply[at..at + 4].try_into().unwrap()));
    assert_eq!((word(12) | word(32) << 32) & (MAP_ALIGNMENT | HAS_INODE_DAX), 0);
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    // struct fuse_setupmapping_in: handle, file offset, length, flags, offset in the window.
    for (file, len, window) in [(0, 4096, 0), (1 << 40, 1 << 40, 0), (0, u64::MAX, u64::MAX)] {
        let body = [handle, file, len, 3, window].map(u64::to_le_bytes).concat();
        assert_eq!(guest.call(opcode::SETUPMAPPING, node, &body), Err(libc::ENOSYS));
        let body = [1, window, len].map(u64::to_le_bytes).concat();
        assert_eq!(guest.call(opcode::REMOVEMAPPING, node, &body), Err(libc::ENOSYS));
    }
}

#[test]
fn hostile_11_file_that_is_truncated_while_it_is_read_gives_less() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    let (file, stop) = (fs::File::options().write(true).open(share.join("file")).unwrap(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                file.set_len(0).unwrap();
                file.set_len(4096).unwrap();
            }
        });
        for _ in 0..500 {
            assert!(guest.read(node, handle).unwrap().len() <= 4096);
        }
    });
    file.set_len(0).unwrap();
    assert_eq!(guest.read(node, handle).unwrap(), b"");
}

#[test]
fn hostile_05_chain_of_more_descriptors_than_are_looked_at_is_given_back_unserved() {
    const TABLE: u64 = 0x50_0000;
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let most = u16::try_from(MAX_DESCRIPTORS).unwrap();
    for (count, served) in [(most, true), (most + 1, false), (u16::MAX, false), (most, true)] {
        let len = guest.write_request(opcode::GETATTR, ROOT, &[0; 16]);
        let table = DriverQueue::new(&guest.memory, TABLE, 16);
        table.descriptor(0, REQUEST, len, NEXT, 1);
        for index in 1..count {
            let more = if index + 1 < count { NEXT } else { 0 };
            table.descriptor(index, REPLY, if index == 1 { 0x100 } else { 1 }, WRITE | more, index + 1);
        }
        let head = guest.requests.add(&[(TABLE, 0, false)]);
        guest.requests.descriptor(head, TABLE, u32::from(count) * 16, INDIRECT, 0);
        guest.requests.kick();
        let (_, written) = guest.requests.wait_used(&guest.interrupt);
        assert_eq!(written > 16, served, "{count} descriptors: {written}");
    }
}

/// Another vCPU rewrites the name while the server looks at it: what was checked is what is used.
#[test]
fn hostile_06_name_that_changes_all_the_time_never_leads_out_of_the_share() {
    const NAME: GuestAddress = GuestAddress(REQUEST + 40);
    let (dir, share) = share();
    fs::rename(share.join("file"), share.join("aaaaaaaaa")).unwrap();
    let mut guest = Guest::new(&share);
    let inside = guest.lookup(ROOT, "aaaaaaaaa").unwrap();
    let (memory, stop) = (guest.memory.clone(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                memory.write_slice(b"../secret", NAME).unwrap();
                memory.write_slice(b"aaaaaaaaa", NAME).unwrap();
            }
        });
        for _ in 0..2000 {
            match guest.lookup(ROOT, "aaaaaaaaa") {
                Ok(node) => assert_eq!(node, inside),
                // Half of one and half of the other is a name that is not there, perhaps.
                Err(error) => assert!([libc::EINVAL, libc::ENOENT].contains(&error), "{error}"),
            }
        }
        for _ in 0..500 {
            let _ = guest.call(opcode::UNLINK, ROOT, &cstr("bbbbbbbbb"));
        }
    });
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"host");
}

#[test]
fn hostile_11_initializing_again_and_again_keeps_nothing_of_before() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let held = || {
        let fds = fs::read_dir("/proc/self/fd").unwrap();
        fds.filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|path| path.starts_with(&share))).count()
    };
    let before = held();
    for round in 0..100 {
        let node = guest.lookup(ROOT, "file").unwrap();
        guest.open(node, libc::O_RDONLY).unwrap();
        if round % 2 == 0 {
            const DESTROY: u32 = 38;
            // It has no answer.
            let len = guest.write_request(DESTROY, 0, &[]);
            guest.requests.add(&[(REQUEST, len, false), (REPLY, 0x100, true)]);
            guest.requests.kick();
            guest.requests.wait_used(&guest.interrupt);
        }
        guest.init(SUBMOUNTS).unwrap();
    }
    assert!(held() <= before + 4, "{before} and then {}", held());
}

/// A panic of the server would be the end of the VMM: bodies that are random, with room for replies that is, too.
#[test]
fn hostile_11_every_opcode_with_any_body_and_room_leaves_the_server_running() {
    let (_dir, share) = share();
    let mut guest = Guest::new(&share);
    let node = guest.lookup(ROOT, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..60 {
        for opcode in (0..64).chain([4096, u32::MAX]).filter(|opcode| *opcode != 38) {
            let len = usize::try_from(random() % 200).unwrap();
            let mut body: Vec<u8> = (0..len).map(|_| random().to_le_bytes()[0] >> (random() % 8)).collect();
            if body.len() >= 8 && round % 2 == 0 {
                body[..8].copy_from_slice(&handle.to_le_bytes());
            }
            let mut total = guest.write_request(opcode, [node, ROOT, random()][round % 3], &body);
            if round % 5 == 0 {
                // The header claims another length than the chain has.
                let claimed = u32::try_from(random() % 300).unwrap();
                guest.memory.write_obj(claimed, GuestAddress(REQUEST)).unwrap();
                total = total.max(1);
            }
            let room = [0, 15, 16, 17, 40, 200, 0x1000, 0x2_0000][usize::try_from(random() % 8).unwrap()];
            guest.requests.add(&[(REQUEST, total, false), (REPLY, room, true)]);
            guest.requests.kick();
            guest.requests.wait_used(&guest.interrupt);
        }
    }
    guest.restart();
    guest.lookup(ROOT, "file").unwrap_or_default();
}
