//! virtio-rng (section 5.4): entropy from getrandom(2).

use std::os::fd::AsRawFd;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::Bytes;

use super::serve::{Chain, serve};
use super::{ActivateError, Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};
use crate::event_loop::{EventLoop, WorkerGuard};
use crate::guest_log;

const QUEUES: [u16; 1] = [8];

/// Most bytes for one chain. The device may give fewer than the driver has room for (section 5.4.6.1), and a chain can
/// name more bytes than the guest has memory. Linux asks for 64.
const MAX_CHAIN: usize = 1024;

/// The device.
pub struct Rng {
    event_loop: EventLoop,
    worker: Option<WorkerGuard>,
}

impl Rng {
    /// A source of entropy.
    pub fn new(event_loop: EventLoop) -> Self {
        Self { event_loop, worker: None }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        0
    }

    /// There is no configuration.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let requests = queues.into_iter().next().flatten().ok_or(ActivateError::QueueMissing(0))?;
        self.worker = Some(self.event_loop.add(Box::new(Worker { requests, memory, interrupt }))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct Worker {
    requests: ActiveQueue,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        if ops.add(Events::new(&self.requests.kick, EventSet::IN)).is_err() {
            self.interrupt.needs_reset();
        }
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        if let Err(error) = serve(&mut self.requests, 0, &self.memory, &*self.interrupt, fill) {
            guest_log!("rng: {error}");
            let _ = ops.remove(Events::empty_raw(self.requests.kick.as_raw_fd()));
            self.interrupt.needs_reset();
        }
    }
}

/// Fills the writable part of a chain; returns how much of it.
fn fill(chain: Chain<'_>) -> u32 {
    let mut bytes = [0; MAX_CHAIN];
    // It blocks only until the host's pool was first seeded, long before any guest.
    let Ok(count) = getrandom(&mut bytes[..], GetRandomFlags::empty()) else { return 0 };
    let mut rest = bytes.get(..count).unwrap_or_default();
    let mut written = 0;
    let memory = chain.memory();
    for descriptor in chain.clone().writable() {
        let (part, left) = rest.split_at(rest.len().min(usize::try_from(descriptor.len()).unwrap_or(0)));
        if memory.write_slice(part, descriptor.addr()).is_err() {
            break;
        }
        written += part.len();
        rest = left;
        if rest.is_empty() {
            break;
        }
    }
    u32::try_from(written).unwrap_or(0)
}

#[cfg(test)]
mod tests;
