//! Where a pod's network is on the host, and how it comes into the guest when CNI makes it only after the sandbox runs.
//!
//! That is so for pods with a user namespace under containerd 2: on runc their network namespace belongs to that user
//! namespace, so containerd leaves making it to the runtime and takes it from the sandbox's process. It gives the namespace to
//! CNI then, and only afterwards asks for containers; the first one is the moment to look for interfaces. Each becomes a
//! device in a slot of the running machine.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::AddNetworkRequest;

use super::SandboxError;
use super::agent::Agent;
use super::vm::Vm;
use crate::network::policy::Policy;
use crate::network::{self, NetworkError, firewall, netns};
use crate::spec::Netns;

/// A pod's network.
#[derive(Debug)]
pub enum PodNetwork {
    /// Nothing but loopback.
    None,
    /// CNI's namespace, carried into the guest at boot.
    Prepared(PathBuf),
    /// A namespace of the sandbox's own.
    Own {
        /// Held, so that its path in /proc is this namespace's and no other's.
        namespace: OwnedFd,
        /// Whether its interfaces are in the guest. Held while they come, so that they do so once.
        attached: tokio::sync::Mutex<bool>,
        /// What becomes of what cannot be carried.
        policy: Policy,
    },
}

impl PodNetwork {
    /// Makes the namespace if that is the sandbox's part.
    pub async fn new(wanted: &Netns, policy: Policy) -> Result<Self, NetworkError> {
        Ok(match wanted {
            Netns::None => Self::None,
            Netns::At(path) => Self::Prepared(path.clone()),
            Netns::New => {
                Self::Own { namespace: netns::create().await?, attached: tokio::sync::Mutex::new(false), policy }
            }
        })
    }

    /// CNI's namespace, if it is complete when the sandbox is made.
    pub fn prepared(&self) -> Option<&Path> {
        match self {
            Self::Prepared(path) => Some(path),
            Self::None | Self::Own { .. } => None,
        }
    }

    /// The namespace.
    pub fn path(&self) -> Option<PathBuf> {
        match self {
            Self::None => None,
            Self::Prepared(path) => Some(path.clone()),
            Self::Own { namespace, .. } => Some(format!("/proc/self/fd/{}", namespace.as_raw_fd()).into()),
        }
    }

    /// Carries the interfaces of a namespace of the sandbox's own into the guest, once there are some. Nothing has to be
    /// undone when the pod ends: the taps go with the VM, and the namespace is this pod's alone.
    pub async fn attach(&self, vm: &Vm, agent: &Agent) -> Result<(), SandboxError> {
        let (Self::Own { attached, policy, .. }, Some(path)) = (self, self.path()) else { return Ok(()) };
        let mut attached = attached.lock().await;
        if *attached {
            return Ok(());
        }
        let mut network = network::attach(path.clone()).await?;
        if network.devices.is_empty() {
            return Ok(());
        }
        let (localhost, follower) = (network.localhost.take(), network.follower.take());
        let mut slots = Vec::new();
        let added = add(vm, agent, network, &mut slots, *policy).await;
        if added.is_err() {
            for slot in slots {
                let _ = vm.remove_device(slot).await;
            }
            network::detach(&path).await?;
        }
        added?;
        if let Some(localhost) = localhost {
            tokio::spawn(localhost.serve(agent.clone()));
        }
        if let Some(follower) = follower {
            tokio::spawn(follower.serve(path, agent.clone()));
        }
        *attached = true;
        Ok(())
    }
}

async fn add(
    vm: &Vm,
    agent: &Agent,
    network: network::Network,
    slots: &mut Vec<u8>,
    policy: Policy,
) -> Result<(), SandboxError> {
    policy.check(&network.unsupported)?;
    let result = agent.set_firewall(&network.firewall).await?;
    policy.check(&firewall::not_taken(&network.firewall, &result))?;
    for device in network.devices {
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
