//! Changes in the pod's network namespace while the pod runs, of CNI or of a daemon of the node, carried into the guest.
//!
//! A notification only says that something has changed: all is read again, and the difference told to the agent. So it is no
//! loss if notifications are dropped.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use bulkhead_protocol::agent::{AddNetworkRequest, NetworkDevice};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;

use super::inspect::State;
use super::links::{IFF_UP, Link, Role};
use super::{NetDevice, NetnsError, NetworkError, attach_link, netns, network_device, redirect, steps, sysctls};
use crate::pod::error::chain;
use crate::sandbox::Vm;
use crate::sandbox::agent::Agent;

/// `RTNLGRP_LINK`, `_NEIGH`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE` and `_IPV6_RULE` of
/// linux/rtnetlink.h.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// How long nothing may change before what has changed is read: a plugin makes many changes one after the other.
const QUIET: Duration = Duration::from_millis(50);

/// How long it may be read later than it has changed, however much changes.
const LATEST: Duration = Duration::from_millis(500);

/// Opens a socket on which the kernel tells of changes in the calling thread's namespace.
pub fn events() -> Result<OwnedFd, NetnsError> {
    let open = || {
        // No protocol is NETLINK_ROUTE, whose number is zero.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        let groups = GROUPS.iter().fold(0, |groups, group| groups | 1 << (group - 1));
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(socket)
    };
    open().map_err(|error: Errno| NetnsError::Socket(error.into()))
}

/// Follows a namespace's changes.
#[derive(Debug)]
pub struct Follower {
    events: OwnedFd,
    netns: OwnedFd,
    /// As the guest has it.
    state: State,
}

impl Follower {
    /// Of the calling thread's namespace.
    pub fn new(events: OwnedFd, state: State) -> Result<Self, NetnsError> {
        Ok(Self { events, netns: netns::current()?, state })
    }

    /// Carries changes into the guest until the VM ends. `slots` has the interfaces that the guest has devices for.
    pub async fn follow(self, vm: Vm, agent: Agent, slots: Vec<(u8, u32)>) {
        let slots = slots.into_iter().map(|(slot, link)| (link, slot)).collect();
        let mut guest = Guest { vm, agent, netns: self.netns, state: self.state, slots };
        let vm = guest.vm.clone();
        let events = match netns::watch(self.events) {
            Ok(events) => events,
            Err(error) => return tracing::error!("changes of the pod's network are not followed: {}", chain(&error)),
        };
        let following = async {
            while changed(&events).await.is_ok() {
                settled(&events).await;
                if let Err(error) = guest.update().await {
                    tracing::warn!("a change of the pod's network is not in its guest: {error}");
                }
            }
        };
        tokio::select! {
            () = following => {}
            () = vm.ended() => {}
        }
    }
}

/// A guest, and what it has of its namespace.
struct Guest {
    vm: Vm,
    agent: Agent,
    netns: OwnedFd,
    state: State,
    /// The slots of interfaces, by their indexes in the namespace.
    slots: HashMap<u32, u8>,
}

impl Guest {
    async fn update(&mut self) -> Result<(), String> {
        let there: HashSet<u32> = self.slots.keys().copied().collect();
        let (mut now, come) = self.in_netns(async move || come(&there).await).await?;
        let devices = self.plug(&now, come).await;
        self.unplug(&now).await;
        // A device that the guest does not have is not missing because of what it has.
        now.leave(|link| !self.slots.contains_key(&link.index));
        let old = std::mem::replace(&mut self.state, now.clone());
        let read = async move || {
            let had = |link: &Link| old.link(link.index).is_some_and(Link::is_carried);
            let come: Vec<&Link> = now.links.iter().filter(|link| link.is_carried() && !had(link)).collect();
            Ok(steps::change(&old, &now, sysctls::read(&come, false)))
        };
        let steps = self.in_netns(read).await?;
        if steps.is_empty() && devices.is_empty() {
            return Ok(());
        }
        let request = AddNetworkRequest { devices, steps, ..AddNetworkRequest::default() };
        self.agent.add_network(request).await.map_err(|error| chain(&error))
    }

    async fn in_netns<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> Result<T, String>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, NetworkError>>,
    {
        let path = format!("/proc/self/fd/{}", self.netns.as_raw_fd());
        let done = netns::run_in(path.as_ref(), work).await.map_err(|error| chain(&error))?;
        done.map_err(|error| chain(&error))
    }

    /// Puts the devices of new interfaces into slots of the machine.
    async fn plug(&mut self, now: &State, come: Vec<NetDevice>) -> Vec<NetworkDevice> {
        let mut devices = Vec::new();
        for device in come {
            let link = device.link;
            match self.vm.add_net(device).await {
                Ok(slot) => {
                    self.slots.insert(link, slot);
                    devices.push(network_device(slot, link));
                }
                Err(error) => {
                    let name = now.link(link).map(|link| link.name.as_str()).unwrap_or_default();
                    tracing::warn!("the guest does not get interface {name}: {}", chain(&error));
                    let _ = self.in_netns(async move || remove_redirect(link).await).await;
                }
            }
        }
        devices
    }

    /// Empties the slots of interfaces that are gone.
    async fn unplug(&mut self, now: &State) {
        let gone: Vec<u32> = self.slots.keys().copied().filter(|link| now.link(*link).is_none()).collect();
        for link in gone {
            let Some(slot) = self.slots.remove(&link) else { continue };
            let unbound = self.agent.unbind_device(slot).await.map_err(|error| chain(&error));
            let removed = self.vm.remove_device(slot).await.map_err(|error| chain(&error));
            if let Err(error) = unbound.and(removed) {
                tracing::warn!("the device of an interface that is gone is still in the guest: {error}");
            }
        }
    }
}

/// The namespace's network, and taps for the interfaces that have come up and have none.
async fn come(there: &HashSet<u32>) -> Result<(State, Vec<NetDevice>), NetworkError> {
    let handle = netns::connect()?;
    let state = State::read(&netns::socket()?).await?;
    let is_new = |link: &&Link| link.role == Role::Device && link.flags & IFF_UP != 0 && !there.contains(&link.index);
    let mut devices = Vec::new();
    for link in state.links.iter().filter(is_new) {
        match attach_link(&handle, link).await {
            Ok(device) => devices.push(device),
            Err(error) => tracing::warn!("the guest does not get interface {}: {}", link.name, chain(&error)),
        }
    }
    Ok((state, devices))
}

async fn remove_redirect(link: u32) -> Result<(), NetworkError> {
    redirect::remove(&netns::connect()?, link).await;
    Ok(())
}

/// Waits until something has changed. That the kernel has dropped notifications is a change, too.
pub(super) async fn changed(events: &AsyncFd<OwnedFd>) -> std::io::Result<()> {
    loop {
        let mut ready = events.readable().await?;
        let told = drain(events.get_ref());
        ready.clear_ready();
        if told? {
            return Ok(());
        }
    }
}

/// Reads what is there: whether it is anything.
fn drain(events: &OwnedFd) -> std::io::Result<bool> {
    let (mut buffer, mut told) = ([0; 64], false);
    loop {
        // What a notification says beyond the buffer is cut off, as none of it is looked at.
        match rustix::net::recv(events, &mut buffer, RecvFlags::DONTWAIT) {
            Ok(_) | Err(Errno::NOBUFS) => told = true,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(told),
            Err(error) => return Err(error.into()),
        }
    }
}

async fn settled(events: &AsyncFd<OwnedFd>) {
    let quiet = async { while tokio::time::timeout(QUIET, changed(events)).await.is_ok() {} };
    let _ = tokio::time::timeout(LATEST, quiet).await;
}
