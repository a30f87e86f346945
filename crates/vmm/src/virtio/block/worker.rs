//! The worker of a disk, on a thread of its own: a disk of the host may keep it waiting for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::execute::refuse;
use crate::guest_log;
use crate::virtio::ring::{Chain, Ring, RingError, Step};
use crate::virtio::serving::Orders;
use crate::virtio::stop::Stop;
use crate::virtio::wait::{fd, wait};

/// What a disk's thread has. What it answers with holds the disk open, so that is dropped here as well: close(2) may wait
/// for the disk.
pub struct Worker<A> {
    answer: Option<A>,
    withdrawn: Arc<AtomicBool>,
}

impl<A: FnMut(&Chain) -> usize> Worker<A> {
    /// A worker that answers chains with `answer`, which returns the number of bytes that it wrote to one; but with errors, once
    /// `withdrawn` is set.
    pub fn new(answer: A, withdrawn: Arc<AtomicBool>) -> Self {
        Self { answer: Some(answer), withdrawn }
    }

    /// Serves one activation after the other, to the end of the device.
    pub fn run(mut self, orders: Orders<Ring>) {
        for mut order in orders {
            if let Err(error) = self.serve(&mut order.work, &order.stop) {
                order.fail(|| guest_log!("block: {error}"));
            }
        }
    }

    /// Serves until it is stopped, or until the driver breaks the queue.
    fn serve(&mut self, ring: &mut Ring, stop: &Stop) -> Result<(), RingError> {
        loop {
            let [stopped, _] = wait([fd(stop.event()), fd(ring.kick())]);
            if stopped {
                return Ok(());
            }
            self.serve_once(ring, stop)?;
        }
    }

    /// Answers what is in the queue, one request after the other, until it is stopped.
    pub fn serve_once(&mut self, ring: &mut Ring, stop: &Stop) -> Result<(), RingError> {
        let Some(mut held) = stop.hold() else { return Ok(()) };
        ring.clear_kick();
        ring.drain(usize::from(ring.size()), |ring| {
            let Some(chain) = ring.pop()? else { return Ok(Step::Empty) };
            let head = chain.head_index();
            let Some(written) = held.during(|| self.answer(&chain)) else { return Ok(Step::Over) };
            ring.push(head, written)?;
            Ok(Step::Done)
        })?;
        drop(held);
        self.close_if_withdrawn();
        Ok(())
    }

    fn answer(&mut self, chain: &Chain) -> usize {
        self.close_if_withdrawn();
        match &mut self.answer {
            Some(answer) => answer(chain),
            None => refuse(chain),
        }
    }

    fn close_if_withdrawn(&mut self) {
        if self.withdrawn.load(Ordering::Acquire) {
            self.answer = None;
        }
    }
}
