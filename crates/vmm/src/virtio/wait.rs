//! Waiting for several event descriptors, for workers that have a thread of their own.
#![allow(unsafe_code)] // reason: an event's descriptor to wait for

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

/// Waits until one of the descriptors is readable, and says which are (poll(2)). It fails for signals and want of memory,
/// which pass.
pub fn wait<const N: usize>(fds: [BorrowedFd<'_>; N]) -> [bool; N] {
    let mut polled = fds.each_ref().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
    while poll(&mut polled, None).is_err() {}
    polled.each_ref().map(|fd| !fd.revents().is_empty())
}

/// An event's descriptor.
pub fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: The descriptor is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
