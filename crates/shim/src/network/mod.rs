//! The pod's network: CNI's interfaces, carried into the guest (ARCHITECTURE.md, bird's eye).
//!
//! Each Ethernet interface of CNI's namespace gets a tap beside it, and every frame that enters the one leaves by the
//! other (tc-mirred(8)). The guest takes over the MAC, addresses and routes. The interface keeps its addresses on the
//! host, where the kubelet reads its counters, but the host's stack sees no frame of it any more: the redirect is at
//! ingress, ARP and neighbour discovery included. The namespace's localhost, which no frame reaches, leads to the guest's
//! as well ([`forward`]).
//!
//! Everything here runs in a thread of its own that has entered the namespace; the daemon's threads never do.

mod forward;
mod handover;
mod inspect;
pub mod netns;
mod redirect;
mod tap;

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use rtnetlink::packet_route::link::LinkFlags;

use bulkhead_protocol::agent::{Interface, Neighbour, Route};

use crate::pod::error::chain;
pub use forward::Localhost;
pub use handover::{Handover, HandoverError};
pub use netns::NetnsError;

/// Most interfaces of a pod: each takes a device slot of the VM.
const MAX_INTERFACES: usize = 8;

/// A tap for the VMM.
#[derive(Debug)]
pub struct NetDevice {
    /// The interface in the namespace, by its index.
    pub link: u32,
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
}

/// Ties the namespace's interfaces to taps, but for those with the indexes in `known`. On an error nothing is left.
pub async fn attach(netns: PathBuf, known: HashSet<u32>) -> Result<Network, NetworkError> {
    netns::run_in(&netns, move || attach_here(known)).await?
}

/// The namespace's localhost, for port-forward. Without it the pod lacks that and nothing else.
pub async fn localhost(netns: &Path) -> Option<Localhost> {
    let opened = match netns::run_in(netns, async || Localhost::open()).await {
        Ok(opened) => opened.map_err(|error| chain(&error)),
        Err(error) => Err(chain(&error)),
    };
    opened.inspect_err(|error| tracing::warn!("no port-forward for this pod: {error}")).ok()
}

/// Removes the redirects of interfaces, by their indexes. The taps vanish with their descriptors.
pub async fn detach(netns: &Path, links: Vec<u32>) -> Result<(), NetworkError> {
    if links.is_empty() {
        return Ok(());
    }
    netns::run_in(netns, move || detach_here(links)).await?
}

/// The interfaces that there are, by their indexes, and whether they are up.
pub async fn links(netns: &Path) -> Result<HashMap<u32, bool>, NetworkError> {
    netns::run_in(netns, links_here).await?
}

async fn links_here() -> Result<HashMap<u32, bool>, NetworkError> {
    let what = "list the interfaces";
    let handle = netns::connect()?;
    let links: Vec<_> =
        handle.link().get().execute().try_collect().await.map_err(|source| NetworkError::Netlink { what, source })?;
    Ok(links.iter().map(|link| (link.header.index, link.header.flags.contains(LinkFlags::Up))).collect())
}

async fn attach_here(known: HashSet<u32>) -> Result<Network, NetworkError> {
    let handle = netns::connect()?;
    let mut links = inspect::links(&handle).await?;
    if links.len() > MAX_INTERFACES {
        return Err(NetworkError::TooMany(links.len()));
    }
    links.retain(|link| !known.contains(&link.index));
    if links.is_empty() {
        return Ok(Network::default());
    }
    let mut network = inspect::network(&handle, &links).await?;
    for link in &links {
        match attach_link(&handle, link).await {
            Ok(device) => network.devices.push(device),
            Err(error) => {
                // No others: those of a namespace that another VM has are that VM's.
                for device in &network.devices {
                    redirect::remove(&handle, device.link).await;
                }
                return Err(error);
            }
        }
    }
    Ok(network)
}

async fn attach_link(handle: &rtnetlink::Handle, link: &inspect::Link) -> Result<NetDevice, NetworkError> {
    let name = format!("tap-{}", link.index);
    let tap = tap::open(&name).map_err(|source| match source.kind() {
        // It has one, which vanishes with its VM.
        std::io::ErrorKind::ResourceBusy => NetworkError::Taken(link.name.clone()),
        _ => NetworkError::Tap { interface: link.name.clone(), source },
    })?;
    let index = tap::raise(handle, &name, link.mtu)
        .await
        .map_err(|source| NetworkError::Netlink { what: "bring up the tap", source })?;
    // Left by a shim that was killed, perhaps.
    redirect::remove(handle, link.index).await;
    for (from, to) in [(link.index, index), (index, link.index)] {
        if let Err(source) = redirect::add(handle, from, to).await {
            redirect::remove(handle, link.index).await;
            return Err(NetworkError::Redirect { interface: link.name.clone(), source });
        }
    }
    let mtu = u16::try_from(link.mtu).unwrap_or(u16::MAX);
    Ok(NetDevice { link: link.index, tap, mac: link.mac, mtu })
}

async fn detach_here(links: Vec<u32>) -> Result<(), NetworkError> {
    let handle = netns::connect()?;
    for link in links {
        redirect::remove(&handle, link).await;
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
    /// Another container's.
    #[error(
        "interface {0} is in another VM, and two VMs cannot share a network namespace; give the container a network of its own, or make a pod of both"
    )]
    Taken(String),
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
