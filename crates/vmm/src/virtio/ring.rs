//! One virtqueue in the hands of a device's worker: the rings, the kick and the way to the driver's interrupt.

use std::io;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, ActiveQueue, Interrupt, Memory};
use std::sync::Arc;

/// A descriptor chain of the guest.
pub type Chain = DescriptorChain<Memory>;

/// A virtqueue and what belongs to it.
pub struct Ring {
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    /// Something was pushed since [`Self::notify`].
    pushed: bool,
}

impl Ring {
    /// Takes queue `index` out of an activation.
    pub fn take(activation: &mut Activation, index: u16) -> Result<Self, ActivateError> {
        let queue = activation.queues.get_mut(usize::from(index)).and_then(Option::take);
        let ActiveQueue { queue, kick } = queue.ok_or(ActivateError::QueueMissing(index))?;
        let (memory, interrupt) = (Arc::clone(&activation.memory), Arc::clone(&activation.interrupt));
        Ok(Self { index, queue, kick, memory, interrupt, pushed: false })
    }

    /// Readable when the driver has notified the queue; to be watched, and cleared with [`Self::clear_kick`].
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the notification.
    pub fn clear_kick(&self) {
        // Nothing to read (EAGAIN) is as good.
        let _ = self.kick.read();
    }

    /// Makes the kick readable, for a worker that has spent its budget and must let others run.
    pub fn kick_self(&self) {
        // It can only fail by overflow, and then the kick is readable as it is.
        let _ = self.kick.write(1);
    }

    /// Number of slots.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next chain that the driver has made available.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        Ok(self.queue.iter(Arc::clone(&self.memory))?.next())
    }

    /// Gives the chain that was popped last back, unused.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver with `len` bytes written to it.
    pub fn push(&mut self, head: u16, len: usize) -> Result<(), RingError> {
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.pushed = true;
        Ok(self.queue.add_used(&*self.memory, head, len)?)
    }

    /// Interrupts the driver if it wants to know of what was pushed.
    pub fn notify(&mut self) -> Result<(), RingError> {
        if std::mem::take(&mut self.pushed) && self.queue.needs_notification(&*self.memory)? {
            self.interrupt.notify_queue(self.index);
        }
        Ok(())
    }

    /// Tells the driver that it need not kick. A hint, which it may ignore.
    pub fn suppress_kicks(&mut self) -> Result<(), RingError> {
        Ok(self.queue.disable_notification(&*self.memory)?)
    }

    /// Asks the driver to kick. `true` if there are chains already, for which no kick will come.
    #[must_use = "chains that are there already announce themselves here only"]
    pub fn expect_kicks(&mut self) -> Result<bool, RingError> {
        Ok(self.queue.enable_notification(&*self.memory)?)
    }

    /// Runs `step` until it finds the ring empty with kicks enabled (`Ok(false)`), or until it has run `budget` times
    /// (then the kick is made readable) or says that it cannot go on.
    pub fn drain(
        &mut self,
        budget: usize,
        mut step: impl FnMut(&mut Self) -> Result<Step, RingError>,
    ) -> Result<(), RingError> {
        self.suppress_kicks()?;
        for _ in 0..budget {
            match step(self)? {
                Step::Done => {}
                Step::Stop => return self.notify(),
                Step::Empty => {
                    if !self.expect_kicks()? {
                        return self.notify();
                    }
                    self.suppress_kicks()?;
                }
            }
        }
        self.kick_self();
        self.notify()
    }
}

/// What became of one turn of [`Ring::drain`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// A chain was dealt with.
    Done,
    /// There is no chain.
    Empty,
    /// There may be chains, but the device waits for something else, which will make it come back.
    Stop,
}

/// The driver has put nonsense into a ring. There is no way on but a reset.
#[derive(Debug, thiserror::Error)]
#[error("virtqueue is broken: {0}")]
pub struct RingError(virtio_queue::Error);

impl From<virtio_queue::Error> for RingError {
    fn from(error: virtio_queue::Error) -> Self {
        Self(error)
    }
}

/// An eventfd for a worker: non-blocking, close-on-exec.
pub fn event_fd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}
