//! virtio-console with one port (section 5.3), output only: what the guest writes goes to a descriptor, and what that
//! does not take at once is lost. A guest can neither stall the VMM with its output nor make it grow.

mod output;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::Bytes;

use self::output::Output;
use super::serve::{Chain, serve};
use super::{ActivateError, Activation, ActiveQueue, Interrupt, Memory, VirtioDevice};
use crate::event_loop::{EventLoop, WorkerGuard};
use crate::guest_log;

/// Port 0: receiveq, transmitq.
const QUEUES: [u16; 2] = [16, 64];
const TRANSMITQ: usize = 1;

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
        let Activation { memory, mut queues, interrupt, .. } = activation;
        let index = u16::try_from(TRANSMITQ).unwrap_or(0);
        let transmit = queues.get_mut(TRANSMITQ).and_then(Option::take).ok_or(ActivateError::QueueMissing(index))?;
        let worker = Worker { transmit, memory, interrupt, output: self.output.clone() };
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct Worker {
    transmit: ActiveQueue,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    output: Arc<Output>,
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        if ops.add(Events::new(&self.transmit.kick, EventSet::IN)).is_err() {
            self.interrupt.needs_reset();
        }
    }

    fn process(&mut self, _events: Events, ops: &mut EventOps) {
        let (memory, output, index) = (&*self.memory, &self.output, 1);
        let result = serve(&mut self.transmit, index, memory, &*self.interrupt, |chain| {
            print(output, chain);
            0
        });
        if let Err(error) = result {
            guest_log!("console: {error}");
            let _ = ops.remove(Events::empty_raw(self.transmit.kick.as_raw_fd()));
            self.interrupt.needs_reset();
        }
    }
}

/// Most bytes of a chain that are looked at. Linux writes a page at most.
const MAX_CHAIN: usize = 64 << 10;

/// Writes the readable part of a chain, as far as memory and output allow.
fn print(output: &Output, chain: Chain<'_>) {
    let mut buffer = [0; output::CHUNK];
    let mut budget = MAX_CHAIN;
    let memory = chain.memory();
    for descriptor in chain.clone().readable() {
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
