//! A client of the Container Runtime Interface (`runtime.v1`): the part of the kubelet that talks to containerd or CRI-O.
//!
//! [`Cri`] is one connection, [`Pod`] a sandbox that runs, with the calls that the kubelet makes on it in its order. Nothing
//! here waits by sleeping, but for [`Pod::wait_exit`] where the CRI has no call that blocks.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use hyper_util::rt::TokioIo;
pub use k8s_cri::v1;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// containerd's CRI socket.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// How often a container's state is asked for while its end is awaited. The CRI of containerd 1.6 has no event stream
/// (GetContainerEvents came with 1.7) and no descriptor to wait on, so the kubelet's way is the only one. The kubelet relists
/// every second; this is for one container instead of a node, and a fifth of that keeps those who measure from waiting.
const RELIST: Duration = Duration::from_millis(200);

/// A connection to a CRI runtime.
#[derive(Clone)]
pub struct Cri {
    runtime: RuntimeServiceClient<Channel>,
    images: ImageServiceClient<Channel>,
}

impl Cri {
    /// Connects to the runtime's socket.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
        });
        // The URI is a formality: the connector knows the socket.
        let channel = Endpoint::from_static("http://cri.invalid")
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("no CRI runtime answers on {}: is containerd running?", socket.display()))?;
        Ok(Self { runtime: RuntimeServiceClient::new(channel.clone()), images: ImageServiceClient::new(channel) })
    }

    /// The raw runtime service, for calls that have no helper here.
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        self.runtime.clone()
    }

    /// Pulls an image unless it is there; returns its reference.
    pub async fn pull(&self, image: &str) -> Result<String> {
        let spec = v1::ImageSpec { image: image.to_owned(), ..Default::default() };
        let status = v1::ImageStatusRequest { image: Some(spec.clone()), verbose: false };
        let present = self.images.clone().image_status(status).await?.into_inner().image;
        if let Some(image) = present {
            return Ok(image.id);
        }
        let request = v1::PullImageRequest { image: Some(spec), ..Default::default() };
        let pulled = self.images.clone().pull_image(request).await;
        Ok(pulled.with_context(|| format!("cannot pull {image}"))?.into_inner().image_ref)
    }

    /// Runs a pod sandbox with a runtime handler.
    pub async fn run_pod(&self, config: v1::PodSandboxConfig, handler: &str) -> Result<Pod> {
        let request = v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
        let id = self.runtime().run_pod_sandbox(request).await.map_err(status)?.into_inner().pod_sandbox_id;
        Ok(Pod { cri: self.clone(), id, config })
    }

    /// Stops and removes a sandbox with all its containers. Fine to repeat.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        let pod_sandbox_id = id.to_owned();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
        match self.runtime().stop_pod_sandbox(request).await {
            // Removed before. containerd 1.6 says so when stopping, but not when removing.
            Err(error) if error.code() == tonic::Code::NotFound => return Ok(()),
            done => done.map_err(status)?,
        };
        self.runtime().remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.map_err(status)?;
        Ok(())
    }
}

/// The message of a gRPC status as an error, without tonic's decoration.
pub fn status(status: tonic::Status) -> anyhow::Error {
    anyhow!("{} ({})", status.message(), status.code())
}

/// A pod sandbox that runs.
#[derive(Clone)]
pub struct Pod {
    cri: Cri,
    /// The sandbox's id.
    pub id: String,
    /// What it was made from.
    pub config: v1::PodSandboxConfig,
}

/// What an exec came back with.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExecOutput {
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
    /// Exit code.
    pub code: i32,
}

impl Pod {
    /// The client that started it.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// Creates a container.
    pub async fn create(&self, config: v1::ContainerConfig) -> Result<String> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        Ok(self.cri.runtime().create_container(request).await.map_err(status)?.into_inner().container_id)
    }

    /// Starts a created container.
    pub async fn start(&self, container: &str) -> Result<()> {
        let request = v1::StartContainerRequest { container_id: container.to_owned() };
        self.cri.runtime().start_container(request).await.map_err(status)?;
        Ok(())
    }

    /// Creates and starts a container.
    pub async fn run(&self, config: v1::ContainerConfig) -> Result<String> {
        let id = self.create(config).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// Executes a command in a container and waits for it.
    pub async fn exec(&self, container: &str, command: &[&str]) -> Result<ExecOutput> {
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 0,
        };
        let answer = self.cri.runtime().exec_sync(request).await.map_err(status)?.into_inner();
        Ok(ExecOutput {
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
            code: answer.exit_code,
        })
    }

    /// A container's status.
    pub async fn container(&self, container: &str) -> Result<v1::ContainerStatus> {
        let request = v1::ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
        let answer = self.cri.runtime().container_status(request).await.map_err(status)?.into_inner();
        answer.status.context("the CRI's ContainerStatus came without a status")
    }

    /// The sandbox's status.
    pub async fn status(&self) -> Result<v1::PodSandboxStatus> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let answer = self.cri.runtime().pod_sandbox_status(request).await.map_err(status)?.into_inner();
        answer.status.context("the CRI's PodSandboxStatus came without a status")
    }

    /// All addresses of the pod, the primary one first.
    pub async fn addresses(&self) -> Result<Vec<String>> {
        let network = self.status().await?.network.context("the pod has no network status")?;
        Ok(std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip)).collect())
    }

    /// Waits until a container has ended, for `limit` at most, and returns its status.
    pub async fn wait_exit(&self, container: &str, limit: Duration) -> Result<v1::ContainerStatus> {
        let relist = async {
            loop {
                let status = self.container(container).await?;
                if status.state() == v1::ContainerState::ContainerExited {
                    return Ok(status);
                }
                tokio::time::sleep(RELIST).await;
            }
        };
        tokio::time::timeout(limit, relist)
            .await
            .with_context(|| format!("container {container} has not ended within {limit:?}"))?
    }

    /// Stops a container: its stop signal, and SIGKILL when `grace` is over.
    pub async fn stop(&self, container: &str, grace: Duration) -> Result<()> {
        let timeout = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        let request = v1::StopContainerRequest { container_id: container.to_owned(), timeout };
        self.cri.runtime().stop_container(request).await.map_err(status)?;
        Ok(())
    }

    /// Removes a container.
    pub async fn remove_container(&self, container: &str) -> Result<()> {
        let request = v1::RemoveContainerRequest { container_id: container.to_owned() };
        self.cri.runtime().remove_container(request).await.map_err(status)?;
        Ok(())
    }

    /// The path of a container's log on the host.
    pub async fn log_path(&self, container: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(self.container(container).await?.log_path))
    }

    /// A container's log so far.
    pub async fn log(&self, container: &str) -> Result<Vec<crate::log::Line>> {
        let path = self.log_path(container).await?;
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        crate::log::parse(&text)
    }

    /// Stops and removes the pod.
    pub async fn remove(self) -> Result<()> {
        self.cri.remove_pod(&self.id).await
    }
}

/// A pod's configuration with what every pod needs; callers change the fields that they care about.
pub fn pod_config(name: &str, log_directory: &Path) -> v1::PodSandboxConfig {
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("{name}-{nanos}"),
            namespace: "default".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: log_directory.to_string_lossy().into_owned(),
        dns_config: Some(v1::DnsConfig {
            servers: vec!["10.96.0.10".to_owned()],
            searches: vec!["default.svc.cluster.local".to_owned()],
            options: vec!["ndots:5".to_owned()],
        }),
        linux: Some(v1::LinuxPodSandboxConfig {
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(pod_namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container's configuration with what every container needs.
pub fn container_config(name: &str, image: &str, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: image.to_owned(), ..Default::default() }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}_0.log"),
        linux: Some(v1::LinuxContainerConfig {
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(pod_namespaces()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The namespaces of an ordinary pod: network and IPC are the pod's, pids the container's.
fn pod_namespaces() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: v1::NamespaceMode::Pod.into(),
        ipc: v1::NamespaceMode::Pod.into(),
        pid: v1::NamespaceMode::Container.into(),
        ..Default::default()
    }
}
