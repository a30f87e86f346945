//! Output of a process and how much there has been of it: what had been written when the process ended is told with its end,
//! so that nobody has to wait for what it has left behind.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{FileType, fstat};
use rustix::io::{Errno, ioctl_fionread};

/// Bytes that have been read. The lock is held over a read and its count.
type Taken = Arc<Mutex<u64>>;

fn lock(taken: &Taken) -> MutexGuard<'_, u64> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The agent's end of a pipe or terminal.
#[derive(Debug)]
pub struct Output {
    /// The descriptor.
    pub end: Arc<OwnedFd>,
    taken: Taken,
}

impl Output {
    /// Output of which nothing has been read.
    pub fn new(end: OwnedFd) -> Self {
        Self { end: Arc::new(end), taken: Taken::default() }
    }

    /// Reads what is there. At its end that is nothing.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut taken = lock(&self.taken);
        let read = match rustix::io::read(&*self.end, buffer) {
            // A terminal whose last user has closed it: a hangup.
            Err(Errno::IO) => 0,
            other => other?,
        };
        *taken = taken.saturating_add(u64::try_from(read).unwrap_or(u64::MAX));
        Ok(read)
    }
}

/// Tells how much has been written, while somebody reads it and afterwards. It keeps nothing open.
#[derive(Debug)]
pub struct Meter {
    end: Weak<OwnedFd>,
    taken: Taken,
}

impl Meter {
    /// Of a pipe. A terminal, whose kernel side has more than one buffer, has none: it ends with its process.
    pub fn of(output: &Output) -> Option<Self> {
        let is_pipe = fstat(&output.end).is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Fifo);
        is_pipe.then(|| Self { end: Arc::downgrade(&output.end), taken: Arc::clone(&output.taken) })
    }

    /// Bytes so far: what has been read, and what waits in the pipe.
    pub fn written(&self) -> u64 {
        let end = self.end.upgrade();
        let taken = lock(&self.taken);
        let waiting = end.and_then(|end| ioctl_fionread(&*end).ok()).unwrap_or(0);
        taken.saturating_add(waiting)
    }
}
