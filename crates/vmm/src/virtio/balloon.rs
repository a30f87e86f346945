//! virtio-balloon (section 5.5) for free page reporting alone: the guest tells which of its memory it does not use, and the
//! host takes it back until the guest touches it again. The balloon itself stays empty; virtio-mem resizes guests.

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::ring::{Chain, writable};
use super::worker::RequestWorker;
use super::{ActivateError, Activation, VirtioDevice};
use crate::event_loop::{EventLoop, WorkerGuard};
use crate::memory::discard;

/// Inflate and deflate, which every driver expects, and reporting. Queues whose features are not offered are not there, so
/// reporting is the third (Linux and QEMU agree, whatever section 5.5.2 says).
const QUEUES: [u16; 3] = [16, 16, 32];
const REPORTING: u16 = 2;

/// VIRTIO_BALLOON_F_REPORTING.
const F_REPORTING: u64 = 1 << 5;

/// The device.
pub struct Balloon {
    event_loop: EventLoop,
    worker: Option<WorkerGuard>,
}

impl Balloon {
    /// A balloon that is never inflated.
    pub fn new(event_loop: EventLoop) -> Self {
        Self { event_loop, worker: None }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        F_REPORTING
    }

    /// The size that is wanted and the size that is: 0 both.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let worker = RequestWorker::new("balloon", &mut activation, REPORTING, |chain| take_back(&chain))?;
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// Gives the pages of a chain back to the host. Ranges that are no memory of the guest, or not whole pages, are left out:
/// the driver loses nothing but its chance. Nothing is written.
fn take_back(chain: &Chain) -> usize {
    for buffer in writable(chain) {
        discard(chain.memory(), buffer.addr().0, u64::from(buffer.len()));
    }
    0
}

#[cfg(test)]
mod tests;
