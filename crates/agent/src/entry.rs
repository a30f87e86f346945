//! The C `main`, in place of Rust's own.
//!
//! Rust's start-up code opens /dev/null for standard descriptors that are closed, and aborts where that file does not
//! exist. Init of a guest without a console starts with all three closed and an empty /dev, so it has to be here first.
//! It also leaves SIGPIPE alone, whose disposition containers inherit from the helper.
#![allow(unsafe_code, reason = "the symbol `main` is unsafe to define")]

use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MountFlags, mount};

// SAFETY: this is the program's only definition of `main`, with C's signature; libc calls it once after its own start-up.
// Tests have the test harness's.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    open_standard_fds();
    crate::run()
}

/// Makes sure that descriptors 0 to 2 are open, if only to /dev/null: a descriptor opened later must not take their place.
#[cfg_attr(test, allow(dead_code))]
fn open_standard_fds() {
    for fd in 0..3 {
        // SAFETY: only asks whether the descriptor is open; nothing owns 0 to 2 in a way that could be violated.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        if rustix::io::fcntl_getfd(fd).is_ok() {
            continue;
        }
        // The lowest free descriptor is the one that is missing. Leaked on purpose.
        let open_null = || open("/dev/null", OFlags::RDWR, Mode::empty());
        let null = open_null().or_else(|_| {
            let _ = rustix::fs::mkdir("/dev", Mode::from_raw_mode(0o755));
            let _ = mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None);
            open_null()
        });
        if let Ok(null) = null {
            std::mem::forget(null);
        }
    }
}
