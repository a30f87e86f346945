//! The Sandbox API (containerd: api/runtime/sandbox/v1/sandbox.proto, docs/sandbox-api.md): each method translates and
//! calls the pod. As in the Task API, what changes something runs in a task of its own.

use std::sync::Arc;

use async_trait::async_trait;
use bulkhead_protocol::cri::PodSandboxConfig;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::types::platform::Platform;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use ttrpc::asynchronous::TtrpcContext;

use super::status::{detached, status};
use crate::deadlines::{Deadline, Operation};
use crate::pod::error::TaskError;
use crate::pod::{CreateSandbox, Pod};

/// What containerd's CRI plugin reads as the sandbox's state.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Type of the options that the CRI plugin gives.
const POD_CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// The service of one pod.
pub struct SandboxService {
    pod: Arc<Pod>,
}

impl SandboxService {
    /// Serves a pod.
    pub fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    /// The pod, if the id is its own.
    fn pod(&self, id: &str) -> ttrpc::Result<Arc<Pod>> {
        self.pod.expect_id(id).map_err(status)?;
        Ok(self.pod.clone())
    }
}

/// The pod's configuration; options of another type, or none, are a pod that asks for nothing.
fn pod_config(options: MessageField<protobuf::well_known_types::any::Any>) -> Result<PodSandboxConfig, TaskError> {
    match options.into_option() {
        Some(any) if any.type_url.ends_with(POD_CONFIG) => PodSandboxConfig::parse_from_bytes(&any.value)
            .map_err(|_| TaskError::Invalid("the sandbox's options are not a runtime.v1.PodSandboxConfig")),
        _ => Ok(PodSandboxConfig::new()),
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::CreateSandboxRequest,
    ) -> ttrpc::Result<api::CreateSandboxResponse> {
        let pod = self.pod(&r.sandbox_id)?;
        let config = pod_config(r.options).map_err(status)?;
        let request = CreateSandbox { bundle: r.bundle_path.into(), config, netns: r.netns_path };
        detached(pod.create_sandbox(Deadline::begin(Operation::CreateSandbox), request)).await?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::StartSandboxRequest,
    ) -> ttrpc::Result<api::StartSandboxResponse> {
        let deadline = Deadline::begin(Operation::CreatePod);
        let state = detached(self.pod(&r.sandbox_id)?.start_sandbox(deadline)).await?;
        let created_at = state.created_at.into();
        Ok(api::StartSandboxResponse { pid: state.pid, created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, r: api::PlatformRequest) -> ttrpc::Result<api::PlatformResponse> {
        self.pod(&r.sandbox_id)?;
        // Named as images are: by Go's word for the architecture (image-spec: image-index.md, platform).
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let platform = Platform { os: "linux".into(), architecture: architecture.into(), ..Default::default() };
        Ok(api::PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::StopSandboxRequest,
    ) -> ttrpc::Result<api::StopSandboxResponse> {
        // A pod has a bound of its own for an orderly end, shorter than any that containerd gives.
        let deadline = Deadline::begin(Operation::StopSandbox);
        detached(self.pod(&r.sandbox_id)?.stop_sandbox(deadline)).await?;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::WaitSandboxRequest,
    ) -> ttrpc::Result<api::WaitSandboxResponse> {
        let exit = self.pod(&r.sandbox_id)?.wait_sandbox().await.map_err(status)?;
        let exited_at = MessageField::some(exit.at);
        Ok(api::WaitSandboxResponse { exit_status: exit.code, exited_at, ..Default::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: api::SandboxStatusRequest,
    ) -> ttrpc::Result<api::SandboxStatusResponse> {
        let deadline = Deadline::begin(Operation::SandboxStatus);
        let state = self.pod(&r.sandbox_id)?.sandbox_state(deadline).await.map_err(status)?;
        let mut answer = api::SandboxStatusResponse {
            sandbox_id: r.sandbox_id,
            pid: state.pid,
            state: if state.ready { READY } else { NOT_READY }.to_owned(),
            created_at: state.created_at.into(),
            exited_at: state.exited_at.into(),
            ..Default::default()
        };
        if r.verbose {
            answer.info.insert("info".to_owned(), state.info.to_string());
        }
        Ok(answer)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, r: api::PingRequest) -> ttrpc::Result<api::PingResponse> {
        self.pod(&r.sandbox_id)?.ping_sandbox().map_err(status)?;
        Ok(api::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        r: api::ShutdownSandboxRequest,
    ) -> ttrpc::Result<api::ShutdownSandboxResponse> {
        let pod = self.pod(&r.sandbox_id)?;
        detached(async move {
            pod.shutdown_sandbox(Deadline::begin(Operation::ShutdownSandbox)).await;
            Ok(())
        })
        .await?;
        Ok(api::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: api::SandboxMetricsRequest,
    ) -> ttrpc::Result<api::SandboxMetricsResponse> {
        let data = self.pod(&r.sandbox_id)?.sandbox_metrics().map_err(status)?;
        let mut answer = api::SandboxMetricsResponse::new();
        let metric = answer.metrics.mut_or_insert_default();
        metric.id = r.sandbox_id;
        metric.timestamp = MessageField::some(Timestamp::now());
        metric.data = MessageField::some(data);
        Ok(answer)
    }
}
