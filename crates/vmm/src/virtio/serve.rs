//! The loop around a queue that every simple device shares: take a chain, let the device handle it, give it back, tell
//! the driver. One call does at most one ring's worth of work, so that devices on one thread take turns.

use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::{ActiveQueue, Interrupt};

/// A chain of buffers in the guest's memory.
pub type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The driver broke the ring; the device cannot go on without a reset.
#[derive(Debug, thiserror::Error)]
#[error("the driver broke the ring")]
pub struct RingError(#[from] virtio_queue::Error);

/// Handles what is in the queue; `handle` returns the number of bytes that it wrote to a chain. To be called when the
/// queue's kick is readable. If the driver is faster than the device, the rest comes with a kick of our own.
pub fn serve(
    active: &mut ActiveQueue,
    index: u16,
    memory: &GuestMemoryMmap,
    interrupt: &dyn Interrupt,
    mut handle: impl FnMut(Chain<'_>) -> u32,
) -> Result<(), RingError> {
    // A spurious wake-up finds nothing to read, which changes nothing.
    let _ = active.kick.read();
    let queue = &mut active.queue;
    queue.disable_notification(memory)?;
    for _ in 0..queue.size() {
        let Some(chain) = next(queue, memory)? else { break };
        let head = chain.head_index();
        let written = handle(chain);
        queue.add_used(memory, head, written)?;
    }
    let more = queue.enable_notification(memory)?;
    if queue.needs_notification(memory)? {
        interrupt.notify_queue(index);
    }
    if more {
        let _ = active.kick.write(1);
    }
    Ok(())
}

/// The next chain, or an error where `pop_descriptor_chain` would say that there is none.
fn next<'m>(queue: &mut Queue, memory: &'m GuestMemoryMmap) -> Result<Option<Chain<'m>>, RingError> {
    let before = queue.next_avail();
    let chain = queue.iter(memory)?.next();
    if chain.is_none() && queue.avail_idx(memory, Ordering::Acquire)?.0 != before {
        // Only a ring entry that cannot be read leaves chains behind; the rings were checked, so it does not happen.
        return Err(RingError(virtio_queue::Error::InvalidChain));
    }
    Ok(chain)
}
