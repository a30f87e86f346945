//! The pod's network: CNI's interfaces, carried into the guest (ARCHITECTURE.md, bird's eye).
//!
//! Each Ethernet interface of CNI's namespace gets a tap beside it, and every frame that enters the one leaves by the
//! other (tc-mirred(8)). The guest takes over the MAC, addresses and routes. The interface keeps its addresses on the
//! host, where the kubelet reads its counters, but the host's stack sees no frame of it any more: the redirect is at
//! ingress, ARP and neighbour discovery included. The namespace's localhost, which no frame reaches, leads to the guest's
//! as well ([`forward`]).
//!
//! Everything here runs in a thread of its own that has entered the namespace; the daemon's threads never do.

pub mod firewall;
mod forward;
mod ingress;
mod inspect;
pub mod netns;
pub mod policy;
mod redirect;
mod tap;
pub mod unsupported;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{Firewall, Interface, Neighbour, Route};

pub use forward::Localhost;
pub use netns::NetnsError;
use unsupported::Unsupported;

/// Most interfaces of a pod: each takes a device slot of the VM.
const MAX_INTERFACES: usize = 8;

/// A tap for the VMM.
#[derive(Debug)]
pub struct NetDevice {
    /// The tap. It vanishes with its last descriptor.
    pub tap: OwnedFd,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The guest's MTU.
    pub mtu: u16,
}

/// The pod's network as the guest is told, and the taps that carry it.
#[derive(Debug, Default)]
pub struct Network {
    /// One for each interface, in the same order.
    pub devices: Vec<NetDevice>,
    /// Interfaces with their addresses.
    pub interfaces: Vec<Interface>,
    /// Routes of the main table, those on link first.
    pub routes: Vec<Route>,
    /// Permanent neighbours.
    pub neighbours: Vec<Neighbour>,
    /// Rules of the packet filter.
    pub firewall: Firewall,
    /// Follows them.
    pub follower: Option<firewall::Follower>,
    /// What is there and cannot be carried.
    pub unsupported: Vec<Unsupported>,
    /// The namespace's localhost, for port-forward.
    pub localhost: Option<Localhost>,
}

/// Ties the namespace's interfaces to taps. On an error nothing is left.
pub async fn attach(netns: PathBuf) -> Result<Network, NetworkError> {
    netns::run_in(&netns, attach_here).await?
}

/// Removes the redirects. The taps vanish with their descriptors. A namespace that is gone is no error.
pub async fn detach(netns: &Path) -> Result<(), NetworkError> {
    if !netns.exists() {
        return Ok(());
    }
    netns::run_in(netns, detach_here).await?
}

async fn attach_here() -> Result<Network, NetworkError> {
    let handle = netns::connect()?;
    let links = inspect::links(&handle).await?;
    if links.len() > MAX_INTERFACES {
        return Err(NetworkError::TooMany(links.len()));
    }
    let mut network = inspect::network(&handle, &links).await?;
    let follower = firewall::Follower::open();
    let (firewall, unsupported) = firewall::read();
    network.follower = follower.map(|follower| follower.begin_with(&firewall));
    network.firewall = firewall;
    network.unsupported.extend(unsupported);
    for link in &links {
        network.unsupported.extend(ingress::foreign(&handle, link).await?);
    }
    for link in &links {
        match attach_link(&handle, link).await {
            Ok(device) => network.devices.push(device),
            Err(error) => {
                for link in &links {
                    redirect::remove(&handle, link.index).await;
                }
                return Err(error);
            }
        }
    }
    // Without it the pod lacks port-forward and nothing else.
    network.localhost = Localhost::open()
        .inspect_err(|error| tracing::warn!("no port-forward for this pod: {}", crate::pod::error::chain(error)))
        .ok();
    Ok(network)
}

async fn attach_link(handle: &rtnetlink::Handle, link: &inspect::Link) -> Result<NetDevice, NetworkError> {
    let name = format!("tap-{}", link.index);
    let tap = tap::open(&name).map_err(|source| NetworkError::Tap { interface: link.name.clone(), source })?;
    let index = tap::raise(handle, &name, link.mtu)
        .await
        .map_err(|source| NetworkError::Netlink { what: "bring up the tap", source })?;
    // Left by a shim that was killed, perhaps.
    redirect::remove(handle, link.index).await;
    for (from, to) in [(link.index, index), (index, link.index)] {
        redirect::add(handle, from, to)
            .await
            .map_err(|source| NetworkError::Redirect { interface: link.name.clone(), source })?;
    }
    let mtu = u16::try_from(link.mtu).unwrap_or(u16::MAX);
    Ok(NetDevice { tap, mac: link.mac, mtu })
}

async fn detach_here() -> Result<(), NetworkError> {
    let handle = netns::connect()?;
    for link in inspect::links(&handle).await? {
        redirect::remove(&handle, link.index).await;
    }
    Ok(())
}

/// The pod's network cannot be carried into the guest.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// More interfaces than slots.
    #[error("the pod has {0} network interfaces; at most {MAX_INTERFACES} are supported")]
    TooMany(usize),
    /// /dev/net/tun.
    #[error("cannot create a tap for interface {interface}; is the kernel module tun loaded?")]
    Tap {
        /// The pod's interface.
        interface: String,
        /// open(2) or ioctl(2).
        #[source]
        source: std::io::Error,
    },
    /// tc.
    #[error(
        "cannot redirect interface {interface}; are the kernel modules sch_ingress, cls_matchall and act_mirred there?"
    )]
    Redirect {
        /// The pod's interface.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// rtnetlink(7).
    #[error("cannot {what}")]
    Netlink {
        /// What was asked.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
}

#[cfg(test)]
mod tests;
