//! Where a pod's network is on the host, and how it comes into the guest when CNI makes it only after the sandbox runs.
//!
//! That is so for pods with a user namespace under containerd 2: on runc their network namespace belongs to that user
//! namespace, so containerd leaves making it to the runtime and takes it from the sandbox's process. It gives the namespace to
//! CNI then, and only afterwards asks for containers; the first one is the moment to look for interfaces. Each becomes a
//! device in a slot of the running machine.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::SandboxError;
use super::agent::Agent;
use super::vm::Vm;
use crate::network::{self, NetworkError, netns};
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
    },
}

impl PodNetwork {
    /// Makes the namespace if that is the sandbox's part.
    pub async fn new(wanted: &Netns) -> Result<Self, NetworkError> {
        Ok(match wanted {
            Netns::None => Self::None,
            Netns::At(path) => Self::Prepared(path.clone()),
            Netns::New => Self::Own { namespace: netns::create().await?, attached: tokio::sync::Mutex::new(false) },
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
        let (Self::Own { attached, .. }, Some(path)) = (self, self.path()) else { return Ok(()) };
        let mut attached = attached.lock().await;
        if *attached {
            return Ok(());
        }
        let mut network = network::attach(path.clone()).await?;
        if network.devices.is_empty() {
            return Ok(());
        }
        let (localhost, changes) = (network.localhost.take(), network.changes.take());
        let mut slots = Vec::new();
        let added = add(vm, agent, network, &mut slots).await;
        if added.is_err() {
            for (slot, _) in &slots {
                let _ = vm.remove_device(*slot).await;
            }
            network::detach(&path).await?;
        }
        added?;
        if let Some(localhost) = localhost {
            tokio::spawn(localhost.serve(agent.clone()));
        }
        if let Some(changes) = changes {
            tokio::spawn(changes.follow(vm.clone(), agent.clone(), slots));
        }
        *attached = true;
        Ok(())
    }
}

/// Notes the slots with the interfaces that they carry.
async fn add(
    vm: &Vm,
    agent: &Agent,
    mut network: network::Network,
    slots: &mut Vec<(u8, u32)>,
) -> Result<(), SandboxError> {
    for device in std::mem::take(&mut network.devices) {
        let link = device.link;
        slots.push((vm.add_net(device).await?, link));
    }
    Ok(agent.add_network(network.request(slots)).await?)
}
