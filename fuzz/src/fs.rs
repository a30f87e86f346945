//! virtio-fs: FUSE messages of a hostile guest, served from a file system in memory that ends with the input.
//!
//! The server has no jail here, so it gets one: a thread whose root directory is that file system, which nothing leads out
//! of. It takes root to make one.

use std::os::fd::OwnedFd;
use std::thread;

use bulkhead_vmm::virtio::Activation;
use bulkhead_vmm::virtio::fs::Inline;
use rustix::fs::{Mode, OFlags, mkdirat, openat, symlinkat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};

use crate::guest::{Buffer, Guest, Subject, drive};
use crate::input::Input;

const REQUESTS: usize = 1;
/// Descriptors that the guest may hold.
const GUEST_FDS: u64 = 64;
/// FUSE_INIT of version 7.38 with submounts, as Linux sends it.
const INIT: [u8; 16] = [7, 0, 0, 0, 38, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8];
const OP_INIT: u32 = 26;

/// The target.
pub fn fs(data: &[u8]) {
    thread::scope(|scope| {
        // A thread of its own, since the server changes its working directory, umask and credentials.
        let server = scope.spawn(|| drive(&mut Share { root: share(), server: None, jailed: false, unique: 0 }, data));
        // The scope's own end does not wait for the thread's, whose memory would be counted as leaked.
        server.join().unwrap();
    });
}

/// A small file system: `file` with some content, `dir`, `link` to the file.
fn share() -> OwnedFd {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).expect("the fs target takes root");
    fsconfig_set_string(&context, "size", "4m").unwrap();
    fsconfig_set_string(&context, "nr_inodes", "256").unwrap();
    fsconfig_create(&context).unwrap();
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).unwrap();
    // The mount's descriptor is only a place; the server reads the directory.
    let root = openat(&mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let file = openat(&root, "file", OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RWXU).unwrap();
    rustix::io::write(&file, b"content").unwrap();
    mkdirat(&root, "dir", Mode::RWXU).unwrap();
    symlinkat("file", &root, "link").unwrap();
    root
}

struct Share {
    root: OwnedFd,
    server: Option<Inline>,
    jailed: bool,
    unique: u64,
}

impl Share {
    /// A message with a header that fits it.
    fn message(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let mut message = u32::try_from(40 + body.len()).unwrap().to_le_bytes().to_vec();
        message.extend(opcode.to_le_bytes());
        message.extend(self.unique.to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend([0; 16]); // uid, gid, pid, extensions
        message.extend(body);
        message
    }
}

impl Subject for Share {
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn start(&mut self, activation: Activation) -> bool {
        if self.jailed {
            // Within the jail a server finds no /proc any more, so that a reset goes on with the one there is.
            return true;
        }
        self.server = Some(Inline::new(&self.root, GUEST_FDS, activation).unwrap());
        rustix::process::chroot(".").unwrap();
        self.jailed = true;
        true
    }

    fn stop(&mut self) {}

    fn settle(&mut self) {
        // A broken ring ends the server; what comes after finds none.
        if self.server.as_mut().is_some_and(|server| server.serve().is_err()) {
            self.server = None;
        }
    }

    fn own(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        let (opcode, node, reply) = (u32::from(input.u8()), u64::from(input.u8()), u32::from(input.u16()));
        let len = usize::from(input.u8());
        let message = match opcode {
            // Linux does so first.
            0 => self.message(OP_INIT, 0, &INIT),
            _ => self.message(opcode, node, input.bytes(len)),
        };
        let message = guest.place(&message);
        let room = guest.room(reply);
        guest.offer(REQUESTS, &[message, room]);
        self.settle();
    }

    fn probe(&mut self, _guest: &mut Guest) -> Option<(usize, Vec<Buffer>)> {
        None
    }
}
