//! A pod: its VM and the tasks that containerd knows of it.
//!
//! The calls of the Task API are in files by what they do: [`create`], [`start`], [`end`] and [`control`]; those of
//! the Sandbox API are in [`sandbox_api`]. Locks: a process's `order`, an init's before those of its execs; then the boot
//! gate; then the maps, which are never held across an await.

mod container;
mod control;
mod create;
mod end;
pub mod error;
pub mod files;
mod hooks;
pub mod options;
pub mod process;
mod sandbox_api;
mod start;
mod stats_cache;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::cri::PodSandboxConfig;
use tokio::sync::watch;

use crate::deadlines::{Deadline, Operation};
use crate::endpoint::Endpoint;
use crate::events::Publisher;
use crate::host_files::OneEach;
use crate::host_pid::Keeper;
use crate::paths::RunDir;
use crate::sandbox::{Sandbox, kill_recorded, removing};
use crate::spec::SandboxSpec;
use container::{Container, Kind};
pub use create::CreateTask;
use error::TaskError;
use files::PodFiles;
use process::Process;
pub use sandbox_api::CreateSandbox;
pub use start::ExecTask;

/// Names a pod.
#[derive(Clone, Debug)]
pub struct PodIdentity {
    /// The id of the sandbox, or of the container that has no pod.
    pub sandbox_id: String,
    /// Where its files are.
    pub run_dir: RunDir,
    /// Where its daemon is reached.
    pub endpoint: Arc<Endpoint>,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    identity: PodIdentity,
    publisher: Publisher,
    keeper: Keeper,
    containers: Mutex<HashMap<String, Arc<Container>>>,
    /// Ids for which a Create runs, and whether a Delete has come meanwhile. Taken before `containers`.
    creating: Mutex<HashMap<String, watch::Sender<bool>>>,
    sandbox: Mutex<Option<Arc<Sandbox>>>,
    /// Set if containerd made the sandbox by the Sandbox API.
    api: Mutex<Option<Arc<ApiSandbox>>>,
    /// Held while the VM is made or unmade.
    gate: tokio::sync::Mutex<()>,
    /// containerd has asked the daemon to end, which it does with the last container.
    ending: AtomicBool,
    finished: watch::Sender<bool>,
}

/// A sandbox that was created by the Sandbox API.
#[derive(Debug)]
pub struct ApiSandbox {
    spec: SandboxSpec,
    config: PodSandboxConfig,
    files: Option<PodFiles>,
    /// Makes them again, one at a time: containerd's root may be on a disk that hangs.
    restoring: OneEach<()>,
    /// Stands for the VM: its pid, its state and its end.
    process: Arc<Process>,
}

impl Pod {
    /// A pod without a VM.
    pub fn new(identity: PodIdentity, publisher: Publisher, keeper: Keeper) -> Self {
        Self {
            identity,
            publisher,
            keeper,
            containers: Mutex::default(),
            creating: Mutex::default(),
            sandbox: Mutex::default(),
            api: Mutex::default(),
            gate: tokio::sync::Mutex::new(()),
            ending: AtomicBool::new(false),
            finished: watch::channel(false).0,
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn creating(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<bool>>> {
        self.creating.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sandbox_slot(&self) -> MutexGuard<'_, Option<Arc<Sandbox>>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn api_slot(&self) -> MutexGuard<'_, Option<Arc<ApiSandbox>>> {
        self.api.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM, if there is one that runs.
    fn sandbox(&self) -> Result<Arc<Sandbox>, TaskError> {
        let sandbox = self.sandbox_slot().clone().ok_or(TaskError::NoSandbox)?;
        if sandbox.vm.has_ended() { Err(TaskError::NoSandbox) } else { Ok(sandbox) }
    }

    /// A container by its id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.containers().get(id).cloned().ok_or_else(|| TaskError::NotFound(format!("container {id}")))
    }

    /// Returns when no Create of this id runs (any more).
    pub async fn created_or_not(&self, id: &str) {
        let creation = self.creating().get(id).map(watch::Sender::subscribe);
        if let Some(mut creation) = creation {
            while creation.changed().await.is_ok() {}
        }
    }

    /// A container's init, or its exec if the id is not empty.
    pub fn process(&self, id: &str, exec: &str) -> Result<Arc<Process>, TaskError> {
        let container = self.container(id)?;
        if exec.is_empty() { Ok(container.init.clone()) } else { container.exec(exec) }
    }

    /// Returns when containerd has asked the daemon to end and nothing is left to serve.
    pub async fn finished(&self) {
        let mut finished = self.finished.subscribe();
        let _ = finished.wait_for(|finished| *finished).await;
    }

    /// Whether there is no container, and no sandbox of the Sandbox API.
    pub fn is_empty(&self) -> bool {
        self.containers().is_empty() && self.api_slot().is_none()
    }

    /// Ends the daemon, or lets it end with the last member of a pod without a sandbox: if a VM ends by itself its sandbox
    /// may be deleted first, and containerd from 2.0 to 2.3 asks after that deletion alone (core/runtime/v2/shim.go). A
    /// sandbox of the Sandbox API has a call of its own.
    pub fn shutdown(&self) {
        let of_member = |container: &Arc<Container>| container.kind == Kind::Member;
        if self.api_slot().is_none() && self.containers().values().all(of_member) {
            self.ending.store(true, Ordering::Relaxed);
            self.identity.endpoint.ends_by_itself();
            self.end_if_empty();
        }
    }

    /// Ends a daemon that has been asked to, if nothing is left.
    fn end_if_empty(&self) {
        if self.ending.load(Ordering::Relaxed) && self.is_empty() {
            self.finish();
        }
    }

    /// Lets the daemon end. Nobody finds it any more: the next one with the same id gets a socket of its own.
    fn finish(&self) {
        self.identity.endpoint.withdraw();
        self.finished.send_replace(true);
    }

    /// Removes the VM and everything of it. It has its time whatever is left of a call's.
    pub async fn teardown(&self) {
        let _gate = self.gate.lock().await;
        self.unmake().await;
    }

    /// The same for a VM that has served for nothing, and need not end by itself.
    async fn take_back(&self) {
        let sandbox = self.sandbox_slot().clone();
        if let Some(sandbox) = sandbox {
            sandbox.vm.kill().await;
        }
        self.teardown().await;
    }

    /// Ends the pod with its daemon: as [`Self::teardown`] does, but a boot that takes long is cut short, and none begins any
    /// more.
    pub async fn end(&self) {
        let deadline = Deadline::begin(Operation::EndDaemon);
        let mut gate = deadline.part(Operation::FinishBoot).timeout(self.gate.lock()).await;
        if gate.is_err() {
            tracing::warn!("the daemon has to end while its VM boots; killing the VMM");
            let vmm = self.identity.run_dir.vmm_pid();
            let _: Result<(), TaskError> = removing(move || {
                kill_recorded(&[&vmm]);
                Ok(())
            })
            .await;
            gate = deadline.part(Operation::TakeBackBoot).timeout(self.gate.lock()).await;
        }
        self.unmake().await;
        // What waits for it would boot.
        std::mem::forget(gate);
    }

    /// To be called with the gate held.
    async fn unmake(&self) {
        let sandbox = self.sandbox_slot().take();
        if let Some(sandbox) = sandbox {
            sandbox.destroy().await;
        }
    }
}

#[cfg(test)]
mod tests;
