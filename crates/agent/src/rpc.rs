//! The agent's service: one method for each request, each a call into the part that owns the matter, and the one place
//! where errors become status codes.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bulkhead_protocol::RELEASE;
use bulkhead_protocol::agent::{
    AddNetworkRequest, AddNetworkResponse, Agent, BlockDevice, ContainerRequest, CreateContainerRequest,
    CreateSandboxRequest, CreateSandboxResponse, Demand, DemandRequest, DeviceSlot, Empty, Event, ExecRequest,
    ExitStatus, HugePageVolume, ImageDevice, ProcessRequest, ResizeGuestRequest, ResizeRequest, SignalRequest, Stats,
    SyncClockRequest, SyncClockResponse, UpdateContainerRequest, UpdateVolumeRequest,
};
use bulkhead_protocol::error::chain;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;
use ttrpc::error::get_rpc_status;

use crate::containers::{ContainerError, Containers};
use crate::devices::{self, DeviceError};
use crate::events;
use crate::netns::Netns;
use crate::runtime::Runtime;
use crate::sandbox::{Clock, Sandbox, SandboxError};
use crate::stdio::{Streams, ends};

/// Longest text of a refusal in bytes. The shim passes on the first thousand characters.
const MAX_TEXT: usize = 4096;

/// Implements the protocol's service.
pub struct Service {
    sandbox: Arc<Sandbox>,
    containers: Arc<Containers>,
    events: events::Receiver,
    kernel_boot: Duration,
}

impl Service {
    /// A guest without a pod.
    pub fn new(runtime: Runtime, streams: Arc<Streams>, netns: Netns, clock: Clock, kernel_boot: Duration) -> Self {
        let (sender, events) = events::channel();
        let containers = Arc::new(Containers::new(runtime, streams, netns.clone(), sender));
        Self { sandbox: Arc::new(Sandbox::new(netns, clock)), containers, events, kernel_boot }
    }
}

#[async_trait]
impl Agent for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let (sandbox, containers) = (Arc::clone(&self.sandbox), Arc::clone(&self.containers));
        let created = async move {
            sandbox.claim()?;
            if let Some(user) = request.user_namespace.as_ref() {
                containers.create_user_namespace(user).await?;
            }
            Ok::<_, ServiceError>(sandbox.set_up(request).await?)
        };
        let network = Some(whole(created).await?.map_err(status)?).into();
        let kernel_boot_ns = u64::try_from(self.kernel_boot.as_nanos()).unwrap_or(u64::MAX);
        let release = RELEASE.to_owned();
        Ok(CreateSandboxResponse { kernel_boot_ns, release, network, ..CreateSandboxResponse::new() })
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        done(whole(async move { sandbox.destroy().await }).await?)
    }

    async fn sync_clock(&self, _: &TtrpcContext, request: SyncClockRequest) -> ttrpc::Result<SyncClockResponse> {
        // At once: what waits makes the answer worth less.
        self.sandbox.sync_clock(&request).map_err(status)
    }

    async fn add_network(&self, _: &TtrpcContext, request: AddNetworkRequest) -> ttrpc::Result<AddNetworkResponse> {
        let slots: Vec<_> = request.devices.iter().map(|device| device.slot).collect();
        beside(move || devices::bind_all(&slots)).await?.map_err(status)?;
        let sandbox = Arc::clone(&self.sandbox);
        whole(async move { sandbox.add_network(request).await }).await?.map_err(status)
    }

    async fn resize_guest(&self, _: &TtrpcContext, request: ResizeGuestRequest) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        done(beside(move || sandbox.resize(&request)).await?)
    }

    async fn add_huge_page_volume(&self, _: &TtrpcContext, request: HugePageVolume) -> ttrpc::Result<Empty> {
        let sandbox = Arc::clone(&self.sandbox);
        done(beside(move || sandbox.add_huge_page_volume(&request)).await?)
    }

    async fn bind_device(&self, _: &TtrpcContext, request: DeviceSlot) -> ttrpc::Result<BlockDevice> {
        beside(move || devices::bind(request.slot)).await?.map_err(status)
    }

    async fn bind_images(&self, _: &TtrpcContext, request: ImageDevice) -> ttrpc::Result<Empty> {
        let layers = self.containers.layers();
        done(beside(move || layers.bind(&request)).await?)
    }

    async fn unbind_device(&self, _: &TtrpcContext, request: DeviceSlot) -> ttrpc::Result<Empty> {
        let layers = self.containers.layers();
        done(beside(move || layers.unbind(request.slot)).await?)
    }

    async fn create_container(&self, _: &TtrpcContext, request: CreateContainerRequest) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        done(whole(async move { containers.create(request).await }).await?)
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        done(self.containers.start(&request.container_id).await)
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        done(whole(async move { containers.delete(&request.container_id).await }).await?)
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.container_id).map_err(status)?;
        done(container.pause().await)
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.container_id).map_err(status)?;
        done(container.resume().await)
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.containers.get(&request.container_id).map_err(status)?;
        // A lower memory limit is written for as long as the kernel reclaims.
        done(beside(move || container.update(&request.resources)).await?)
    }

    async fn get_stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Stats> {
        let container = self.containers.get(&request.container_id).map_err(status)?;
        let mut stats = container.cgroup().stats();
        stats.network = self.sandbox.interface_stats();
        Ok(stats)
    }

    async fn update_volume(&self, _: &TtrpcContext, request: UpdateVolumeRequest) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        done(whole(async move { containers.update_volume(request).await }).await?)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        let containers = Arc::clone(&self.containers);
        done(whole(async move { containers.exec(request).await }).await?)
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        done(self.containers.delete_exec(&request.container_id, &request.exec_id))
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        done(self.containers.signal(&request.container_id, &request.exec_id, request.signal, request.all))
    }

    async fn resize_terminal(&self, _: &TtrpcContext, request: ResizeRequest) -> ttrpc::Result<Empty> {
        let size = ends::window_size(request.width, request.height);
        done(self.containers.resize(&request.container_id, &request.exec_id, size))
    }

    async fn wait_process(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<ExitStatus> {
        let process = self.containers.process(&request.container_id, &request.exec_id).map_err(status)?;
        let exit = process.wait().await;
        // Asked before a delete can have been: whoever waits deletes afterwards.
        let container = self.containers.get(&request.container_id).ok().filter(|_| request.exec_id.is_empty());
        let oom_killed = container.is_some_and(|container| container.cgroup().has_oom_kills());
        let (stdout_bytes, stderr_bytes) = self.containers.written(&request.container_id, &request.exec_id);
        Ok(ExitStatus { code: exit.code, oom_killed, stdout_bytes, stderr_bytes, ..Default::default() })
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Event> {
        let event = self.events.next().await;
        event.ok_or_else(|| get_rpc_status(Code::UNAVAILABLE, "the agent is ending"))
    }

    async fn next_demand(&self, _: &TtrpcContext, request: DemandRequest) -> ttrpc::Result<Demand> {
        self.sandbox.next_demand(&request).await.map_err(status)
    }
}

/// Runs work that must not stop half way to its end. A method is dropped when its caller gives up or is gone,
/// and a process could have been created by then that nobody knows of.
async fn whole<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> ttrpc::Result<T> {
    let lost = |_| get_rpc_status(Code::UNAVAILABLE, "the agent is ending");
    tokio::spawn(work).await.map_err(lost)
}

/// Runs what waits for the kernel beside the event loop, to its end as [`whole`] does.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> ttrpc::Result<T> {
    let lost = |_| get_rpc_status(Code::UNAVAILABLE, "the agent is ending");
    tokio::task::spawn_blocking(work).await.map_err(lost)
}

fn done<E: Into<ServiceError>>(outcome: Result<(), E>) -> ttrpc::Result<Empty> {
    outcome.map(|()| Empty::new()).map_err(status)
}

/// What a method can fail with.
#[derive(Debug, thiserror::Error)]
enum ServiceError {
    #[error(transparent)]
    Container(#[from] ContainerError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The protocol's code for an error, with the whole chain of causes as its text.
fn status<E: Into<ServiceError>>(error: E) -> ttrpc::Error {
    use ContainerError as C;
    let error = error.into();
    let code = match &error {
        ServiceError::Container(C::NoContainer { .. } | C::NoProcess { .. } | C::Ended { .. }) => Code::NOT_FOUND,
        ServiceError::Container(C::ContainerExists { .. } | C::ExecExists { .. })
        | ServiceError::Sandbox(SandboxError::Exists) => Code::ALREADY_EXISTS,
        ServiceError::Container(C::State { .. } | C::NoTerminal { .. } | C::NoPodNamespace) => {
            Code::FAILED_PRECONDITION
        }
        ServiceError::Container(
            C::BadId { .. }
            | C::Json { .. }
            | C::Incomplete { .. }
            | C::LeftIn { .. }
            | C::BadSignal { .. }
            | C::NoUserNamespace,
        ) => Code::INVALID_ARGUMENT,
        ServiceError::Sandbox(error) if error.is_bad_request() => Code::INVALID_ARGUMENT,
        // What a runtime reports of a program that it cannot execute, among others: the text is what counts.
        ServiceError::Container(_) => Code::UNKNOWN,
        ServiceError::Sandbox(SandboxError::Size(_)) => Code::RESOURCE_EXHAUSTED,
        ServiceError::Sandbox(_) | ServiceError::Device(_) => Code::INTERNAL,
    };
    get_rpc_status(code, bounded(chain(&error)))
}

/// A text may quote what a container's author has written, a program's name of any length; the shim ends a connection on which
/// long answers come.
fn bounded(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_protocol::agent::{HugeTlbStats, InterfaceStats, IoStats, MemoryStats};
    use bulkhead_protocol::guest::{MAX_ANSWER, MAX_STATS_ENTRIES};
    use protobuf::Message;

    #[test]
    fn longest_answer_is_short_enough() {
        const MAX: u64 = u64::MAX;
        let (major, minor, rbytes, wbytes, rios, wios) = (MAX, MAX, MAX, MAX, MAX, MAX);
        let disk = IoStats { major, minor, rbytes, wbytes, rios, wios, ..Default::default() };
        let interface = InterfaceStats {
            name: "x".repeat(15),
            rx_bytes: MAX,
            rx_packets: MAX,
            rx_errors: MAX,
            rx_dropped: MAX,
            tx_bytes: MAX,
            tx_packets: MAX,
            tx_errors: MAX,
            tx_dropped: MAX,
            ..Default::default()
        };
        let pool =
            HugeTlbStats { page_size: "2MB".into(), current: MAX, max: MAX, fail_count: MAX, ..Default::default() };
        // More than twice the keys that Linux 6.12 has.
        let stat = (0..160).map(|key| (format!("a key of some thirty bytes {key:03}"), MAX)).collect();
        let stats = Stats {
            memory: Some(MemoryStats { stat, ..Default::default() }).into(),
            io: vec![disk; MAX_STATS_ENTRIES],
            network: vec![interface; MAX_STATS_ENTRIES],
            huge_tlb: vec![pool; 8],
            ..Default::default()
        };
        let size = usize::try_from(stats.compute_size()).unwrap();
        assert!(size < MAX_ANSWER - 1024, "{size}");
    }

    #[test]
    fn codes_are_those_of_the_protocol() {
        let code = |error: ServiceError| match status(error) {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
            other => panic!("{other}"),
        };
        let (not_found, text) = code(ContainerError::NoContainer { id: "c".into() }.into());
        assert_eq!((not_found, text.as_str()), (Code::NOT_FOUND, "there is no container c"));
        assert_eq!(code(ContainerError::ContainerExists { id: "c".into() }.into()).0, Code::ALREADY_EXISTS);
        assert_eq!(code(SandboxError::Exists.into()).0, Code::ALREADY_EXISTS);
        assert_eq!(code(ContainerError::BadId { id: "/".into() }.into()).0, Code::INVALID_ARGUMENT);
        assert_eq!(code(ContainerError::BadId { id: "\u{e9}".repeat(100_000) }.into()).1.len(), MAX_TEXT - 1);
    }
}
