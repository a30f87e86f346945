//! Why a network device cannot be built.

use std::io;

use super::header::MIN_MTU;

/// A device that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Below what virtio allows.
    #[error("an MTU of {0} is too small for virtio-net; give it at least {MIN_MTU}")]
    Mtu(u16),
    /// TUNGETIFF failed.
    #[error("the network device's descriptor is not that of a tap with an interface")]
    NoTap(#[source] io::Error),
    /// Opened in another mode.
    #[error("the tap must be opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR")]
    TapMode,
    /// TUNSETVNETHDRSZ or fcntl(2).
    #[error("cannot set the tap's header size and make it non-blocking")]
    TapSetup(#[source] io::Error),
}
