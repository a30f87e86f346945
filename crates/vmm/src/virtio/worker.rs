//! The worker of a device whose one queue of requests is answered chain by chain, without
//! waiting for the host: console, rng, balloon, mem.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::ring::{Chain, Ring, RingError, Step};
use super::{ActivateError, Activation, Interrupt};
use crate::guest_log;

/// Answers chains with `answer`, which returns the number of bytes that it wrote to one.
pub struct RequestWorker<F> {
    device: &'static str,
    ring: Ring,
    interrupt: Arc<dyn Interrupt>,
    answer: F,
}

impl<F: FnMut(Chain) -> usize + Send> RequestWorker<F> {
    /// A worker for queue `index` of the device, whose name is for the log.
    pub fn new(
        device: &'static str,
        activation: &mut Activation,
        index: u16,
        answer: F,
    ) -> Result<Self, ActivateError> {
        let ring = Ring::take(activation, index)?;
        Ok(Self { device, ring, interrupt: activation.interrupt.clone(), answer })
    }

    /// Answers what is in the queue, at most a ring's worth, so that the devices on a thread take turns.
    pub fn serve(&mut self) -> Result<(), RingError> {
        let Self { ring, answer, .. } = self;
        ring.clear_kick();
        let budget = usize::from(ring.size());
        ring.drain(budget, |ring| {
            let Some(chain) = ring.pop()? else { return Ok(Step::Empty) };
            let head = chain.head_index();
            ring.push(head, answer(chain))?;
            Ok(Step::Done)
        })
    }
}

impl<F: FnMut(Chain) -> usize + Send> MutEventSubscriber for RequestWorker<F> {
    fn init(&mut self, ops: &mut EventOps) {
        if ops.add(Events::new(self.ring.kick(), EventSet::IN)).is_err() {
            self.interrupt.needs_reset();
        }
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        if let Err(error) = self.serve() {
            guest_log!("{}: {error}", self.device);
            let _ = ops.remove(Events::empty_raw(self.ring.kick().as_raw_fd()));
            self.interrupt.needs_reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::ring::OWN_KICK;
    use crate::virtio::testing::{DriverQueue, TestInterrupt, activation, memory};

    /// Endless submission: there is a new request whenever one has been answered.
    #[test]
    fn hostile_04_one_turn_answers_no_more_than_the_ring_holds() {
        let (memory, interrupt) = (memory(), Arc::new(TestInterrupt::default()));
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
        let head = driver.add(&[(0x4000, 16, false)]);
        let (mut twin, mut answered) = (driver.twin(), 0);
        let mut activation = activation(&memory, 0, &[&driver], &interrupt);
        let answer = |_| {
            answered += 1;
            assert!(answered < 1000, "the others never get their turn");
            twin.offer(head);
            0
        };
        let mut worker = RequestWorker::new("test", &mut activation, 0, answer).unwrap();
        worker.serve().unwrap();
        assert_eq!(worker.ring.kick().read().unwrap(), OWN_KICK, "the rest comes back by a kick");
        worker.serve().unwrap();
        drop(worker);
        assert_eq!(answered, 16);
    }
}
