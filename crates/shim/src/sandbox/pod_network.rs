//! Where a pod's network is on the host, and how it comes into the guest.
//!
//! What CNI has made before the sandbox is there at boot. Pods with a user namespace get theirs later under containerd 2: on runc
//! their network namespace belongs to that user namespace, so containerd leaves making it to the runtime and takes it from the
//! sandbox's process. It gives the namespace to CNI then, and only afterwards asks for containers; the first one is the moment
//! to look for interfaces. It is so as well for a container without a pod: Docker's hook finds the namespace by the container's
//! process.
//!
//! From then on the guest follows what changes in the namespace, interfaces that come and go included (`docker network
//! connect`): each is a device in a slot of the running machine.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_protocol::agent::{AddNetworkRequest, AddNetworkResponse};
use bulkhead_protocol::error::chain;
use tokio::sync::Mutex;

use super::SandboxError;
use super::agent::Agent;
use super::vm::Vm;
use crate::deadlines::{Deadline, Operation};
use crate::network::policy::Policy;
use crate::network::{self, Events, Handover, NetDevice, Network, NetworkError, State, Take, netns};
use crate::retry::GrowingPause;
use crate::spec::Netns;

/// The guest, and how long it may take in all for what it is asked.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// Its VM.
    pub vm: &'a Vm,
    /// Its agent.
    pub agent: &'a Agent,
    /// For all of it together.
    pub deadline: Deadline,
}

/// A pod's network namespace. We hold it open: so it goes on to exist, and is reached by its descriptor's path in /proc, even
/// when CNI's path is gone.
#[derive(Debug)]
pub struct PodNetwork {
    namespace: Arc<OwnedFd>,
    /// CNI's path, if it has made the network before the sandbox: that is carried into the guest at boot.
    prepared: Option<PathBuf>,
    /// What becomes of a pod with something that a VM cannot be given.
    policy: Policy,
    carried: Mutex<Carried>,
    handover: Handover,
}

/// What is in the guest. Held while it changes, so that each change is made once.
#[derive(Debug, Default)]
struct Carried {
    /// The interfaces that are tied to taps, by their indexes, with the slots of their devices.
    slots: HashMap<u32, Option<u8>>,
    /// Devices of which the agent has not been told yet: a request has failed.
    unnamed: Vec<(u8, u32)>,
    /// Interfaces that cannot be carried, as long as they are there. Trying makes a change of its own.
    refused: HashSet<u32>,
    /// The namespace as the guest has it, once it has anything of it.
    state: Option<State>,
    /// Where changes since are told, until somebody follows them.
    events: Option<Events>,
    followed: bool,
}

impl Carried {
    fn begin(&mut self, state: State, events: Events) {
        self.state = Some(state);
        self.events = Some(events).filter(|_| !self.followed);
    }
}

impl PodNetwork {
    /// Makes the namespace if that is the sandbox's part.
    pub async fn new(wanted: &Netns, policy: Policy) -> Result<Self, NetworkError> {
        let (namespace, prepared) = match wanted {
            Netns::At(path) => (netns::open(path)?, Some(path.clone())),
            Netns::New => (netns::create().await?, None),
        };
        Ok(Self::at(namespace, prepared, policy))
    }

    /// One of a test's own, in which nothing is.
    #[cfg(test)]
    pub async fn fake() -> Self {
        Self::at(netns::create().await.unwrap(), None, Policy::Refuse)
    }

    fn at(namespace: OwnedFd, prepared: Option<PathBuf>, policy: Policy) -> Self {
        let (carried, handover) = (Mutex::default(), Handover::default());
        Self { namespace: Arc::new(namespace), prepared, policy, carried, handover }
    }

    /// The namespace, for as long as this exists.
    pub fn path(&self) -> PathBuf {
        netns::path_of(&self.namespace)
    }

    /// The namespace itself.
    pub fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// The path that CNI has given.
    pub fn prepared(&self) -> Option<&Path> {
        self.prepared.as_deref()
    }

    /// What a guest boots with: its devices, and what the agent has to do.
    pub async fn begin(&self) -> Result<(Vec<NetDevice>, AddNetworkRequest), NetworkError> {
        if self.prepared.is_none() {
            return Ok((Vec::new(), AddNetworkRequest::default()));
        }
        let mut carried = self.carried.lock().await;
        let Network { devices, request, state, events } = network::attach(self.path(), Take::All, self.policy).await?;
        carried.slots.extend(devices.iter().map(|device| (device.link, None)));
        carried.begin(state, events);
        Ok((devices, request))
    }

    /// Whether the pod may run without what its guest has not taken of a request.
    pub fn check(&self, request: &AddNetworkRequest, answer: &AddNetworkResponse) -> Result<(), NetworkError> {
        network::check(request, answer, self.policy)
    }

    /// Serves what [`Self::begin`] has carried: the devices are in those slots.
    pub async fn booted(self: &Arc<Self>, vm: &Vm, agent: &Agent, slots: &[(u8, u32)]) {
        if self.prepared.is_some() {
            self.carried.lock().await.slots.extend(slots.iter().map(|(slot, link)| (*link, Some(*slot))));
            self.serve_localhost(agent).await;
            self.follow(vm, agent, false).await;
        }
    }

    /// Removes what is in the namespace beside what was made there. The taps go with the VM.
    pub async fn release(&self) -> Result<(), NetworkError> {
        let carried: Vec<u32> = self.carried.lock().await.slots.drain().map(|(link, _)| link).collect();
        network::detach(&self.path(), carried).await
    }

    /// Carries the network of a namespace of the sandbox's own into the guest, once there is something, and its localhost.
    pub async fn attach(self: &Arc<Self>, guest: Guest<'_>) -> Result<(), SandboxError> {
        if self.prepared.is_some() {
            return Ok(());
        }
        let mut carried = self.carried.lock().await;
        if carried.state.is_some() {
            return Ok(());
        }
        self.carry(guest, &mut carried, Take::All).await?;
        if carried.state.is_some() {
            drop(carried);
            self.serve_localhost(guest.agent).await;
            self.follow(guest.vm, guest.agent, false).await;
        }
        Ok(())
    }

    /// Carries what there is in a namespace of the sandbox's own, and from then on what comes and goes there, servers for the
    /// container included.
    pub async fn attach_and_follow(self: &Arc<Self>, guest: Guest<'_>) -> Result<(), SandboxError> {
        if self.prepared.is_some() {
            return Ok(());
        }
        self.update(guest, Take::All, true).await?;
        self.hand_over(guest.deadline, guest.agent).await?;
        self.follow(guest.vm, guest.agent, true).await;
        Ok(())
    }

    /// Leads the namespace's localhost to the guest's.
    async fn serve_localhost(&self, agent: &Agent) {
        if let Some(localhost) = network::localhost(&self.path()).await {
            tokio::spawn(localhost.serve(agent.clone()));
        }
    }

    /// Makes the guest's network that of the namespace; its rules only if they are said to have changed.
    async fn update(&self, guest: Guest<'_>, take: Take, rules: bool) -> Result<(), SandboxError> {
        let mut carried = self.carried.lock().await;
        match carried.state.clone() {
            None => self.carry(guest, &mut carried, take).await,
            Some(old) => self.change(guest, &mut carried, old, take, rules).await,
        }
    }

    /// Carries a namespace, unless there is nothing in it. On an error nothing of it is in the guest.
    async fn carry(&self, guest: Guest<'_>, carried: &mut Carried, take: Take) -> Result<(), SandboxError> {
        let Guest { vm, agent, deadline } = guest;
        let Network { devices, mut request, state, events } = network::attach(self.path(), take, self.policy).await?;
        if state.is_empty() {
            carried.events = Some(events).filter(|_| !carried.followed);
            return Ok(());
        }
        let links: Vec<u32> = devices.iter().map(|device| device.link).collect();
        let mut slots = Vec::new();
        let added = async {
            for device in devices {
                let link = device.link;
                slots.push((vm.add_net(deadline, device).await?, link));
            }
            network::name_devices(&mut request, &slots);
            let answer = agent.add_network(deadline, &request).await?;
            Ok::<_, SandboxError>(self.check(&request, &answer)?)
        };
        if let Err(error) = added.await {
            for (slot, _) in slots {
                let _ = agent.unbind_device(deadline, slot).await;
                let _ = vm.remove_device(deadline, slot).await;
            }
            network::detach(&self.path(), links).await?;
            return Err(error);
        }
        carried.slots.extend(slots.into_iter().map(|(slot, link)| (link, Some(slot))));
        carried.begin(state, events);
        Ok(())
    }

    /// Carries what is other than it was. What cannot be is told in the log, and the rest goes on.
    async fn change(
        &self,
        guest: Guest<'_>,
        carried: &mut Carried,
        old: State,
        take: Take,
        rules: bool,
    ) -> Result<(), SandboxError> {
        let Guest { vm, agent, deadline } = guest;
        let known: HashSet<u32> = carried.slots.keys().chain(&carried.refused).copied().collect();
        let (mut now, come) = network::look(&self.path(), known, take).await?;
        carried.refused.retain(|link| now.link(*link).is_some());
        for device in come {
            let (link, error) = match device {
                Ok(device) => {
                    let link = device.link;
                    match vm.add_net(deadline, device).await {
                        Ok(slot) => {
                            carried.slots.insert(link, Some(slot));
                            carried.unnamed.push((slot, link));
                            continue;
                        }
                        Err(error) => {
                            network::detach(&self.path(), vec![link]).await?;
                            (link, chain(&error))
                        }
                    }
                }
                Err((link, error)) => (link, chain(&error)),
            };
            carried.refused.insert(link);
            let name = now.link(link).map(|link| link.name.as_str()).unwrap_or_default();
            tracing::warn!("interface {name} of the pod cannot be carried into the guest: {error}");
        }
        let gone: Vec<u32> = carried.slots.keys().copied().filter(|link| now.link(*link).is_none()).collect();
        for link in gone {
            if let Some(Some(slot)) = carried.slots.remove(&link) {
                carried.unnamed.retain(|(_, unnamed)| *unnamed != link);
                let unbound = agent.unbind_device(deadline, slot).await.map_err(|error| chain(&error));
                let removed = vm.remove_device(deadline, slot).await.map_err(|error| chain(&error));
                if let Err(error) = unbound.and(removed) {
                    tracing::warn!(
                        "an interface has left the pod's network namespace, but its device cannot be removed from the guest: {error}"
                    );
                }
            }
        }
        // A device that the guest does not have is not missing because of what it has.
        now.leave(|link| !carried.slots.contains_key(&link.index));
        // The guest keeps the rules that it has as long as nobody knows others.
        if !rules || now.firewall.is_none() {
            now.firewall.clone_from(&old.firewall);
        }
        // The pod runs already: all that can be done is to tell.
        let unsupported = now.unsupported.iter().filter(|one| !old.unsupported.contains(one)).cloned();
        let _ = Policy::Warn.check(&unsupported.collect::<Vec<_>>());
        let request = network::changes(&self.path(), old, now.clone()).await?;
        if request.is_some() || !carried.unnamed.is_empty() {
            let mut request = request.unwrap_or_default();
            network::name_devices(&mut request, &carried.unnamed);
            let answer = agent.add_network(deadline, &request).await?;
            carried.unnamed.clear();
            let _ = network::check(&request, &answer, Policy::Warn);
        }
        carried.state = Some(now);
        Ok(())
    }

    /// Follows the namespace to the VM's end, unless somebody does. What fails is tried again after a pause. `hands_over` says whether servers for the container may listen in the namespace.
    async fn follow(self: &Arc<Self>, vm: &Vm, agent: &Agent, hands_over: bool) {
        let events = {
            let mut carried = self.carried.lock().await;
            let events = carried.events.take();
            carried.followed |= events.is_some();
            events.map(Events::watched)
        };
        let (network, vm, agent) = (self.clone(), vm.clone(), agent.clone());
        let events = match events {
            Some(Ok(events)) => events,
            Some(Err(error)) => {
                return tracing::warn!("the guest will not follow changes of the pod's network: {}", chain(&error));
            }
            None => return,
        };
        tokio::spawn(async move {
            let following = async {
                let (mut growing, mut pause, mut rules) = (GrowingPause::default(), None, false);
                loop {
                    match pause {
                        None => match events.next().await {
                            Ok(told) => rules |= told,
                            Err(_) => break,
                        },
                        // What is told meanwhile is read with the next change; rules may be among it.
                        Some(pause) => {
                            tokio::time::sleep(pause).await;
                            rules = true;
                        }
                    }
                    let deadline = Deadline::begin(Operation::UpdateNetwork);
                    let guest = Guest { vm: &vm, agent: &agent, deadline };
                    let mut updated = network.update(guest, Take::Raised, rules).await;
                    if hands_over && updated.is_ok() {
                        updated = network.hand_over(deadline, &agent).await;
                    }
                    let failed = updated.inspect_err(|error| {
                        tracing::warn!(
                            "a change of the pod's network could not be made in the guest and is tried again: {}",
                            chain(error)
                        );
                    });
                    pause = match failed {
                        Ok(()) => {
                            rules = false;
                            growing.worked();
                            None
                        }
                        Err(_) => Some(growing.failed()),
                    };
                }
            };
            tokio::select! {
                () = following => {}
                () = vm.ended() => {}
            }
        });
    }

    /// Lets the guest reach servers for the container that listen in the namespace.
    async fn hand_over(&self, deadline: Deadline, agent: &Agent) -> Result<(), SandboxError> {
        Ok(self.handover.update(deadline, &self.namespace, agent).await?)
    }
}
