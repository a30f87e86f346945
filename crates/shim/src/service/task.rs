//! The Task API (containerd: api/runtime/task/v3/shim.proto): each method translates and calls the pod.
//!
//! A call that changes something runs in a task of its own, see [`super::status`].

use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::RELEASE;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::types::task::ProcessInfo;
use protobuf::well_known_types::empty::Empty;
use protobuf::{EnumOrUnknown, MessageField};
use tracing::Instrument;
use ttrpc::asynchronous::TtrpcContext;

use super::status::{detached, status};
use crate::about;
use crate::deadlines::{Deadline, Operation};
use crate::io::Stdio;
use crate::pod::error::TaskError;
use crate::pod::{CreateTask, ExecTask, Pod};

/// The service of one pod.
pub struct TaskService {
    pod: Arc<Pod>,
}

impl TaskService {
    /// Serves a pod.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, r: api::CreateTaskRequest) -> ttrpc::Result<api::CreateTaskResponse> {
        if !r.checkpoint.is_empty() {
            return Err(status(TaskError::Unsupported("restoring a checkpoint")));
        }
        let (stdin, stdout, stderr, terminal) = (r.stdin, r.stdout, r.stderr, r.terminal);
        let stdio = Stdio { stdin, stdout, stderr, terminal, ..Stdio::default() };
        let (bundle, options) = (r.bundle.into(), r.options.into_option());
        let whose = about::process(&r.id, "");
        let task = CreateTask { id: r.id, bundle, rootfs: r.rootfs, stdio, options };
        let pid = detached(self.pod.clone().create(Deadline::begin(Operation::CreateContainer), task))
            .instrument(whose)
            .await?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, r: api::StartRequest) -> ttrpc::Result<api::StartResponse> {
        let whose = about::process(&r.id, &r.exec_id);
        let deadline = Deadline::begin(Operation::StartContainer);
        let pid = detached(self.pod.clone().start(deadline, r.id, r.exec_id)).instrument(whose).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, r: api::StateRequest) -> ttrpc::Result<api::StateResponse> {
        // A containerd that starts again while a Create runs asks this once. A container of which it is told that it does not
        // exist, and which comes after that, it never deletes.
        self.pod.created_or_not(&r.id).await;
        let container = self.pod.container(&r.id).map_err(status)?;
        let process = self.pod.process(&r.id, &r.exec_id).map_err(status)?;
        let exit = process.exit();
        Ok(api::StateResponse {
            id: r.id,
            bundle: container.bundle.display().to_string(),
            pid: process.pid(),
            status: EnumOrUnknown::new(process.status()),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exit_status: exit.as_ref().map_or(0, |exit| exit.code),
            exited_at: exit.map(|exit| exit.at).into(),
            exec_id: r.exec_id,
            ..Default::default()
        })
    }

    async fn wait(&self, _: &TtrpcContext, r: api::WaitRequest) -> ttrpc::Result<api::WaitResponse> {
        let process = self.pod.process(&r.id, &r.exec_id).map_err(status)?;
        let exit = process.wait().await;
        let exited_at = MessageField::some(exit.at);
        Ok(api::WaitResponse { exit_status: exit.code, exited_at, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, r: api::KillRequest) -> ttrpc::Result<Empty> {
        let whose = about::process(&r.id, &r.exec_id);
        let deadline = Deadline::begin(Operation::Kill);
        detached(self.pod.clone().kill(deadline, r.id, r.exec_id, r.signal, r.all)).instrument(whose).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, r: api::DeleteRequest) -> ttrpc::Result<api::DeleteResponse> {
        let whose = about::process(&r.id, &r.exec_id);
        let deadline = Deadline::begin(Operation::Delete);
        let deleted = detached(self.pod.clone().delete(deadline, r.id, r.exec_id)).instrument(whose).await?;
        Ok(api::DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.code,
            exited_at: MessageField::some(deleted.exit.at),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, r: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        let (stdin, stdout, stderr, terminal) = (r.stdin, r.stdout, r.stderr, r.terminal);
        let stdio = Stdio { stdin, stdout, stderr, terminal, ..Stdio::default() };
        let process = r.spec.into_option().unwrap_or_default().value;
        self.pod.exec(ExecTask { id: r.id, exec_id: r.exec_id, stdio, process }).map_err(status)?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, r: api::PidsRequest) -> ttrpc::Result<api::PidsResponse> {
        let container = self.pod.container(&r.id).map_err(status)?;
        let info = |pid| ProcessInfo { pid, ..Default::default() };
        let mut processes: Vec<_> = container.running().iter().map(|process| info(process.pid())).collect();
        // An init that has ended is there like a zombie until it is deleted: a containerd that starts again takes a task
        // without pids for a leak, and throws its exit code away (core/runtime/v2/shim_load.go).
        if processes.is_empty() {
            processes.push(info(container.init.pid()));
        }
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, r: api::PauseRequest) -> ttrpc::Result<Empty> {
        let whose = about::process(&r.id, "");
        detached(self.pod.clone().pause(Deadline::begin(Operation::Pause), r.id)).instrument(whose).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: api::ResumeRequest) -> ttrpc::Result<Empty> {
        let whose = about::process(&r.id, "");
        detached(self.pod.clone().resume(Deadline::begin(Operation::Resume), r.id)).instrument(whose).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, r: api::CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        self.pod.container(&r.id).map_err(status)?;
        Err(status(TaskError::Unsupported("checkpointing a container")))
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: api::ResizePtyRequest) -> ttrpc::Result<Empty> {
        let deadline = Deadline::begin(Operation::ResizeTerminal);
        self.pod.resize(deadline, &r.id, &r.exec_id, r.width, r.height).await.map_err(status)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, r: api::CloseIORequest) -> ttrpc::Result<Empty> {
        if r.stdin {
            self.pod.close_stdin(&r.id, &r.exec_id).map_err(status)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, r: api::UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = r.resources.into_option().unwrap_or_default().value;
        let whose = about::process(&r.id, "");
        let deadline = Deadline::begin(Operation::Update);
        detached(self.pod.clone().update(deadline, r.id, resources)).instrument(whose).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, r: api::StatsRequest) -> ttrpc::Result<api::StatsResponse> {
        let stats = self.pod.stats(Deadline::begin(Operation::Stats), &r.id).await.map_err(status)?;
        Ok(api::StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, r: api::ConnectRequest) -> ttrpc::Result<api::ConnectResponse> {
        let task_pid = match self.pod.container(&r.id) {
            Ok(container) => container.init.pid(),
            // A containerd that starts again asks this first, and has a shim cleaned up that fails (core/runtime/v2/shim.go,
            // loadShim). One whose pod is still being made must not be taken for a pod: nobody learns how Create ends.
            Err(error) if self.pod.is_empty() => return Err(status(error)),
            Err(_) => 0,
        };
        let version = RELEASE.to_owned();
        Ok(api::ConnectResponse { shim_pid: std::process::id(), task_pid, version, ..Default::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> ttrpc::Result<Empty> {
        self.pod.shutdown();
        Ok(Empty::new())
    }
}
