//! The pod's network: CNI's interfaces, carried into the guest (ARCHITECTURE.md, bird's eye).
//!
//! Each Ethernet interface of CNI's namespace gets a tap beside it, and every frame that enters the one leaves by the
//! other (tc-mirred(8)). The interface keeps its addresses on the host, where the kubelet reads its counters, but the host's
//! stack sees no frame of it any more: the redirect is at ingress, ARP and neighbour discovery included. The namespace's
//! localhost, which no frame reaches, leads to the guest's as well ([`forward`]).
//!
//! All else that is in the namespace is made in the guest again: links that stand on others, addresses, neighbours, routes,
//! rules and kernel parameters ([`inspect`]). The shim writes down what has to be done ([`steps`]), and the agent does it,
//! once at the start and again whenever something has changed in the namespace ([`events`]).
//!
//! Everything here runs in a thread of its own that has entered the namespace; the daemon's threads never do.

mod connector;
mod entries;
mod error;
mod events;
mod firewall;
mod forward;
mod handover;
mod ingress;
mod inspect;
mod links;
pub mod netns;
pub mod policy;
mod redirect;
mod steps;
mod sysctls;
mod tap;
mod unsupported;

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{AddNetworkRequest, AddNetworkResponse, Firewall, NetworkDevice, NetworkStep};
use bulkhead_protocol::error::chain;
use links::{IFF_UP, Link};
use policy::Policy;

pub use connector::{Connector, NoConnection};
pub use error::NetworkError;
pub use events::Events;
pub use forward::Localhost;
pub use handover::{Handover, HandoverError};
pub use inspect::State;
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
#[derive(Debug)]
pub struct Network {
    /// One for each interface whose frames come from outside the namespace.
    pub devices: Vec<NetDevice>,
    /// What the agent has to do, but for what [`name_devices`] adds.
    pub request: AddNetworkRequest,
    /// What the guest has then.
    pub state: State,
    /// Where the kernel tells of changes since.
    pub events: Events,
}

/// Tells the agent which interfaces the devices are that have come into slots of the machine.
pub fn name_devices(request: &mut AddNetworkRequest, slots: &[(u8, u32)]) {
    let device = |&(slot, index): &(u8, u32)| NetworkDevice { slot: slot.into(), index, ..NetworkDevice::default() };
    request.devices = slots.iter().map(device).collect();
}

/// Which interfaces are carried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Take {
    /// All: who has made them is done.
    All,
    /// Those that are up: who makes one may still be at it.
    Raised,
}

impl Take {
    fn takes(self, link: &Link) -> bool {
        self == Self::All || link.flags & IFF_UP != 0
    }
}

/// Ties the namespace's interfaces to taps, unless there is something that a VM cannot be given and `policy` refuses that. On
/// an error nothing is left.
pub async fn attach(netns: PathBuf, take: Take, policy: Policy) -> Result<Network, NetworkError> {
    netns::run_in(&netns, move || attach_here(take, policy)).await?
}

/// The namespace's network as it is now, and taps for interfaces that are not among those with the indexes in `known`; or
/// which one can have none.
pub async fn look(netns: &Path, known: HashSet<u32>, take: Take) -> Result<(State, Vec<Come>), NetworkError> {
    netns::run_in(netns, move || look_here(known, take)).await?
}

/// An interface that has come, or the index of one that cannot.
pub type Come = Result<NetDevice, (u32, NetworkError)>;

/// What the agent has to do for a network that was as `old` to be as `new`, if anything. Devices that have come are in the
/// guest already.
pub async fn changes(netns: &Path, old: State, new: State) -> Result<Option<AddNetworkRequest>, NetworkError> {
    let read = async move || {
        let had = |link: &Link| old.link(link.index).is_some_and(Link::is_carried);
        let come: Vec<&Link> = new.carried().filter(|link| !had(link)).collect();
        let steps = steps::change(&old, &new, sysctls::read(&come, false));
        steps::fit(&steps)?;
        let rules = firewall::difference(old.firewall.as_ref(), new.firewall.as_ref());
        Ok((!steps.is_empty() || rules.is_some()).then(|| request(steps, rules)))
    };
    netns::run_in(netns, read).await?
}

fn request(steps: Vec<NetworkStep>, firewall: Option<Firewall>) -> AddNetworkRequest {
    AddNetworkRequest { steps, firewall: firewall.into(), ..AddNetworkRequest::default() }
}

/// Whether a pod may run without the rules of the request that its guest has not taken.
pub fn check(request: &AddNetworkRequest, answer: &AddNetworkResponse, policy: Policy) -> Result<(), NetworkError> {
    Ok(policy.check(&firewall::not_taken(&request.firewall, &answer.rules))?)
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

async fn attach_here(take: Take, policy: Policy) -> Result<Network, NetworkError> {
    let handle = netns::connect()?;
    // Before anything is read, so that no change is missed.
    let events = Events::open()?;
    let mut state = read_here(&handle).await?;
    state.leave(|link| !take.takes(link));
    policy.check(&state.unsupported)?;
    let links: Vec<&Link> = state.devices().collect();
    if links.len() > MAX_INTERFACES {
        return Err(NetworkError::TooMany(links.len(), MAX_INTERFACES));
    }
    let carried: Vec<&Link> = state.carried().collect();
    // A container that runs has set its own, which are not those of a namespace that is connected later.
    let steps = steps::first(&state, sysctls::read(&carried, take == Take::All));
    steps::fit(&steps)?;
    let mut devices = Vec::new();
    for link in links {
        match attach_link(&handle, link).await {
            Ok(device) => devices.push(device),
            Err(error) => {
                // No others: those of a namespace that another VM has are that VM's.
                for device in &devices {
                    redirect::remove(&handle, device.link).await;
                }
                return Err(error);
            }
        }
    }
    let request = request(steps, firewall::difference(Some(&Firewall::default()), state.firewall.as_ref()));
    Ok(Network { devices, request, state, events })
}

async fn read_here(handle: &rtnetlink::Handle) -> Result<State, NetworkError> {
    let mut state = State::read(&netns::socket()?).await?;
    let mut filters = Vec::new();
    for link in state.devices() {
        filters.extend(ingress::foreign(handle, link).await?);
    }
    state.unsupported.extend(filters);
    Ok(state)
}

async fn look_here(known: HashSet<u32>, take: Take) -> Result<(State, Vec<Come>), NetworkError> {
    let handle = netns::connect()?;
    let state = read_here(&handle).await?;
    let (mut come, count) = (Vec::new(), state.devices().count());
    for link in state.devices().filter(|link| take.takes(link) && !known.contains(&link.index)) {
        let device = match known.len() + come.len() {
            MAX_INTERFACES.. => Err(NetworkError::TooMany(count, MAX_INTERFACES)),
            _ => attach_link(&handle, link).await,
        };
        come.push(device.map_err(|error| (link.index, error)));
    }
    Ok((state, come))
}

async fn attach_link(handle: &rtnetlink::Handle, link: &Link) -> Result<NetDevice, NetworkError> {
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
    let mac = link.device_mac().unwrap_or_default();
    Ok(NetDevice { link: link.index, tap, mac, mtu })
}

async fn detach_here(links: Vec<u32>) -> Result<(), NetworkError> {
    let handle = netns::connect()?;
    for link in links {
        redirect::remove(&handle, link).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
