//! The pod as containerd's Sandbox API sees it: the VM is made and ended by calls of its own, and no pause task stands for
//! it (containerd: docs/sandbox-api.md). Containers come by the Task API as always.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_protocol::cri::PodSandboxConfig;
use bulkhead_protocol::error::chain;
use containerd_shim_protos::types::task::Status;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;

use super::create::configured;
use super::error::{TaskError, expect_identifier};
use super::files::PodFiles;
use super::process::{Exit, Process};
use super::{ApiSandbox, Pod};
use crate::about;
use crate::deadlines::{Deadline, Operation};
use crate::host_files::{self, OneEach};
use crate::io::Stdio;
use crate::sandbox::agent::ProcessKey;
use crate::sandbox::{Sandbox, SandboxError, VmError, removing};
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
        expect_identifier(id, "the sandbox id is not an identifier of containerd")?;
        if id == self.identity.sandbox_id { Ok(()) } else { Err(TaskError::NotFound(format!("sandbox {id}"))) }
    }

    pub(super) fn api_sandbox(&self) -> Result<Arc<ApiSandbox>, TaskError> {
        let found = self.api_slot().clone();
        found.ok_or_else(|| TaskError::NotFound(format!("sandbox {}", self.identity.sandbox_id)))
    }

    /// Checks what is asked for and makes the pod's files; the VM comes with [`Pod::start_sandbox`].
    pub async fn create_sandbox(self: Arc<Self>, deadline: Deadline, request: CreateSandbox) -> Result<(), TaskError> {
        let id = &self.identity.sandbox_id;
        let metadata = request.config.metadata.get_or_default();
        about::note_pod_name(&metadata.namespace, &metadata.name);
        spec::refuse_netns(Path::new(&request.netns))?;
        let spec = spec::pod_sandbox(&request.config, id, &request.netns)?;
        let key = ProcessKey { container: id.clone(), exec: String::new() };
        let process = Arc::new(Process::new(key, Stdio::default()));
        let _gate = self.gate.lock().await;
        if self.api_slot().is_some() || self.sandbox_slot().is_some() {
            return Err(TaskError::Exists(format!("sandbox {id}")));
        }
        let (bundle, config, its_id) = (request.bundle, request.config.clone(), id.clone());
        let make = move || {
            let files = PodFiles::locate(&bundle, &its_id);
            files.as_ref().map_or(Ok(()), |files| files.create(&config)).map(|()| files)
        };
        let files = host_files::CONTAINERS.run(deadline, make).await?.map_err(TaskError::Files)?;
        let (config, restoring) = (request.config, OneEach::default());
        *self.api_slot() = Some(Arc::new(ApiSandbox { spec, config, files, restoring, process }));
        Ok(())
    }

    /// Boots the VM.
    pub async fn start_sandbox(self: Arc<Self>, deadline: Deadline) -> Result<SandboxState, TaskError> {
        let api = self.api_sandbox()?;
        let order = api.process.order.lock().await;
        api.process.expect("start", &[Status::CREATED])?;
        let (config, deadline) = configured(deadline, None).await?;
        let sandbox = self.boot(deadline, api.spec.clone(), config).await?;
        self.sandbox_booted(&api, sandbox).await?;
        drop(order);
        Ok(self.state_of(&api))
    }

    /// The VM is there. On an error it is not any more.
    pub(super) async fn sandbox_booted(&self, api: &ApiSandbox, sandbox: Arc<Sandbox>) -> Result<(), TaskError> {
        // It may have been stopped meanwhile: then it has ended, and nobody would end its VM.
        let begun = api.process.expect("start", &[Status::CREATED]);
        let begun = begun.and_then(|()| api.process.assign_pid(&self.keeper, &[PAUSE.to_owned()]));
        if let Err(error) = begun {
            self.take_back().await;
            return Err(error);
        }
        api.process.set_status(Status::RUNNING);
        tokio::spawn(follow(api.process.clone(), sandbox));
        Ok(())
    }

    /// Ends the VM, orderly or in bounded time; one that is being booted goes when it is there. What belongs to it on the
    /// host stays until [`Pod::shutdown_sandbox`].
    pub async fn stop_sandbox(self: Arc<Self>, deadline: Deadline) -> Result<(), TaskError> {
        let api = self.api_sandbox()?;
        let sandbox = self.sandbox_slot().clone();
        match sandbox {
            Some(sandbox) => {
                sandbox.stop().await;
                // A VMM that waits for a disk of the host has not ended, and is said not to have.
                let ended = deadline.part(Operation::ProcessEnds).timeout(api.process.wait()).await;
                ended.map_err(|waited| SandboxError::Vm(VmError::Lingers(waited)))?;
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
    pub async fn sandbox_state(&self, deadline: Deadline) -> Result<SandboxState, TaskError> {
        let api = self.api_sandbox()?;
        api.restore_files(deadline).await;
        Ok(self.state_of(&api))
    }

    fn state_of(&self, api: &ApiSandbox) -> SandboxState {
        let sandbox = self.sandbox_slot().clone();
        SandboxState {
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
        }
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
    pub async fn shutdown_sandbox(self: Arc<Self>, deadline: Deadline) {
        let _gate = self.gate.lock().await;
        self.unmake().await;
        let api = self.api_slot().take();
        if let Some(api) = api {
            api.process.ended(Exit::now(Exit::KILLED));
            if let Some(files) = api.files.clone() {
                let removed = removing(move || {
                    files.remove();
                    Ok::<_, TaskError>(())
                });
                // They are on containerd's disk, which may hang. The thread goes on, and is the only one.
                if deadline.part(Operation::HostFiles).timeout(removed).await.is_err() {
                    tracing::warn!("the pod's files are still being removed; does containerd's disk answer?");
                }
            }
        }
        self.finish();
    }
}

impl ApiSandbox {
    /// A containerd that starts again takes the pod's files for a leak and removes them (2.1: internal/cri/server/restart.go
    /// cleanupOrphanedIDDirs knows sandboxes with a pause container only). It asks for the state before it makes the next
    /// container, as the kubelet does. The state is told in any case.
    async fn restore_files(&self, deadline: Deadline) {
        let Some(files) = self.files.clone().filter(|_| self.process.exit().is_none()) else { return };
        let config = self.config.clone();
        let restore = move || if files.exist() { Ok(()) } else { files.create(&config) };
        match self.restoring.run((), deadline.part(Operation::RestorePodFiles), restore).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("{}", chain(&error)),
            Err(error) => tracing::warn!("cannot see to the pod's files: {}", chain(&error)),
        }
    }
}

async fn follow(process: Arc<Process>, sandbox: Arc<Sandbox>) {
    sandbox.vm.ended().await;
    process.ended(Exit::now(Exit::KILLED));
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use tokio::time::Instant;

    use super::*;
    use crate::spec::SandboxSpec;

    /// A sandbox with a bundle as containerd makes it, whose files are not there.
    fn sandbox(dir: &Path) -> ApiSandbox {
        let bundle = dir.join("state/io.containerd.sandbox.controller.v1.shim/k8s.io/s");
        std::fs::create_dir_all(&bundle).unwrap();
        let work = dir.join("root/io.containerd.sandbox.controller.v1.shim/k8s.io/s");
        std::os::unix::fs::symlink(work, bundle.join("work")).unwrap();
        let key = ProcessKey { container: "s".into(), exec: String::new() };
        let config = PodSandboxConfig::new();
        ApiSandbox {
            spec: SandboxSpec::default(),
            config,
            files: PodFiles::locate(&bundle, "s"),
            restoring: OneEach::default(),
            process: Arc::new(Process::new(key, Stdio::default())),
        }
    }

    #[tokio::test]
    async fn files_that_are_gone_are_made_again_before_the_state_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = sandbox(dir.path());
        sandbox.restore_files(Deadline::begin(Operation::SandboxStatus)).await;
        assert!(sandbox.files.as_ref().unwrap().exist());
        sandbox.files.as_ref().unwrap().remove();
        sandbox.process.ended(Exit::now(0));
        sandbox.restore_files(Deadline::begin(Operation::SandboxStatus)).await;
        assert!(!sandbox.files.as_ref().unwrap().exist(), "of a sandbox that has ended");
    }

    #[tokio::test(start_paused = true)]
    async fn state_is_told_in_bounded_time_though_containerds_disk_hangs_and_at_once_after_that() {
        let dir = tempfile::tempdir().unwrap();
        let sandbox = sandbox(dir.path());
        let (answer, hung) = channel::<()>();
        let begun = Instant::now();
        let first = sandbox.restoring.run((), Deadline::begin(Operation::RestorePodFiles), move || hung.recv());
        let second = sandbox.restore_files(Deadline::begin(Operation::SandboxStatus));
        let _ = tokio::join!(first, second);
        assert_eq!(begun.elapsed().as_secs(), Operation::RestorePodFiles.budget().as_secs());
        sandbox.restore_files(Deadline::begin(Operation::SandboxStatus)).await;
        assert_eq!(begun.elapsed().as_secs(), Operation::RestorePodFiles.budget().as_secs());
        assert!(!sandbox.files.as_ref().unwrap().exist());
        drop(answer);
    }
}
