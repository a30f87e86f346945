//! virtio-mem (section 5.15): memory that the guest plugs and unplugs on request, so that a pod grows and shrinks while it
//! runs (ARCHITECTURE.md, D4). Requests are parsed first ([`request`]) and executed then ([`blocks`]).
//!
//! A memory block without plugged parts is out of the guest's reach: KVM does not map it, and the host has taken its pages
//! back. In the other blocks the host takes the pages of unplugged parts back too, but the guest can touch these parts again.
//! The memory limit of its pod bounds that.

mod blocks;
mod request;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use self::blocks::Blocks;
use super::worker::RequestWorker;
use super::{ActivateError, Activation, Interrupt, VirtioDevice};
use crate::event_loop::{EventLoop, WorkerGuard};
use crate::memory::Backing;

const QUEUES: [u16; 1] = [64];

/// Section 5.15.3: the driver must not touch what is not plugged.
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Called with the MiB that are plugged, when a requested size has been reached or another was requested.
pub type OnResized = Box<dyn FnOnce(u64) + Send>;

/// What the device, its worker and its handle share.
struct State {
    blocks: Blocks,
    /// There while the device is active.
    interrupt: Option<Arc<dyn Interrupt>>,
    waiting: Option<OnResized>,
}

impl State {
    /// Whoever waits, if there is nothing more to wait for.
    fn settled(&mut self) -> Option<(OnResized, u64)> {
        let plugged = self.blocks.plugged();
        (plugged == self.blocks.requested()).then(|| self.waiting.take().map(|done| (done, plugged >> 20))).flatten()
    }
}

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device.
pub struct Mem {
    state: Shared,
    event_loop: EventLoop,
    worker: Option<WorkerGuard>,
}

/// The way to the device from outside of the machine.
#[derive(Clone)]
pub struct MemHandle(Shared);

impl Mem {
    /// A device over `backing`, of which the driver is asked to plug `requested` bytes. Its requests wait for KVM, so the
    /// loop should be none that other devices depend on.
    pub fn new(
        backing: Box<dyn Backing>,
        requested: u64,
        event_loop: EventLoop,
    ) -> Result<(Self, MemHandle), MemError> {
        let mut blocks = Blocks::new(backing);
        if !blocks.request(requested) {
            return Err(MemError::Size { mib: requested >> 20, most: blocks.size() >> 20 });
        }
        let state = Arc::new(Mutex::new(State { blocks, interrupt: None, waiting: None }));
        let handle = MemHandle(state.clone());
        Ok((Self { state, event_loop, worker: None }, handle))
    }
}

impl MemHandle {
    /// Asks the driver for another size. `done` is called in any case but an error: as late as the driver likes.
    pub fn resize(&self, mib: u64, done: OnResized) -> Result<(), MemError> {
        let mut state = lock(&self.0);
        if !mib.checked_mul(1 << 20).is_some_and(|bytes| state.blocks.request(bytes)) {
            return Err(MemError::Size { mib, most: state.blocks.size() >> 20 });
        }
        let replaced = state.waiting.replace(done).map(|done| (done, state.blocks.plugged() >> 20));
        let settled = state.settled();
        if let Some(interrupt) = state.interrupt.as_ref().filter(|_| settled.is_none()) {
            interrupt.notify_config();
        }
        drop(state);
        replaced.into_iter().chain(settled).for_each(|(done, mib)| done(mib));
        Ok(())
    }
}

impl VirtioDevice for Mem {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&lock(&self.state).blocks.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let state = self.state.clone();
        lock(&state).interrupt = Some(activation.interrupt.clone());
        let worker = RequestWorker::new("mem", &mut activation, 0, move |chain| {
            let mut guard = lock(&state);
            let written = request::answer(&mut guard.blocks, &chain);
            let settled = guard.settled();
            drop(guard);
            if let Some((done, mib)) = settled {
                done(mib);
            }
            written
        })?;
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }

    /// Plugged memory stays (section 5.15.5.2): a driver that starts anew unplugs it by itself.
    fn reset(&mut self) {
        self.worker = None;
        lock(&self.state).interrupt = None;
    }
}

/// A size that the region does not have.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// Beyond the region.
    #[error("{mib} MiB cannot be plugged; this machine was built for {most} MiB beyond its boot memory")]
    Size {
        /// Asked for.
        mib: u64,
        /// There are.
        most: u64,
    },
}

#[cfg(test)]
mod tests;
