//! Where a guest's output goes: a pipe, socket, terminal or file, written without blocking where the kernel allows.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};

/// Most bytes of one write: a pipe that polls as writable takes as many without blocking (PIPE_BUF, pipe(7)).
pub const CHUNK: usize = 4096;

/// The descriptor. Nothing is kept for later: what it does not take is lost.
pub struct Output {
    fd: OwnedFd,
}

impl Output {
    /// Pipes and sockets are made non-blocking. Terminals and files are not: their flags are shared with whoever else
    /// has them open, and they take what they are given.
    pub fn new(fd: OwnedFd) -> rustix::io::Result<Self> {
        let kind = FileType::from_raw_mode(fstat(&fd)?.st_mode);
        if matches!(kind, FileType::Fifo | FileType::Socket) {
            fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        }
        Ok(Self { fd })
    }

    /// Writes what it can. False if there is no point in going on now.
    pub fn write(&self, bytes: &[u8]) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.fd.as_fd(), PollFlags::OUT)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, Some(&at_once)) {
            Ok(1) => rustix::io::write(&self.fd, bytes).is_ok_and(|written| written == bytes.len()),
            _ => false,
        }
    }
}

/// For the serial port. What is not taken counts as written: it is lost all the same.
impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::write(self, bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
