//! The tap device (Linux Documentation/networking/tuntap.rst) behind its descriptor.
#![allow(unsafe_code)] // reason: ioctl(2)

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::header::HEADER_LEN;
use super::{ActivateError, NetError};
use crate::ratelimit::RateLimit;

/// A tap device that carries a virtio header before each frame.
pub struct Tap(OwnedFd);

impl Tap {
    /// Takes a tap that was opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR.
    pub fn new(fd: OwnedFd) -> Result<Self, NetError> {
        // SAFETY: All of ifreq's fields are plain data.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes an ifreq.
        unsafe { ioctl(&fd, libc::TUNGETIFF, (&raw mut request).cast()) }.map_err(NetError::NoTap)?;
        // SAFETY: TUNGETIFF fills in the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & (wanted | libc::IFF_TUN) != wanted {
            return Err(NetError::TapMode);
        }
        let mut header_len = libc::c_int::try_from(HEADER_LEN).unwrap_or(0);
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        unsafe { ioctl(&fd, libc::TUNSETVNETHDRSZ, (&raw mut header_len).cast()) }.map_err(NetError::TapSetup)?;
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(|error| NetError::TapSetup(error.into()))?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|error| NetError::TapSetup(error.into()))?;
        Ok(Self(fd))
    }

    /// Anything that keeps the borders of frames.
    #[cfg(any(test, feature = "testing"))]
    pub fn for_test(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sets TUN_F_* flags.
    fn set_offloads(&self, offloads: usize) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        unsafe { ioctl(&self.0, libc::TUNSETOFFLOAD, std::ptr::without_provenance_mut(offloads)) }
    }
}

/// The offloads that the tap has. Setting them takes the host kernel's lock for the interfaces of all network namespaces
/// (rtnl), and a hostile driver could ask for it all the time. So we set them only when they change, and a few times a minute
/// at most.
#[derive(Default)]
pub struct Offloads {
    set: Option<usize>,
    changes: RateLimit,
}

impl Offloads {
    /// Tells the host's kernel which unfinished frames the guest can take, by the features that were negotiated.
    pub fn set(&mut self, tap: &Tap, features: u64) -> Result<(), ActivateError> {
        let wanted = offloads(features);
        if self.set == Some(wanted) {
            return Ok(());
        }
        if self.changes.admit(Instant::now()).is_none() {
            return Err(ActivateError::TooOften("the network device's offloads"));
        }
        tap.set_offloads(wanted).map_err(|source| ActivateError::Host { action: "set the tap's offloads", source })?;
        self.set = Some(wanted);
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> libc::c_int {
        self.0.as_raw_fd()
    }
}

/// TUN_F_*. Segmentation needs checksums, and the kernel refuses it without; a driver that negotiated one without the
/// other broke section 5.1.3.1.
fn offloads(features: u64) -> usize {
    const TUN_F_CSUM: usize = 1;
    const TUN_F_TSO4: usize = 2;
    const TUN_F_TSO6: usize = 4;
    const TUN_F_TSO_ECN: usize = 8;
    let has = |bit: u32| features & (1 << bit) != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let (tcp4, tcp6) = (has(VIRTIO_NET_F_GUEST_TSO4), has(VIRTIO_NET_F_GUEST_TSO6));
    let mut offloads = TUN_F_CSUM;
    for (offload, wanted) in
        [(TUN_F_TSO4, tcp4), (TUN_F_TSO6, tcp6), (TUN_F_TSO_ECN, (tcp4 || tcp6) && has(VIRTIO_NET_F_GUEST_ECN))]
    {
        if wanted {
            offloads |= offload;
        }
    }
    offloads
}

/// # Safety
///
/// `argument` is what `request` expects.
unsafe fn ioctl(fd: &OwnedFd, request: libc::Ioctl, argument: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: By the caller's promise.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_09_segmentation_acknowledged_without_checksums_is_left_out() {
        assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_TSO4), 0);
        assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_CSUM), 3);
        assert_eq!(offloads(1 << VIRTIO_NET_F_GUEST_ECN | 1 << VIRTIO_NET_F_GUEST_CSUM), 1);
    }
}
