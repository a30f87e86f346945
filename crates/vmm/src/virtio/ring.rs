//! One virtqueue in the hands of a device's worker: the rings, the kick and the way to the driver's interrupt.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::counts::Counts;
use super::{ActivateError, Activation, ActiveQueue, Interrupt};
use crate::memory::Memory;

/// Section 2.7.6: the driver wants no interrupts.
const VRING_AVAIL_F_NO_INTERRUPT: u16 = 1;

/// What the device's own kicks add to the event, where each of the driver's adds 1: so these can be counted.
pub const OWN_KICK: u64 = 1 << 32;

/// A descriptor chain of the guest.
pub type Chain = DescriptorChain<Memory>;

/// Most descriptors of a chain that are looked at. A driver makes none that is longer than the queue (section 2.7.5.3.1),
/// and no queue here is longer than this; but an indirect table could hold 65535, for each of which a device would work.
pub const MAX_DESCRIPTORS: usize = 1024;

/// The buffers of a chain that the driver wrote for the device.
pub fn readable(chain: &Chain) -> impl Iterator<Item = Descriptor> + use<> {
    chain.clone().take(MAX_DESCRIPTORS).filter(|descriptor| !descriptor.is_write_only())
}

/// The buffers of a chain that the driver left for the device to fill.
pub fn writable(chain: &Chain) -> impl Iterator<Item = Descriptor> + use<> {
    chain.clone().take(MAX_DESCRIPTORS).filter(Descriptor::is_write_only)
}

/// Whether a chain has more descriptors than are looked at, for those who cannot stop looking by themselves.
pub fn is_too_long(chain: &Chain) -> bool {
    chain.clone().nth(MAX_DESCRIPTORS).is_some()
}

/// A virtqueue and what belongs to it.
pub struct Ring {
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    counts: Arc<Counts>,
    /// Chains that are in the used ring but not yet in its index.
    staged: u16,
    /// Chains that were published since [`Self::notify`] last looked.
    unannounced: u16,
}

impl Ring {
    /// Takes queue `index` out of an activation.
    pub fn take(activation: &mut Activation, index: u16) -> Result<Self, ActivateError> {
        let queue = activation.queues.get_mut(usize::from(index)).and_then(Option::take);
        let ActiveQueue { queue, kick } = queue.ok_or(ActivateError::QueueMissing(index))?;
        let (memory, interrupt) = (Arc::clone(&activation.memory), Arc::clone(&activation.interrupt));
        let counts = Arc::clone(&activation.counts);
        Ok(Self { index, queue, kick, memory, interrupt, counts, staged: 0, unannounced: 0 })
    }

    /// The device's counters.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Which of the device's queues it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Readable when the driver has notified the queue; to be watched, and cleared with [`Self::clear_kick`].
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Takes the notification.
    pub fn clear_kick(&self) {
        // Nothing to read (EAGAIN) is as good.
        if let Ok(kicks) = self.kick.read() {
            self.counts.kicked(kicks % OWN_KICK);
        }
    }

    /// Makes the kick readable, for a worker that has spent its budget and must let others run.
    pub fn kick_self(&self) {
        // It can only fail by overflow, and then the kick is readable as it is.
        let _ = self.kick.write(OWN_KICK);
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
        self.stage(head, len)?;
        self.publish()
    }

    /// As [`Self::push`], but the driver does not see it before [`Self::publish`]; for what it must see together.
    pub fn stage(&mut self, head: u16, len: usize) -> Result<(), RingError> {
        let size = self.queue.size();
        if head >= size || self.staged >= size {
            return Err(RingError::Head(head));
        }
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let slot = self.queue.next_used().wrapping_add(self.staged) % size;
        // struct virtq_used_elem: id, len.
        let element = u64::from(len) << 32 | u64::from(head);
        self.memory
            .write_obj(element.to_le(), self.in_used_ring(4 + 8 * u64::from(slot)))
            .map_err(RingError::Memory)?;
        self.staged += 1;
        Ok(())
    }

    /// Shows the driver what was staged.
    pub fn publish(&mut self) -> Result<(), RingError> {
        let index = self.queue.next_used().wrapping_add(self.staged);
        self.queue.set_next_used(index);
        self.unannounced = self.unannounced.saturating_add(self.staged);
        self.staged = 0;
        self.memory.store(index.to_le(), self.in_used_ring(2), Ordering::Release).map_err(RingError::Memory)
    }

    /// Interrupts the driver if it wants to know of what was pushed.
    pub fn notify(&mut self) -> Result<(), RingError> {
        if self.is_awaited()? {
            self.counts.interrupted();
            self.interrupt.notify_queue(self.index);
        }
        Ok(())
    }

    /// As [`Self::notify`] for two queues of a device, whose interrupt is the same: the driver looks at both upon one.
    pub fn notify_both(&mut self, other: &mut Self) -> Result<(), RingError> {
        // Both are asked: what they have published counts as announced then.
        let awaited = [self.is_awaited()?, other.is_awaited()?];
        if let Some((ring, _)) = [self, other].into_iter().zip(awaited).find(|(_, awaited)| *awaited) {
            ring.counts.interrupted();
            ring.interrupt.notify_queue(ring.index);
        }
        Ok(())
    }

    /// Whether the driver wants to know of what was pushed since this was last asked.
    fn is_awaited(&mut self) -> Result<bool, RingError> {
        let count = std::mem::take(&mut self.unannounced);
        Ok(count > 0 && self.wants_interrupt(count)?)
    }

    /// Section 2.7.7 for the last `count` chains. (`Queue` has it for chains that it published itself.)
    fn wants_interrupt(&self, count: u16) -> Result<bool, RingError> {
        // The index must be out before the driver's wish is read: the driver does it the other way round.
        fence(Ordering::SeqCst);
        let load = |offset| {
            let at = GuestAddress(self.queue.avail_ring()).unchecked_add(offset);
            self.memory.load(at, Ordering::Relaxed).map(u16::from_le).map_err(RingError::Memory)
        };
        if !self.queue.event_idx_enabled() {
            return Ok(load(0)? & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        let event = load(4 + 2 * u64::from(self.queue.size()))?;
        let new = self.queue.next_used();
        Ok(new.wrapping_sub(event).wrapping_sub(1) < count)
    }

    /// The rings were checked against the memory, so that nothing overflows.
    fn in_used_ring(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.queue.used_ring()).unchecked_add(offset)
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

    /// Runs `step` until there is nothing left and the driver will kick, or until `step` says that it cannot go on; but
    /// `budget` times at most, and then the kick is made readable. Interrupts the driver at the end, unless the device was
    /// reset.
    pub fn drain(
        &mut self,
        budget: usize,
        step: impl FnMut(&mut Self) -> Result<Step, RingError>,
    ) -> Result<(), RingError> {
        match self.drain_quietly(budget, step)? {
            Step::Over => Ok(()),
            _ => self.notify(),
        }
    }

    /// As [`Self::drain`], but leaves the interrupt to the caller. Returns what ended it; [`Step::Done`] is the budget.
    pub fn drain_quietly(
        &mut self,
        budget: usize,
        mut step: impl FnMut(&mut Self) -> Result<Step, RingError>,
    ) -> Result<Step, RingError> {
        self.suppress_kicks()?;
        for _ in 0..budget {
            match step(self)? {
                Step::Done => {}
                Step::Empty if self.expect_kicks()? => self.suppress_kicks()?,
                end => return Ok(end),
            }
        }
        self.kick_self();
        Ok(Step::Done)
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
    /// The device was reset: the ring is the driver's.
    Over,
}

/// The driver has put nonsense into a ring. There is no way on but a reset.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// An index that cannot be, or rings outside of the memory.
    #[error("the driver broke the ring: {0}")]
    Queue(virtio_queue::Error),
    /// The head of a chain.
    #[error("the driver made descriptor {0} available, which the queue does not have")]
    Head(u16),
    /// Rings outside of the memory.
    #[error("the ring is not in the guest's memory: {0}")]
    Memory(GuestMemoryError),
    /// Not the driver's fault: epoll_ctl(2).
    #[error("a descriptor of the device cannot be watched")]
    Watch,
}

impl From<virtio_queue::Error> for RingError {
    fn from(error: virtio_queue::Error) -> Self {
        Self::Queue(error)
    }
}

/// An eventfd for a worker: non-blocking, close-on-exec.
pub fn event_fd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

#[cfg(test)]
mod tests;
