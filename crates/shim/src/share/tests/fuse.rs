//! A file system whose server falls silent, as that of a network volume does (linux/fuse.h). It is a directory that has a
//! directory of every name, none of which the kernel may remember: each step of a path into it is a question.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rustix::mount::MountFlags;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const INIT: u32 = 26;
const BATCH_FORGET: u32 = 42;

/// The root's, which the kernel knows without asking.
const ROOT: u64 = 1;
/// Of everything else.
const INNER: u64 = 2;

/// Ends with the last mount.
#[derive(Clone, Default)]
pub struct Server {
    silent: Arc<AtomicBool>,
    unanswered: Arc<AtomicUsize>,
}

/// Mounts it, and answers until [`Server::fall_silent`].
pub fn mount(target: &Path) -> Server {
    let mut device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = CString::new(options).unwrap();
    rustix::mount::mount("test", target, "fuse", MountFlags::empty(), Some(options.as_c_str())).unwrap();
    let server = Server::default();
    let serving = server.clone();
    std::thread::spawn(move || {
        let mut request = vec![0; 1 << 17];
        while let Ok(length) = device.read(&mut request) {
            if let Some(answer) = serving.answer(&request[..length]) {
                let _ = device.write(&answer);
            }
        }
    });
    server
}

impl Server {
    /// From now on a question is counted. Its answer is an error, so that the test goes on where a path would have no end.
    pub fn fall_silent(&self) {
        self.silent.store(true, Ordering::SeqCst);
    }

    /// How many questions there were.
    pub fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::SeqCst)
    }

    fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let node = u64::from_ne_bytes(request[16..24].try_into().unwrap());
        let asked = number(4);
        let silent = self.silent.load(Ordering::SeqCst);
        let said = match asked {
            FORGET | BATCH_FORGET => return None,
            LOOKUP | GETATTR if silent => {
                self.unanswered.fetch_add(1, Ordering::SeqCst);
                Err(libc::EIO)
            }
            // struct fuse_init_out: version 7.31 and nothing else.
            INIT => Ok([7_u32.to_ne_bytes(), 31_u32.to_ne_bytes()].concat().into_iter().chain([0; 56]).collect()),
            // struct fuse_entry_out: nothing in it is valid for any time.
            LOOKUP => Ok([INNER.to_ne_bytes().to_vec(), vec![0; 32], attributes(INNER)].concat()),
            // struct fuse_attr_out.
            GETATTR => Ok([vec![0; 16], attributes(if node == ROOT { ROOT } else { INNER })].concat()),
            _ => Err(libc::ENOSYS),
        };
        let (error, body): (i32, Vec<u8>) = said.map_or_else(|error: i32| (-error, Vec::new()), |body| (0, body));
        let length = u32::try_from(16 + body.len()).unwrap();
        Some([&length.to_ne_bytes()[..], &error.to_ne_bytes(), &request[8..16], &body].concat())
    }
}

/// struct fuse_attr of a directory.
fn attributes(inode: u64) -> Vec<u8> {
    let mode = [0o040_755_u32, 2].map(u32::to_ne_bytes).concat();
    [inode.to_ne_bytes().to_vec(), vec![0; 52], mode, vec![0; 20]].concat()
}
