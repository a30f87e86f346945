//! Where a pod's network is on the host, and how it comes into the guest when it is made only after the guest runs.
//!
//! That is so for pods with a user namespace under containerd 2: on runc their network namespace belongs to that user
//! namespace, so containerd leaves making it to the runtime and takes it from the sandbox's process. It gives the namespace to
//! CNI then, and only afterwards asks for containers; the first one is the moment to look for interfaces. It is so as well for
//! a container without a pod: Docker's hook finds the namespace by the container's process, and interfaces come and go while it
//! runs (`docker network connect`). Each becomes a device in a slot of the running machine.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::AddNetworkRequest;
use tokio::sync::{Mutex, MutexGuard, mpsc};

use super::agent::Agent;
use super::vm::Vm;
use super::{Sandbox, SandboxError};
use crate::network::{self, Handover, Network, NetworkError, netns};
use crate::spec::Netns;

/// How long a namespace has to be left alone before its new interfaces are carried into a guest that runs: who makes one
/// renames it, gives it addresses and routes and brings it up, in steps of milliseconds.
const SETTLED: Duration = Duration::from_millis(50);

/// A pod's network namespace. It is held: it exists, and its path in /proc is its own, whatever becomes of the path that CNI
/// has given.
#[derive(Debug)]
pub struct PodNetwork {
    namespace: Arc<OwnedFd>,
    /// CNI's path, if it has made the network before the sandbox: that is carried into the guest at boot.
    prepared: Option<PathBuf>,
    carried: Mutex<Carried>,
    handover: Handover,
}

/// What is in the guest. Held while interfaces come and go, so that each does so once.
#[derive(Debug, Default)]
struct Carried {
    /// The indexes of interfaces, with their devices' slots; those that were there at boot are never taken out.
    links: HashMap<u32, Option<u8>>,
    /// Whether changes are followed.
    followed: bool,
}

impl PodNetwork {
    /// Makes the namespace if that is the sandbox's part.
    pub async fn new(wanted: &Netns) -> Result<Self, NetworkError> {
        let (namespace, prepared) = match wanted {
            Netns::At(path) => (netns::open(path)?, Some(path.clone())),
            Netns::New => (netns::create().await?, None),
        };
        Ok(Self::at(namespace, prepared))
    }

    /// One of a test's own, in which nothing is.
    #[cfg(test)]
    pub async fn fake() -> Self {
        Self::at(netns::create().await.unwrap(), None)
    }

    fn at(namespace: OwnedFd, prepared: Option<PathBuf>) -> Self {
        Self { namespace: Arc::new(namespace), prepared, carried: Mutex::default(), handover: Handover::default() }
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

    /// What a guest boots with.
    pub async fn begin(&self) -> Result<Network, NetworkError> {
        if self.prepared.is_none() {
            return Ok(Network::default());
        }
        let mut carried = self.carried.lock().await;
        let network = network::attach(self.path(), HashSet::new()).await?;
        carried.links.extend(network.devices.iter().map(|device| (device.link, None)));
        Ok(network)
    }

    /// Removes what is in the namespace beside what was made there. The taps go with the VM.
    pub async fn release(&self) -> Result<(), NetworkError> {
        let carried: Vec<u32> = self.carried.lock().await.links.drain().map(|(link, _)| link).collect();
        network::detach(&self.path(), carried).await
    }

    /// Carries the interfaces of a namespace of the sandbox's own into the guest, once there are some, and its localhost.
    pub async fn attach(&self, vm: &Vm, agent: &Agent) -> Result<(), SandboxError> {
        let mut carried = self.carried.lock().await;
        if self.prepared.is_some() || !carried.links.is_empty() {
            return Ok(());
        }
        self.carry(vm, agent, &mut carried, HashSet::new()).await?;
        if !carried.links.is_empty() {
            self.serve_localhost(agent).await;
        }
        Ok(())
    }

    /// Leads the namespace's localhost to the guest's.
    pub async fn serve_localhost(&self, agent: &Agent) {
        if let Some(localhost) = network::localhost(&self.path()).await {
            tokio::spawn(localhost.serve(agent.clone()));
        }
    }

    /// Makes the guest's interfaces those of the namespace. Its localhost is not the guest's, but the other way round: servers
    /// for the container may listen there.
    async fn update(&self, vm: &Vm, agent: &Agent, take: Take) -> Result<(), SandboxError> {
        let mut carried = self.carried.lock().await;
        let there = network::links(&self.path()).await?;
        for link in carried.links.keys().copied().filter(|link| !there.contains_key(link)).collect::<Vec<_>>() {
            if let Some(Some(slot)) = carried.links.remove(&link) {
                let _ = agent.unbind_device(slot).await;
                vm.remove_device(slot).await?;
            }
        }
        let unready = there.into_iter().filter(|(_, is_up)| take == Take::Raised && !is_up).map(|(link, _)| link);
        self.carry(vm, agent, &mut carried, unready.collect()).await?;
        Ok(self.handover.update(&self.namespace, agent).await?)
    }

    /// Carries what is neither in the guest yet nor to be left where it is.
    async fn carry(
        &self,
        vm: &Vm,
        agent: &Agent,
        carried: &mut MutexGuard<'_, Carried>,
        mut left: HashSet<u32>,
    ) -> Result<(), SandboxError> {
        left.extend(carried.links.keys());
        let mut network = network::attach(self.path(), left).await?;
        if network.devices.is_empty() {
            return Ok(());
        }
        let devices = std::mem::take(&mut network.devices);
        let links: Vec<u32> = devices.iter().map(|device| device.link).collect();
        let mut slots = Vec::new();
        if let Err(error) = add(vm, agent, devices, network, &mut slots).await {
            for slot in slots {
                let _ = vm.remove_device(slot).await;
            }
            network::detach(&self.path(), links).await?;
            return Err(error);
        }
        carried.links.extend(links.into_iter().zip(slots.into_iter().map(Some)));
        Ok(())
    }
}

/// Which interfaces are carried.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Take {
    /// All: who has made them is done.
    All,
    /// Those that are up: who makes one may still be at it.
    Raised,
}

impl Sandbox {
    /// Carries interfaces into the guest that CNI has made since it was booted, if it makes them so late.
    pub async fn attach_network(&self) -> Result<(), SandboxError> {
        self.network.attach(&self.vm, &self.agent).await
    }

    /// Carries what a hook, or an engine before it starts the container, has made in a container's own namespace, and from then
    /// on what comes and goes there.
    pub async fn follow_network(self: &Arc<Self>) -> Result<(), SandboxError> {
        if self.network.prepared.is_some() {
            return Ok(());
        }
        self.network.update(&self.vm, &self.agent, Take::All).await?;
        if !std::mem::replace(&mut self.network.carried.lock().await.followed, true) {
            tokio::spawn(follow(self.clone()));
        }
        Ok(())
    }
}

/// Follows the links of a namespace to the VM's end. What fails is tried again with the next change.
async fn follow(sandbox: Arc<Sandbox>) {
    let (tell, mut changed) = mpsc::channel(1);
    let path = sandbox.network.path();
    let telling = async {
        if let Err(error) = netns::follow_links(&path, tell).await {
            tracing::warn!("changes of the container's network are not followed: {}", crate::pod::error::chain(&error));
        }
    };
    let following = async {
        while changed.recv().await.is_some() {
            while tokio::time::timeout(SETTLED, changed.recv()).await.is_ok_and(|told| told.is_some()) {}
            if let Err(error) = sandbox.network.update(&sandbox.vm, &sandbox.agent, Take::Raised).await {
                tracing::warn!("a change of the container's network is lost: {}", crate::pod::error::chain(&error));
            }
        }
    };
    tokio::select! {
        _ = futures::future::join(telling, following) => {}
        () = sandbox.vm.ended() => {}
    }
}

async fn add(
    vm: &Vm,
    agent: &Agent,
    devices: Vec<network::NetDevice>,
    network: Network,
    slots: &mut Vec<u8>,
) -> Result<(), SandboxError> {
    for device in devices {
        slots.push(vm.add_net(device).await?);
    }
    let request = AddNetworkRequest {
        slots: slots.iter().copied().map(u32::from).collect(),
        interfaces: network.interfaces,
        routes: network.routes,
        neighbours: network.neighbours,
        ..AddNetworkRequest::default()
    };
    Ok(agent.add_network(request).await?)
}
