//! The pod as containerd's Sandbox API sees it: the VM is made and ended by calls of its own, and no pause task stands for
//! it (containerd: docs/sandbox-api.md). Containers come by the Task API as always.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_protocol::cri::PodSandboxConfig;
use containerd_shim_protos::types::task::Status;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;

use super::error::TaskError;
use super::files::PodFiles;
use super::process::{Exit, Process};
use super::{ApiSandbox, Pod};
use crate::about;
use crate::io::Stdio;
use crate::sandbox::agent::ProcessKey;
use crate::sandbox::{Sandbox, blocking, removing};
use crate::spec;
use crate::stats;

/// What stands in the node's process table for a sandbox, which runs nothing.
const PAUSE: &str = "bulkhead-sandbox";

/// What containerd asks to create.
#[derive(Clone, Debug, Default)]
pub struct CreateSandbox {
    /// Its bundle.
    pub bundle: PathBuf,
    /// The pod as the CRI describes it.
    pub config: PodSandboxConfig,
    /// The network namespace that CNI has made; empty for none.
    pub netns: String,
}

/// What a sandbox tells of itself.
#[derive(Clone, Debug)]
pub struct SandboxState {
    /// Its pid, which lives in the pod's network namespace.
    pub pid: u32,
    /// Whether containers can be created in it.
    pub ready: bool,
    /// When it was started.
    pub created_at: Option<Timestamp>,
    /// When it ended.
    pub exited_at: Option<Timestamp>,
    /// For people.
    pub info: serde_json::Value,
}

impl Pod {
    /// Fails unless the id is this pod's.
    pub fn expect_id(&self, id: &str) -> Result<(), TaskError> {
        if id == self.identity.sandbox_id { Ok(()) } else { Err(TaskError::NotFound(format!("sandbox {id}"))) }
    }

    pub(super) fn api_sandbox(&self) -> Result<Arc<ApiSandbox>, TaskError> {
        let found = self.api_slot().clone();
        found.ok_or_else(|| TaskError::NotFound(format!("sandbox {}", self.identity.sandbox_id)))
    }

    /// Checks what is asked for and makes the pod's files; the VM comes with [`Pod::start_sandbox`].
    pub async fn create_sandbox(self: Arc<Self>, request: CreateSandbox) -> Result<(), TaskError> {
        let id = &self.identity.sandbox_id;
        let metadata = request.config.metadata.get_or_default();
        about::note_pod_name(&metadata.namespace, &metadata.name);
        spec::refuse_netns(Path::new(&request.netns))?;
        let spec = spec::pod_sandbox(&request.config, id, &request.netns)?;
        let key = ProcessKey { container: id.clone(), exec: String::new() };
        let process = Arc::new(Process::new(key, Stdio::default()));
        let files = PodFiles::locate(&request.bundle, id);
        let _gate = self.gate.lock().await;
        if self.api_slot().is_some() || self.sandbox_slot().is_some() {
            return Err(TaskError::Exists(format!("sandbox {id}")));
        }
        if let (Some(files), config) = (files.clone(), request.config.clone()) {
            let made: Result<(), TaskError> = blocking(move || files.create(&config).map_err(TaskError::Files)).await;
            made?;
        }
        *self.api_slot() = Some(Arc::new(ApiSandbox { spec, config: request.config, files, process }));
        Ok(())
    }

    /// Boots the VM.
    pub async fn start_sandbox(self: Arc<Self>) -> Result<SandboxState, TaskError> {
        let api = self.api_sandbox()?;
        let order = api.process.order.lock().await;
        api.process.expect("start", &[Status::CREATED])?;
        let sandbox = self.boot(api.spec.clone(), None).await?;
        self.sandbox_booted(&api, sandbox).await?;
        drop(order);
        self.sandbox_state()
    }

    /// The VM is there. On an error it is not any more.
    pub(super) async fn sandbox_booted(&self, api: &ApiSandbox, sandbox: Arc<Sandbox>) -> Result<(), TaskError> {
        // It may have been stopped meanwhile: then it has ended, and nobody would end its VM.
        let begun = api.process.expect("start", &[Status::CREATED]);
        let begun = begun.and_then(|()| api.process.assign_pid(&self.keeper, &[PAUSE.to_owned()]));
        if let Err(error) = begun {
            self.teardown().await;
            return Err(error);
        }
        api.process.set_status(Status::RUNNING);
        tokio::spawn(follow(api.process.clone(), sandbox));
        Ok(())
    }

    /// Ends the VM, orderly or in bounded time; one that is being booted goes when it is there. What belongs to it on the
    /// host stays until [`Pod::shutdown_sandbox`].
    pub async fn stop_sandbox(self: Arc<Self>) -> Result<(), TaskError> {
        let api = self.api_sandbox()?;
        let sandbox = self.sandbox_slot().clone();
        match sandbox {
            Some(sandbox) => {
                sandbox.stop().await;
                api.process.wait().await;
            }
            None => drop(api.process.ended(Exit::now(Exit::KILLED))),
        }
        Ok(())
    }

    /// Waits for the end of the VM.
    pub async fn wait_sandbox(&self) -> Result<Exit, TaskError> {
        let api = self.api_sandbox()?;
        Ok(api.process.wait().await)
    }

    /// The state, without asking the guest.
    pub fn sandbox_state(&self) -> Result<SandboxState, TaskError> {
        let api = self.api_sandbox()?;
        api.restore_files();
        let sandbox = self.sandbox_slot().clone();
        Ok(SandboxState {
            pid: api.process.pid(),
            ready: api.process.status() == Status::RUNNING,
            created_at: sandbox.as_ref().map(|sandbox| sandbox.booted_at.clone()),
            exited_at: api.process.exit().map(|exit| exit.at),
            info: serde_json::json!({
                "runtime": "io.containerd.bulkhead.v2",
                "hostname": api.spec.hostname,
                "netns": sandbox.as_ref().and_then(|sandbox| sandbox.netns()),
                "vmmPid": sandbox.map(|sandbox| sandbox.vm.pid()),
                "runDirectory": self.identity.run_dir.path(),
            }),
        })
    }

    /// Fails unless the VM runs. The guest is not asked: it might not answer.
    pub fn ping_sandbox(&self) -> Result<(), TaskError> {
        self.api_sandbox()?;
        self.sandbox().map(drop)
    }

    /// What the pod uses of the node, its VM included.
    pub fn sandbox_metrics(&self) -> Result<Any, TaskError> {
        self.api_sandbox()?;
        Ok(stats::of_host_cgroup(&self.identity.run_dir.cgroup())?)
    }

    /// Ends the VM, removes everything of the pod and lets the daemon end. containerd asks for it after a failed
    /// `CreateSandbox` too, when there is nothing to remove.
    pub async fn shutdown_sandbox(self: Arc<Self>) {
        let _gate = self.gate.lock().await;
        self.unmake().await;
        let api = self.api_slot().take();
        if let Some(api) = api {
            api.process.ended(Exit::now(Exit::KILLED));
            if let Some(files) = api.files.clone() {
                let _: Result<(), TaskError> = removing(move || {
                    files.remove();
                    Ok(())
                })
                .await;
            }
        }
        self.finish();
    }
}

impl ApiSandbox {
    /// A containerd that starts again takes the pod's files for a leak and removes them (2.1: internal/cri/server/restart.go
    /// cleanupOrphanedIDDirs knows sandboxes with a pause container only). It asks for the state before it makes the next
    /// container, as the kubelet does.
    fn restore_files(&self) {
        let missing = self.files.as_ref().filter(|files| self.process.exit().is_none() && !files.exist());
        if let Some(Err(error)) = missing.map(|files| files.create(&self.config)) {
            tracing::warn!("{}", bulkhead_protocol::error::chain(&error));
        }
    }
}

async fn follow(process: Arc<Process>, sandbox: Arc<Sandbox>) {
    sandbox.vm.ended().await;
    process.ended(Exit::now(Exit::KILLED));
}
