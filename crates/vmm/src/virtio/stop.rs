//! How a reset takes the queues back from a worker, and never waits for the host.
//!
//! A worker touches its rings, and sends interrupts, only while it [holds](Stop::hold) its `Stop`. It lets go of it for as long
//! as a request is in the host ([`Held::during`]), where a disk or a file system that hangs may keep it for ever. So
//! [`Stop::request`] waits for ring work at most, which is short, and from when it returns the worker touches no ring.
//!
//! One thing cannot be taken back: the buffers of the request that is in the host. preadv(2) writes straight to the guest's
//! memory, and does so whenever the disk answers. Until then the reset is [not over](Stop::is_over), and the transport says
//! so: the device's status reads as 0 only when it is (section 2.4: a reset is complete when the driver reads 0). A driver that
//! does not look, and gives the buffers of a request that has not come back to something else, may find them written to.
//! Linux has none in flight when it resets a disk or a share: it waits for their requests first.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::ring::event_fd;

/// What a device and the worker of one activation share.
pub struct Stop {
    requested: AtomicBool,
    /// Whether a request is in the host. Locked by the worker while it is at its rings.
    in_host: Mutex<bool>,
    event: EventFd,
}

impl Stop {
    /// One that is not requested.
    ///
    /// # Errors
    ///
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self { requested: AtomicBool::new(false), in_host: Mutex::new(false), event: event_fd()? })
    }

    /// Takes the rings from the worker for good. Waits while the worker is at them, and for nothing that the host does.
    pub fn request(&self) {
        // Before the lock: a worker looks at it after each request, and would be faster at the lock than this.
        self.requested.store(true, Ordering::Release);
        // It can only fail by overflow, and then the event is readable as it is.
        let _ = self.event.write(1);
        drop(self.lock());
    }

    /// Whether it was requested.
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }

    /// Whether it was requested, and no request is in the host any more.
    pub fn is_over(&self) -> bool {
        self.is_requested() && !self.is_in_host()
    }

    /// Whether a request is in the host now.
    pub fn is_in_host(&self) -> bool {
        *self.lock()
    }

    /// Readable from when it is requested, for a worker that waits for its queues.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The worker's right to its rings; `None` once the stop is requested.
    pub fn hold(&self) -> Option<Held<'_>> {
        let guard = self.lock();
        (!self.is_requested()).then_some(Held { stop: self, guard: Some(guard) })
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.in_host.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Stop::hold`].
pub struct Held<'a> {
    stop: &'a Stop,
    /// `None` during a request.
    guard: Option<MutexGuard<'a, bool>>,
}

impl Held<'_> {
    /// Works on a request, which may take as long as the host likes and may touch the request's buffers, but no ring. `None`
    /// if the stop was requested meanwhile: the rings are the driver's then, and the answer is nobody's.
    pub fn during<T>(&mut self, request: impl FnOnce() -> T) -> Option<T> {
        if let Some(mut in_host) = self.guard.take() {
            *in_host = true;
        }
        let answer = request();
        let mut in_host = self.stop.lock();
        *in_host = false;
        self.guard = Some(in_host);
        (!self.stop.is_requested()).then_some(answer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    #[test]
    fn worker_between_two_requests_is_stopped_at_once() {
        let stop = Stop::new().unwrap();
        let mut held = stop.hold().unwrap();
        assert_eq!(held.during(|| 7), Some(7));
        drop(held);
        assert!(!stop.is_over());
        stop.request();
        assert!(stop.is_over() && stop.hold().is_none());
        assert_eq!(stop.event().read().unwrap(), 1);
    }

    #[test]
    fn stop_does_not_wait_for_a_request_in_the_host_and_is_over_when_that_has_come_back() {
        let stop = Stop::new().unwrap();
        let ((reached, in_host), (release, released)) = (channel(), channel::<()>());
        let stop = &stop;
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                let mut held = stop.hold().unwrap();
                held.during(|| {
                    reached.send(()).unwrap();
                    // Its end is the release.
                    let _ = released.recv();
                })
            });
            in_host.recv().unwrap();
            stop.request();
            assert!(!stop.is_over() && stop.is_in_host());
            drop(release);
            assert_eq!(worker.join().unwrap(), None, "the answer is nobody's");
        });
        assert!(stop.is_over());
    }

    #[test]
    fn request_waits_for_the_worker_that_is_at_its_rings() {
        let stop = Stop::new().unwrap();
        let held = stop.hold().unwrap();
        thread::scope(|scope| {
            let request = scope.spawn(|| stop.request());
            // The flag comes before the lock.
            while !stop.is_requested() {
                thread::yield_now();
            }
            assert!(!request.is_finished());
            drop(held);
        });
        assert!(stop.is_over());
    }
}
