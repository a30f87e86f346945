//! virtio-rng (section 5.4): entropy from getrandom(2).

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;

use super::ring::{Chain, writable};
use super::worker::RequestWorker;
use super::{ActivateError, Activation, VirtioDevice};
use crate::event_loop::{EventLoop, WorkerGuard};

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

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let worker = RequestWorker::new("rng", &mut activation, 0, |chain| fill(&chain))?;
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Fills the writable part of a chain; returns how much of it.
fn fill(chain: &Chain) -> usize {
    let room = writable(chain).fold(0usize, |sum, buffer| sum.saturating_add(len(&buffer)));
    let mut bytes = [0; MAX_CHAIN];
    let (wanted, _) = bytes.split_at_mut(room.min(MAX_CHAIN));
    // It blocks only until the host's pool was first seeded, long before any guest.
    let Ok(count) = getrandom(&mut *wanted, GetRandomFlags::empty()) else { return 0 };
    let mut rest = wanted.get(..count).unwrap_or_default();
    for buffer in writable(chain) {
        let (part, left) = rest.split_at(rest.len().min(len(&buffer)));
        if chain.memory().write_slice(part, buffer.addr()).is_err() {
            break;
        }
        rest = left;
    }
    count - rest.len()
}

fn len(buffer: &Descriptor) -> usize {
    usize::try_from(buffer.len()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
