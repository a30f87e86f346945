//! virtio-net (section 5.1) over a tap, in this process: no vhost-net, whose kernel code the guest would reach
//! (ARCHITECTURE.md, D5).
//!
//! One queue pair, no control queue: the guest's MAC address is given, and it sees every frame that the tap delivers.
//! Frames go between guest memory and tap without a copy of ours; [`header`] checks what the guest asks to be done with
//! a frame, [`reception`] puts the host's TCP segments together, [`worker`] runs in the device loop.

mod error;
mod header;
mod reception;
mod segment;
mod tap;
mod worker;

#[cfg(test)]
pub(super) mod tests;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

pub use self::error::NetError;
use self::header::MIN_MTU;
use self::tap::{Offloads, Tap};
use self::worker::Worker;
use super::{ActivateError, Activation, VirtioDevice, read_config};
use crate::event_loop::{EventLoop, WorkerGuard};

/// Receive and transmit. Linux puts one buffer of 1.5 KiB into each slot of the first; 256 take several segmented frames.
const QUEUE_SIZES: [u16; 2] = [256, 256];

const FEATURES: [u32; 12] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
];

/// The device.
pub struct Net {
    tap: Arc<Tap>,
    offloads: Offloads,
    mac: [u8; 6],
    mtu: u16,
    event_loop: EventLoop,
    worker: Option<WorkerGuard>,
}

impl Net {
    /// A device over a tap that was opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR. The guest is told `mac` and `mtu`.
    pub fn new(tap: OwnedFd, mac: [u8; 6], mtu: u16, event_loop: EventLoop) -> Result<Self, NetError> {
        if mtu < MIN_MTU {
            return Err(NetError::Mtu(mtu));
        }
        Ok(Self { tap: Arc::new(Tap::new(tap)?), offloads: Offloads::default(), mac, mtu, event_loop, worker: None })
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu.
        let mut space = self.mac.to_vec();
        space.extend([VIRTIO_NET_S_LINK_UP.to_le_bytes()[0], 0]);
        space.extend(1_u16.to_le_bytes());
        space.extend(self.mtu.to_le_bytes());
        read_config(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.reset();
        self.offloads.set(&self.tap, activation.features)?;
        let worker = Worker::new(Arc::clone(&self.tap), self.mtu, activation)?;
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The device's worker over anything that keeps the borders of frames: a tap takes a network namespace to make.
#[cfg(feature = "testing")]
pub fn worker_over(
    wire: OwnedFd,
    mtu: u16,
    activation: Activation,
) -> Result<crate::event_loop::Worker, ActivateError> {
    Ok(Box::new(Worker::new(Arc::new(Tap::for_test(wire)), mtu, activation)?))
}
