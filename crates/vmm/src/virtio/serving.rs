//! A device whose worker has a thread of its own, because it waits for the host: the thread serves one activation after the
//! other. Neither the device nor who drops it ever waits for the thread.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::stop::Stop;
use super::{ActivateError, Interrupt};

/// The device's side.
pub struct Serving<W> {
    next: Arc<Next<W>>,
    /// Of the last activation.
    stop: Option<Arc<Stop>>,
}

/// The thread's side: what it has to serve, one after the other. It ends when the device is dropped.
pub struct Orders<W>(Arc<Next<W>>);

/// An activation.
pub struct Order<W> {
    /// What the worker works with.
    pub work: W,
    /// To be held while the worker is at its rings.
    pub stop: Arc<Stop>,
    interrupt: Arc<dyn Interrupt>,
}

impl<W> Order<W> {
    /// Says that the worker cannot go on, unless the driver has reset the device. `say` is called before the driver is told.
    pub fn fail(&self, say: impl FnOnce()) {
        if let Some(_held) = self.stop.hold() {
            say();
            self.interrupt.needs_reset();
        }
    }
}

struct Next<W> {
    state: Mutex<State<W>>,
    changed: Condvar,
}

struct State<W> {
    /// There is never more than one: an activation comes after a reset, which stops the one before it, served or not.
    order: Option<Order<W>>,
    closed: bool,
}

impl<W> Next<W> {
    fn lock(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W> Serving<W> {
    /// Both sides.
    pub fn new() -> (Self, Orders<W>) {
        let state = Mutex::new(State { order: None, closed: false });
        let next = Arc::new(Next { state, changed: Condvar::new() });
        (Self { next: Arc::clone(&next), stop: None }, Orders(next))
    }

    /// Gives the thread an activation. The driver learns by `interrupt` what the thread cannot do.
    ///
    /// # Errors
    ///
    /// [`ActivateError::Busy`] as long as a request of the last activation is in the host: its buffers were the last driver's.
    pub fn start(&mut self, work: W, interrupt: Arc<dyn Interrupt>) -> Result<(), ActivateError> {
        self.stop();
        if !self.is_stopped() {
            return Err(ActivateError::Busy);
        }
        let stop =
            Stop::new().map_err(|source| ActivateError::Host { action: "make an event for a worker", source })?;
        let stop = Arc::new(stop);
        self.stop = Some(Arc::clone(&stop));
        let unserved = self.next.lock().order.replace(Order { work, stop, interrupt });
        self.next.changed.notify_one();
        drop(unserved);
        Ok(())
    }

    /// A reset; see [`Stop`] for what is promised.
    pub fn stop(&self) {
        if let Some(stop) = &self.stop {
            stop.request();
        }
    }

    /// Whether nothing of the last activation is in the host any more.
    pub fn is_stopped(&self) -> bool {
        self.stop.as_ref().is_none_or(|stop| stop.is_over())
    }

    /// Whether a request is in the host.
    pub fn is_in_host(&self) -> bool {
        self.stop.as_ref().is_some_and(|stop| stop.is_in_host())
    }
}

impl<W> Drop for Serving<W> {
    fn drop(&mut self) {
        self.stop();
        self.next.lock().closed = true;
        self.next.changed.notify_one();
    }
}

impl<W> Iterator for Orders<W> {
    type Item = Order<W>;

    fn next(&mut self) -> Option<Order<W>> {
        let idle = |state: &mut State<W>| state.order.is_none() && !state.closed;
        let mut state = self.0.changed.wait_while(self.0.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        if state.closed { None } else { state.order.take() }
    }
}
