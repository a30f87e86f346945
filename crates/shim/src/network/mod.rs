//! The pod's network: CNI's interfaces, carried into the guest (ARCHITECTURE.md, bird's eye).
//!
//! Each Ethernet interface of CNI's namespace gets a tap beside it, and every frame that enters the one leaves by the
//! other (tc-mirred(8)). The interface keeps its addresses on the host, where the kubelet reads its counters, but the host's
//! stack sees no frame of it any more: the redirect is at ingress, ARP and neighbour discovery included. The namespace's
//! localhost, which no frame reaches, leads to the guest's as well ([`forward`]).
//!
//! All else that is in the namespace is made in the guest again: links that stand on others, addresses, neighbours, routes,
//! rules and kernel parameters ([`inspect`]). The shim writes down what has to be done ([`steps`]), and the agent does it,
//! once at the start and again whenever something has changed in the namespace ([`follow`]).
//!
//! Everything here runs in a thread of its own that has entered the namespace; the daemon's threads never do.

mod entries;
mod follow;
mod forward;
mod inspect;
mod links;
pub mod netns;
mod redirect;
mod steps;
mod sysctls;
mod tap;
pub mod unsupported;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{AddNetworkRequest, NetworkDevice, NetworkStep};
use links::{Link, Role};

pub use follow::Follower;
pub use forward::Localhost;
pub use netns::NetnsError;
pub use unsupported::Unsupported;

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
    /// One for each interface whose frames come from outside the namespace.
    pub devices: Vec<NetDevice>,
    /// What the agent has to do.
    pub steps: Vec<NetworkStep>,
    /// What the guest cannot have.
    pub unsupported: Vec<Unsupported>,
    /// The namespace's localhost, for port-forward.
    pub localhost: Option<Localhost>,
    /// What follows the changes in the namespace.
    pub changes: Option<Follower>,
}

impl Network {
    /// What the agent is told, of devices that are in slots of the machine.
    pub fn request(&self, slots: &[(u8, u32)]) -> AddNetworkRequest {
        AddNetworkRequest {
            devices: slots.iter().map(|(slot, link)| network_device(*slot, *link)).collect(),
            steps: self.steps.clone(),
            ..AddNetworkRequest::default()
        }
    }
}

fn network_device(slot: u8, link: u32) -> NetworkDevice {
    NetworkDevice { slot: u32::from(slot), index: link, ..NetworkDevice::default() }
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
    // Before anything is read, so that no change is missed.
    let events = follow::events()?;
    let state = inspect::State::read(&netns::socket()?).await?;
    let links: Vec<&Link> = state.links.iter().filter(|link| link.role == Role::Device).collect();
    if links.len() > MAX_INTERFACES {
        return Err(NetworkError::TooMany(links.len()));
    }
    let carried: Vec<&Link> = state.links.iter().filter(|link| link.is_carried()).collect();
    let steps = steps::first(&state, sysctls::read(&carried, true));
    steps::fit(&steps)?;
    let mut network = Network { steps, ..Network::default() };
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
    network.unsupported.clone_from(&state.unsupported);
    for missing in &network.unsupported {
        tracing::warn!("the guest cannot have what is in the pod's network namespace: {}", missing.what);
    }
    network.changes = Some(Follower::new(events, state)?);
    // Without it the pod lacks port-forward and nothing else.
    network.localhost = Localhost::open()
        .inspect_err(|error| tracing::warn!("no port-forward for this pod: {}", crate::pod::error::chain(error)))
        .ok();
    Ok(network)
}

async fn attach_link(handle: &rtnetlink::Handle, link: &Link) -> Result<NetDevice, NetworkError> {
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
    let mac = link.device_mac().unwrap_or_default();
    Ok(NetDevice { link: link.index, tap, mac, mtu })
}

async fn detach_here() -> Result<(), NetworkError> {
    let handle = netns::connect()?;
    let state = inspect::State::read(&netns::socket()?).await?;
    for link in state.links.iter().filter(|link| link.role == Role::Device) {
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
    /// More than a message holds.
    #[error(
        "the pod's network namespace has more addresses, routes and rules than can be carried into a guest: {0} of them; \
         has somebody put a routing table of the Internet there?"
    )]
    TooMuch(usize),
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
    #[error("cannot list the {what} of the pod's network namespace")]
    Dump {
        /// What was asked for.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
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
