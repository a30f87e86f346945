//! virtio-pmem (section 5.19) over memory that the guest can only read. The device tells the driver where that memory is, and
//! answers flushes at once: there is never anything to flush, so a flood of them costs the host no more than any other ring does.

use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;

use super::ring::{Chain, readable, writable};
use super::worker::RequestWorker;
use super::{ActivateError, Activation, VirtioDevice, read_config};
use crate::event_loop::{EventLoop, WorkerGuard};
use crate::memory::ImageRegion;

const QUEUES: [u16; 1] = [64];

/// VIRTIO_ID_PMEM (section 5).
const ID: u32 = 27;

/// VIRTIO_PMEM_REQ_TYPE_FLUSH, the only request that there is, and the two answers (section 5.19.6).
const FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = u32::MAX;

/// The device.
pub struct Pmem {
    /// struct virtio_pmem_config: start and size.
    config: [u8; 16],
    /// There until the drop.
    region: Option<Box<dyn ImageRegion>>,
    event_loop: EventLoop,
    memory_loop: EventLoop,
    worker: Option<WorkerGuard>,
}

impl Pmem {
    /// A device over `region`, which is taken from the guest in `memory_loop` when the device is gone: that may wait for the host.
    pub fn new(region: Box<dyn ImageRegion>, event_loop: EventLoop, memory_loop: EventLoop) -> Self {
        let mut config = [0; 16];
        let fields = region.start().to_le_bytes().into_iter().chain(region.size().to_le_bytes());
        config.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        Self { config, region: Some(region), event_loop, memory_loop, worker: None }
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> u32 {
        ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    /// Not VIRTIO_PMEM_F_SHMEM_REGION: the memory is named by its address.
    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let worker = RequestWorker::new("pmem", &mut activation, 0, |chain| answer(&chain))?;
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

impl Drop for Pmem {
    fn drop(&mut self) {
        let region = self.region.take();
        self.memory_loop.run(move || drop(region));
    }
}

/// Answers a request; returns the bytes that were written to the chain.
fn answer(chain: &Chain) -> usize {
    // Either is a word, which no driver spreads over buffers.
    let fits = |buffer: &Descriptor| buffer.len() >= 4;
    let request = readable(chain).next().filter(fits);
    let request = request.and_then(|buffer| chain.memory().read_obj::<[u8; 4]>(buffer.addr()).ok());
    let verdict = if request.map(u32::from_le_bytes) == Some(FLUSH) { DONE } else { FAILED };
    let Some(room) = writable(chain).next().filter(fits) else { return 0 };
    match chain.memory().write_obj(verdict.to_le_bytes(), room.addr()) {
        Ok(()) => 4,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests;
