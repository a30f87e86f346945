//! virtio-console with one port (section 5.3), output only: what the guest writes goes to a descriptor, and what that
//! does not take at once is lost. A guest can neither stall the VMM with its output nor make it grow.

pub mod output;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::Bytes;

use self::output::Output;
use super::ring::{Chain, readable};
use super::worker::RequestWorker;
use super::{ActivateError, Activation, VirtioDevice};
use crate::event_loop::{EventLoop, WorkerGuard};

/// Port 0: receiveq, transmitq.
const QUEUES: [u16; 2] = [16, 64];
const TRANSMITQ: u16 = 1;

/// The device.
pub struct Console {
    output: Arc<Output>,
    event_loop: EventLoop,
    worker: Option<WorkerGuard>,
}

impl Console {
    /// A console whose output goes to `output`.
    pub fn new(output: OwnedFd, event_loop: EventLoop) -> rustix::io::Result<Self> {
        Ok(Self { output: Arc::new(Output::new(output)?), event_loop, worker: None })
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        0
    }

    /// The fields belong to features that are not offered.
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let worker = worker(self.output.clone(), activation)?;
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

fn worker(
    output: Arc<Output>,
    mut activation: Activation,
) -> Result<RequestWorker<impl FnMut(Chain) -> usize + Send>, ActivateError> {
    RequestWorker::new("console", &mut activation, TRANSMITQ, move |chain| {
        print(&output, &chain);
        0
    })
}

/// Most bytes of a chain that are looked at. Linux writes a page at most.
const MAX_CHAIN: usize = 64 << 10;

/// Writes the readable part of a chain, as far as memory and output allow.
fn print(output: &Output, chain: &Chain) {
    let mut buffer = [0; output::CHUNK];
    let mut budget = MAX_CHAIN;
    let memory = chain.memory();
    for descriptor in readable(chain) {
        let mut address = descriptor.addr();
        let mut left = usize::try_from(descriptor.len()).unwrap_or(usize::MAX).min(budget);
        budget -= left;
        while left > 0 {
            let (chunk, _) = buffer.split_at_mut(left.min(output::CHUNK));
            if memory.read_slice(chunk, address).is_err() || !output.write(chunk) {
                return;
            }
            left -= chunk.len();
            address.0 = address.0.wrapping_add(chunk.len() as u64);
        }
    }
}

#[cfg(test)]
mod tests;
