//! The end of a guest: whoever notices it first says why, and whoever waits for it is woken.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use bulkhead_protocol::control::ExitReason;
use rustix::event::{EventfdFlags, eventfd};

/// Raised once when the guest ends. Its descriptor is readable from then on.
pub struct ExitSignal {
    reason: OnceLock<ExitReason>,
    event: OwnedFd,
}

impl ExitSignal {
    /// A signal that is not raised.
    pub fn new() -> rustix::io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { reason: OnceLock::new(), event })
    }

    /// The guest has ended. The first reason stands.
    pub fn raise(&self, reason: ExitReason) {
        let _ = self.reason.set(reason);
        // It fails only when the counter is full, and then the waiter has been woken already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Why the guest has ended; `None` while it runs.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.get().copied()
    }
}

impl AsFd for ExitSignal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
