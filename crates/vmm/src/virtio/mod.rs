//! virtio devices (Virtual I/O Device specification 1.2) without a word about their transport.
//!
//! The transport owns negotiation, device status and the ISR. When the driver sets DRIVER_OK it hands the device its
//! [`Activation`]; from then on the queues belong to the device's worker, which lives in the [device
//! loop](crate::event_loop) or, if it may wait for the host, in a thread of its own ([`serving`]). A vCPU thread never touches a
//! queue, and never waits for the host.

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod console;
pub mod counts;
pub mod fs;
pub mod mem;
pub mod net;
pub mod pmem;
pub mod ring;
pub mod rng;
pub mod serving;
pub mod stop;
pub mod transport;
pub mod vsock;
mod wait;
pub mod worker;

#[cfg(test)]
mod hostile;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::event_loop::EventLoopError;
use crate::memory::Memory;
use counts::Counts;

/// A virtio device, as its transport sees it.
pub trait VirtioDevice: Send {
    /// Device ID, section 5.
    fn device_type(&self) -> u32;

    /// Largest size of each queue, a power of two; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Device feature bits that are offered. The transport adds VIRTIO_F_VERSION_1 and the ring features
    /// (VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC).
    fn features(&self) -> u64;

    /// Reads the configuration space. Bytes beyond it read as zero. Never blocks.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; most devices have nothing to write. Never blocks.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts the device. An error makes the transport set DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device: it touches no queue and sends no interrupt from then on. Never waits for a file, a file system or a
    /// disk of the host. Idempotent; `activate` may follow once the device [is stopped](Self::is_stopped).
    fn reset(&mut self);

    /// Whether the last reset is over: nothing writes to buffers of the driver's any more. Only a request that is in the host
    /// keeps it from being so (see [`stop`]).
    fn is_stopped(&self) -> bool {
        true
    }

    /// Takes from the device what it works on, with no regard to the driver. `true`: nothing is in the host, and the device can
    /// be dropped. `false`: a request is; the device answers it, and what comes after it with errors, so that its driver can let
    /// go, and is asked again later.
    fn withdraw(&mut self) -> bool {
        true
    }
}

/// What a device gets to work with, from DRIVER_OK to reset.
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// Negotiated feature bits.
    pub features: u64,
    /// The device's queues, every one of them checked against the memory; a queue that the driver left out is `None`.
    pub queues: Vec<Option<ActiveQueue>>,
    /// How to reach the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Where the worker counts what it does.
    pub counts: Arc<Counts>,
}

/// A queue that the driver has made ready.
pub struct ActiveQueue {
    /// The rings.
    pub queue: virtio_queue::Queue,
    /// Written by KVM when the driver notifies this queue (ioeventfd, non-blocking).
    pub kick: EventFd,
}

/// The way from a device to its driver.
pub trait Interrupt: Send + Sync {
    /// Used buffers are in the queue. The caller has asked [`virtio_queue::QueueT::needs_notification`] first.
    fn notify_queue(&self, index: u16);

    /// The configuration space has changed.
    fn notify_config(&self);

    /// The device met something that it cannot go on from: sets DEVICE_NEEDS_RESET and tells the driver.
    fn needs_reset(&self);
}

/// Reads from a configuration space that is `space`, zeros behind it.
pub fn read_config(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (to, from) in data.iter_mut().zip(space.get(start..).unwrap_or_default()) {
        *to = *from;
    }
}

/// A device that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver made fewer queues ready than the device works with.
    #[error("driver left queue {0} unconfigured")]
    QueueMissing(u16),
    /// A request of the last activation is in the host. The driver has not waited for the end of its reset.
    #[error("a request from before the reset is still with the host")]
    Busy,
    /// The driver asks too often for what costs the host more than the guest.
    #[error("driver changes {0} too often")]
    TooOften(&'static str),
    /// The device loop would not take the worker.
    #[error("device loop refused the device's worker")]
    EventLoop(#[from] EventLoopError),
    /// A host resource of the device failed.
    #[error("cannot {action}")]
    Host {
        /// What was tried, as in "set the tap's offloads".
        action: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}
