//! Calls to the agent. Every one has a deadline, and no more than what is left of the call of containerd's that it is made for,
//! because the guest may never answer; only waiting for a process, for an event, for a demand and for numbers has none, and these
//! end with the VM.

use std::time::Duration;

use bulkhead_protocol::RELEASE;
use bulkhead_protocol::agent as proto;
use bulkhead_protocol::agent::AgentClient;
use bulkhead_protocol::guest::{AGENT_FORWARD_PORT, AGENT_HANDOVER_PORT, AGENT_RPC_PORT, AGENT_STDIO_PORT};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;
use ttrpc::{Code, asynchronous::Client};

use super::bounded_replies::BoundedReplies;
use super::vm::{Vm, VmError};
use crate::deadlines::{Deadline, Operation};
use crate::network::{Connector, NoConnection};
use crate::sizing::Target;
use crate::spec::{DeviceNumber, HugeVolume};

/// The size of huge pages that every x86 guest has, in KiB.
const COMMON_PAGE_KIB: u64 = 2048;

/// Longest text of the guest in an error message, in characters.
const MAX_TEXT: usize = 1024;

/// Most differences of a pod's network that are logged at once; the agent tells no more.
const MAX_FAILED: usize = 32;

/// signal(7).
pub const SIGKILL: u32 = 9;

/// The agent of one guest. Cheap to clone.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    vm: Vm,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("vm", &self.vm).finish_non_exhaustive()
    }
}

/// A process of a container: its exec id, empty for the init.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct ProcessKey {
    /// The container.
    pub container: String,
    /// The exec.
    pub exec: String,
}

impl ProcessKey {
    fn request(&self) -> proto::ProcessRequest {
        proto::ProcessRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            ..proto::ProcessRequest::default()
        }
    }
}

impl Agent {
    /// Connects to the agent, which listens already.
    pub async fn connect(deadline: Deadline, vm: &Vm) -> Result<Self, AgentError> {
        let stream = vm.connect(deadline, AGENT_RPC_PORT).await?;
        Ok(Self { client: AgentClient::new(Client::new(Socket::new(BoundedReplies::new(stream)))), vm: vm.clone() })
    }

    /// A connection for a standard stream.
    pub async fn stream(&self, deadline: Deadline) -> Result<UnixStream, AgentError> {
        Ok(self.vm.connect(deadline, AGENT_STDIO_PORT).await?)
    }

    /// A connection to be forwarded to the guest's localhost.
    pub async fn forward(&self, deadline: Deadline) -> Result<UnixStream, AgentError> {
        Ok(self.vm.connect(deadline, AGENT_FORWARD_PORT).await?)
    }

    /// A connection for what the guest hands over.
    pub async fn handover(&self, deadline: Deadline) -> Result<UnixStream, AgentError> {
        Ok(self.vm.connect(deadline, AGENT_HANDOVER_PORT).await?)
    }

    /// Returns when the VM is gone.
    pub async fn vm_ended(&self) {
        self.vm.ended().await;
    }

    /// The connection is gone, and with it all that the guest could be asked for: sees to it that the VM ends.
    pub async fn lost(&self) {
        if Deadline::begin(Operation::LostAgent).timeout(self.vm.ended()).await.is_err() {
            tracing::warn!("the guest's agent has closed its connection and the VM goes on; killing the VM");
            self.vm.kill().await;
        }
    }

    /// See `Agent.CreateSandbox`; returns what the guest says that its kernel took to boot, and what of the network it did not
    /// take.
    pub async fn create_sandbox(
        &self,
        deadline: Deadline,
        request: &proto::CreateSandboxRequest,
    ) -> Result<(Duration, proto::AddNetworkResponse), AgentError> {
        let answer = work(deadline, self.client.create_sandbox(Context::default(), request)).await?;
        if answer.release != RELEASE {
            return Err(AgentError::Release(bounded(&answer.release)));
        }
        let network = answer.network.unwrap_or_default();
        tell_failed(&network);
        Ok((Duration::from_nanos(answer.kernel_boot_ns), network))
    }

    /// See `Agent.SyncClock`.
    pub async fn sync_clock(
        &self,
        deadline: Deadline,
        request: proto::SyncClockRequest,
    ) -> Result<proto::SyncClockResponse, AgentError> {
        answer(deadline, self.client.sync_clock(Context::default(), &request)).await
    }

    /// See `Agent.AddNetwork`. What the pod can do without and has failed is logged.
    pub async fn add_network(
        &self,
        deadline: Deadline,
        request: &proto::AddNetworkRequest,
    ) -> Result<proto::AddNetworkResponse, AgentError> {
        let answer = work(deadline, self.client.add_network(Context::default(), request)).await?;
        tell_failed(&answer);
        Ok(answer)
    }

    /// See `Agent.DestroySandbox`.
    pub async fn destroy_sandbox(&self, deadline: Deadline) -> Result<(), AgentError> {
        answer(deadline, self.client.destroy_sandbox(Context::default(), &proto::Empty::new())).await.map(drop)
    }

    /// See `Agent.ResizeGuest`.
    pub async fn resize_guest(&self, deadline: Deadline, target: &Target, boot_mib: u64) -> Result<(), AgentError> {
        let pool = |(page_kib, pages): (&u64, &u64)| proto::HugePagePool {
            page_kib: *page_kib,
            pages: *pages,
            ..proto::HugePagePool::default()
        };
        // A guest without pages of a size is not asked for none of them.
        let wanted = target.huge_pages.iter().filter(|(kib, pages)| **pages > 0 || **kib == COMMON_PAGE_KIB);
        let request = proto::ResizeGuestRequest {
            online_cpus: target.cpus.into(),
            huge_pages: wanted.map(pool).collect(),
            memory_mib: boot_mib + target.plugged_mib,
            ..proto::ResizeGuestRequest::default()
        };
        work(deadline, self.client.resize_guest(Context::default(), &request)).await.map(drop)
    }

    /// See `Agent.AddHugePageVolume`.
    pub async fn add_huge_page_volume(&self, deadline: Deadline, volume: &HugeVolume) -> Result<(), AgentError> {
        let (name, page_kib) = (volume.name.clone(), volume.page_kib);
        let request = proto::HugePageVolume { name, page_kib, ..proto::HugePageVolume::default() };
        work(deadline, self.client.add_huge_page_volume(Context::default(), &request)).await.map(drop)
    }

    /// See `Agent.BindDevice`; answers the disk's number in the guest.
    pub async fn bind_device(&self, deadline: Deadline, slot: u8) -> Result<DeviceNumber, AgentError> {
        let request = proto::DeviceSlot { slot: slot.into(), ..proto::DeviceSlot::default() };
        let disk = work(deadline, self.client.bind_device(Context::default(), &request)).await?;
        Ok(DeviceNumber { major: disk.major, minor: disk.minor })
    }

    /// See `Agent.BindImages`.
    pub async fn bind_images(
        &self,
        deadline: Deadline,
        slot: u8,
        images: Vec<proto::ImageRange>,
    ) -> Result<(), AgentError> {
        let request = proto::ImageDevice { slot: slot.into(), images, ..proto::ImageDevice::default() };
        work(deadline, self.client.bind_images(Context::default(), &request)).await.map(drop)
    }

    /// See `Agent.UnbindDevice`.
    pub async fn unbind_device(&self, deadline: Deadline, slot: u8) -> Result<(), AgentError> {
        let request = proto::DeviceSlot { slot: slot.into(), ..proto::DeviceSlot::default() };
        answer(deadline, self.client.unbind_device(Context::default(), &request)).await.map(drop)
    }

    /// See `Agent.CreateContainer`.
    pub async fn create_container(
        &self,
        deadline: Deadline,
        request: proto::CreateContainerRequest,
    ) -> Result<(), AgentError> {
        let key = ProcessKey { container: request.container_id.clone(), exec: String::new() };
        let client = self.client.clone();
        let call = async move { client.create_container(Context::default(), &request).await.map(drop) };
        self.make(deadline, key, call).await
    }

    /// See `Agent.StartContainer`.
    pub async fn start_container(&self, deadline: Deadline, id: &str) -> Result<(), AgentError> {
        work(deadline, self.client.start_container(Context::default(), &container(id))).await.map(drop)
    }

    /// See `Agent.DeleteContainer`.
    pub async fn delete_container(&self, deadline: Deadline, id: &str) -> Result<(), AgentError> {
        answer(deadline, self.client.delete_container(Context::default(), &container(id))).await.map(drop)
    }

    /// See `Agent.PauseContainer`.
    pub async fn pause_container(&self, deadline: Deadline, id: &str) -> Result<(), AgentError> {
        answer(deadline, self.client.pause_container(Context::default(), &container(id))).await.map(drop)
    }

    /// See `Agent.ResumeContainer`.
    pub async fn resume_container(&self, deadline: Deadline, id: &str) -> Result<(), AgentError> {
        answer(deadline, self.client.resume_container(Context::default(), &container(id))).await.map(drop)
    }

    /// See `Agent.UpdateContainer`.
    pub async fn update_container(&self, deadline: Deadline, id: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = proto::UpdateContainerRequest {
            container_id: id.to_owned(),
            resources,
            ..proto::UpdateContainerRequest::default()
        };
        answer(deadline, self.client.update_container(Context::default(), &request)).await.map(drop)
    }

    /// See `Agent.UpdateVolume`.
    pub async fn update_volume(
        &self,
        deadline: Deadline,
        id: &str,
        volume: proto::CopiedVolume,
    ) -> Result<(), AgentError> {
        let request = proto::UpdateVolumeRequest {
            container_id: id.to_owned(),
            volume: Some(volume).into(),
            ..proto::UpdateVolumeRequest::default()
        };
        work(deadline, self.client.update_volume(Context::default(), &request)).await.map(drop)
    }

    /// See `Agent.GetStats`. Ends with the answer or with the VM: who asks does not wait for it.
    pub async fn stats(&self, id: &str) -> Result<proto::Stats, AgentError> {
        self.client.get_stats(Context::default(), &container(id)).await.map_err(AgentError::from)
    }

    /// See `Agent.Exec`.
    pub async fn exec(&self, deadline: Deadline, request: proto::ExecRequest) -> Result<(), AgentError> {
        let key = ProcessKey { container: request.container_id.clone(), exec: request.exec_id.clone() };
        let client = self.client.clone();
        let call = async move { client.exec(Context::default(), &request).await.map(drop) };
        self.make(deadline, key, call).await
    }

    /// Has a process made. One that is there only after the deadline is discarded: nobody would know of it.
    async fn make(
        &self,
        deadline: Deadline,
        key: ProcessKey,
        call: impl Future<Output = ttrpc::Result<()>> + Send + 'static,
    ) -> Result<(), AgentError> {
        let (tell, told) = oneshot::channel();
        let agent = self.clone();
        tokio::spawn(async move {
            // It goes on without the call.
            match Deadline::begin(Operation::LateProcess).timeout(call).await {
                Ok(answer) => {
                    if let Err(Ok(())) = tell.send(answer) {
                        agent.discard(&key).await;
                    }
                }
                Err(_) => agent.give_up().await,
            }
        });
        let answer = async { told.await.unwrap_or_else(|_| Err(ttrpc::Error::Others("the call is lost".to_owned()))) };
        work(deadline, answer).await
    }

    /// Kills a process that nobody has, and makes the guest forget it, with its container if it is an init.
    pub async fn discard(&self, key: &ProcessKey) {
        let deadline = Deadline::begin(Operation::DiscardProcess);
        let is_init = key.exec.is_empty();
        let _ = self.signal(deadline, key, SIGKILL, is_init).await;
        match deadline.part(Operation::LateProcess).timeout(self.wait(key)).await {
            Ok(Ok(_)) if is_init => drop(self.delete_container(deadline, &key.container).await),
            Ok(Ok(_)) => drop(self.delete_process(deadline, key).await),
            Ok(Err(_)) => {}
            Err(_) => self.give_up().await,
        }
    }

    async fn give_up(&self) {
        let waited = Operation::LateProcess.budget();
        tracing::warn!("killing the VM of a guest that has not answered within {waited:?}");
        self.vm.kill().await;
    }

    /// See `Agent.DeleteProcess`.
    pub async fn delete_process(&self, deadline: Deadline, key: &ProcessKey) -> Result<(), AgentError> {
        answer(deadline, self.client.delete_process(Context::default(), &key.request())).await.map(drop)
    }

    /// See `Agent.SignalProcess`.
    pub async fn signal(&self, deadline: Deadline, key: &ProcessKey, signal: u32, all: bool) -> Result<(), AgentError> {
        let request = proto::SignalRequest {
            container_id: key.container.clone(),
            exec_id: key.exec.clone(),
            signal,
            all,
            ..proto::SignalRequest::default()
        };
        answer(deadline, self.client.signal_process(Context::default(), &request)).await.map(drop)
    }

    /// See `Agent.ResizeTerminal`.
    pub async fn resize(
        &self,
        deadline: Deadline,
        key: &ProcessKey,
        width: u32,
        height: u32,
    ) -> Result<(), AgentError> {
        let request = proto::ResizeRequest {
            container_id: key.container.clone(),
            exec_id: key.exec.clone(),
            width,
            height,
            ..proto::ResizeRequest::default()
        };
        answer(deadline, self.client.resize_terminal(Context::default(), &request)).await.map(drop)
    }

    /// See `Agent.WaitProcess`. Ends with the process or with the VM.
    pub async fn wait(&self, key: &ProcessKey) -> Result<proto::ExitStatus, AgentError> {
        self.client.wait_process(Context::default(), &key.request()).await.map_err(AgentError::from)
    }

    /// See `Agent.NextEvent`. Ends with an event or with the VM.
    pub async fn next_event(&self) -> Result<proto::Event, AgentError> {
        self.client.next_event(Context::default(), &proto::Empty::new()).await.map_err(AgentError::from)
    }

    /// See `Agent.NextDemand`. Ends with a demand or with the VM.
    pub async fn next_demand(&self, refused: bool, may_shrink: bool) -> Result<proto::Demand, AgentError> {
        let request = proto::DemandRequest { refused, may_shrink, ..proto::DemandRequest::default() };
        self.client.next_demand(Context::default(), &request).await.map_err(AgentError::from)
    }
}

impl Connector for Agent {
    async fn forward(&self, deadline: Deadline) -> Result<UnixStream, NoConnection> {
        Ok(Self::forward(self, deadline).await?)
    }

    async fn handover(&self, deadline: Deadline) -> Result<UnixStream, NoConnection> {
        Ok(Self::handover(self, deadline).await?)
    }

    async fn vm_ended(&self) {
        Self::vm_ended(self).await;
    }
}

fn tell_failed(answer: &proto::AddNetworkResponse) {
    for failed in answer.failed.iter().take(MAX_FAILED) {
        tracing::warn!(
            "the guest's kernel refused a part of the pod's network, which now differs from the namespace on the node: {}",
            bounded(failed)
        );
    }
}

fn container(id: &str) -> proto::ContainerRequest {
    proto::ContainerRequest { container_id: id.to_owned(), ..proto::ContainerRequest::default() }
}

/// See [`Operation::GuestAnswer`].
async fn answer<T>(deadline: Deadline, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T, AgentError> {
    within(deadline.part(Operation::GuestAnswer), call).await
}

/// See [`Operation::GuestWork`].
async fn work<T>(deadline: Deadline, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T, AgentError> {
    within(deadline.part(Operation::GuestWork), call).await
}

async fn within<T>(deadline: Deadline, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T, AgentError> {
    match deadline.timeout(call).await {
        Ok(answer) => answer.map_err(AgentError::from),
        Err(waited) => Err(AgentError::Silent(waited)),
    }
}

/// A call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent says no.
    #[error("{message}")]
    Refused {
        /// Its gRPC code.
        code: Code,
        /// Its words, bounded.
        message: String,
    },
    /// The guest image and the shim were not installed together.
    #[error("the guest image is of Bulkhead {0:?}, the shim of {RELEASE:?}; install both from the same release")]
    Release(String),
    /// The agent did not answer in time.
    #[error(
        "the pod's guest has not answered within {0:?}; it may be short of CPU or memory, or hang: remove the pod if this stays so"
    )]
    Silent(Duration),
    /// The connection is gone: the VM has ended, or the agent's bytes made no sense.
    #[error(
        "the connection to the pod's guest has broken: {0}; the VM has ended or is about to, and the shim's log says why"
    )]
    Gone(String),
    /// No connection.
    #[error(transparent)]
    Vm(#[from] VmError),
}

impl From<ttrpc::Error> for AgentError {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused { code: status.code(), message: bounded(&status.message) },
            other => Self::Gone(bounded(&other.to_string())),
        }
    }
}

fn bounded(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect()
}
