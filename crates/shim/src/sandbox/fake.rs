//! A VM for tests: `sleep` in the VMM's place, and the other end of its control socket and the agent's service in the
//! test's own process. Nothing is booted; the agent does what it is asked for, but for what a test tells it.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bulkhead_protocol::agent as proto;
use bulkhead_protocol::control::{self, Command, ControlError, Reply, Request};
use bulkhead_protocol::counters::DeviceCounters;
use bulkhead_protocol::guest::AGENT_RPC_PORT;
use bulkhead_protocol::stdio::{ACCEPTED, decode_length};
use futures::StreamExt;
use protobuf::well_known_types::timestamp::Timestamp;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixDatagram, UnixStream};
use tokio::sync::watch;
use ttrpc::asynchronous::{Server, TtrpcContext, transport::Listener};

use super::*;
use crate::annotations::Request as SizeRequest;
use crate::config::{Node, RawConfig};

/// What the agent has been asked for and what it does about it.
#[derive(Debug, Default)]
pub struct FakeAgent {
    state: Mutex<State>,
    /// Changes with every change of the state.
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    /// Methods and what they were about, in the order of the calls.
    calls: Vec<String>,
    refused: HashSet<&'static str>,
    held: HashSet<&'static str>,
    /// By how many nanoseconds the guest's clock is ahead of the host's.
    clock: i64,
    /// Processes by container and exec id, with the exit codes of those that have ended.
    processes: HashMap<(String, String), Option<u32>>,
    /// What containers were created from.
    created: HashMap<String, proto::CreateContainerRequest>,
}

impl FakeAgent {
    /// Answers a method with a refusal from now on.
    pub fn refuse(&self, method: &'static str) {
        self.change(|state| _ = state.refused.insert(method));
    }

    /// Refuses a method no longer.
    pub fn accept(&self, method: &'static str) {
        self.change(|state| _ = state.refused.remove(method));
    }

    /// Does not answer a method from now on, until [`Self::release`].
    pub fn hold(&self, method: &'static str) {
        self.change(|state| _ = state.held.insert(method));
    }

    /// Answers the calls of a method that were held, and all later ones.
    pub fn release(&self, method: &'static str) {
        self.change(|state| _ = state.held.remove(method));
    }

    /// Has a process that runs.
    pub fn run(&self, container: &str, exec: &str) {
        self.change(|state| _ = state.processes.insert((container.to_owned(), exec.to_owned()), None));
    }

    /// Whether there is such a process, ended or not.
    pub fn has(&self, container: &str, exec: &str) -> bool {
        self.state().processes.contains_key(&(container.to_owned(), exec.to_owned()))
    }

    /// What a container was created from, at last.
    pub fn created(&self, container: &str) -> proto::CreateContainerRequest {
        self.state().created[container].clone()
    }

    /// Sets the guest's clock, by how many nanoseconds it is ahead of the host's.
    pub fn set_clock(&self, ahead: i64) {
        self.change(|state| state.clock = ahead);
    }

    /// By how many nanoseconds the guest's clock is ahead of the host's.
    pub fn clock(&self) -> i64 {
        self.state().clock
    }

    /// Returns when a call has come as often as that.
    pub async fn called(&self, call: &str, times: usize) {
        self.until(|state| (state.calls.iter().filter(|made| *made == call).count() >= times).then_some(())).await;
    }

    /// How often a call has come.
    pub fn calls(&self, call: &str) -> usize {
        self.state().calls.iter().filter(|made| *made == call).count()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state());
        self.changed.send_replace(());
        changed
    }

    async fn until<T>(&self, mut found: impl FnMut(&State) -> Option<T>) -> T {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(found) = found(&self.state()) {
                return found;
            }
            changed.changed().await.unwrap();
        }
    }

    /// Notes a call, and returns when it is to be answered.
    async fn call(&self, method: &'static str, about: &str) -> ttrpc::Result<()> {
        self.change(|state| state.calls.push(format!("{method} {about}")));
        self.until(|state| (!state.held.contains(method)).then_some(())).await;
        if self.state().refused.contains(method) { Err(refusal(ttrpc::Code::INVALID_ARGUMENT)) } else { Ok(()) }
    }
}

fn refusal(code: ttrpc::Code) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, "no"))
}

#[async_trait]
impl proto::Agent for FakeAgent {
    async fn destroy_sandbox(&self, _: &TtrpcContext, _: proto::Empty) -> ttrpc::Result<proto::Empty> {
        self.call("DestroySandbox", "").await.map(|()| proto::Empty::new())
    }

    async fn resize_guest(&self, _: &TtrpcContext, _: proto::ResizeGuestRequest) -> ttrpc::Result<proto::Empty> {
        self.call("ResizeGuest", "").await.map(|()| proto::Empty::new())
    }

    async fn sync_clock(
        &self,
        _: &TtrpcContext,
        request: proto::SyncClockRequest,
    ) -> ttrpc::Result<proto::SyncClockResponse> {
        let ahead = self.change(|state| {
            if request.error_ns > 0 {
                state.clock += request.ahead_ns;
            }
            state.clock
        });
        let now = i64::try_from(UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap();
        let realtime_ns = u64::try_from(now + ahead).unwrap();
        Ok(proto::SyncClockResponse { realtime_ns, ..proto::SyncClockResponse::default() })
    }

    async fn next_demand(&self, _: &TtrpcContext, r: proto::DemandRequest) -> ttrpc::Result<proto::Demand> {
        // A test that holds "more" has it demand less as long as that is possible.
        self.call("NextDemand", if r.refused { "again" } else { "" }).await?;
        Ok(proto::Demand { less: r.may_shrink && self.state().held.contains("more"), ..proto::Demand::default() })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: proto::CreateContainerRequest,
    ) -> ttrpc::Result<proto::Empty> {
        self.call("CreateContainer", &request.container_id).await?;
        self.run(&request.container_id, "");
        self.change(|state| _ = state.created.insert(request.container_id.clone(), request));
        Ok(proto::Empty::new())
    }

    async fn start_container(&self, _: &TtrpcContext, r: proto::ContainerRequest) -> ttrpc::Result<proto::Empty> {
        self.call("StartContainer", &r.container_id).await.map(|()| proto::Empty::new())
    }

    async fn delete_container(&self, _: &TtrpcContext, r: proto::ContainerRequest) -> ttrpc::Result<proto::Empty> {
        self.call("DeleteContainer", &r.container_id).await?;
        self.change(|state| state.processes.retain(|(container, _), _| *container != r.container_id));
        Ok(proto::Empty::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        r: proto::UpdateContainerRequest,
    ) -> ttrpc::Result<proto::Empty> {
        self.call("UpdateContainer", &r.container_id).await.map(|()| proto::Empty::new())
    }

    async fn update_volume(&self, _: &TtrpcContext, r: proto::UpdateVolumeRequest) -> ttrpc::Result<proto::Empty> {
        let about = format!("{}/{} {}", r.container_id, r.volume.number, r.volume.version);
        self.call("UpdateVolume", &about).await.map(|()| proto::Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: proto::ExecRequest) -> ttrpc::Result<proto::Empty> {
        self.call("Exec", &format!("{}/{}", request.container_id, request.exec_id)).await?;
        self.run(&request.container_id, &request.exec_id);
        Ok(proto::Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, r: proto::ProcessRequest) -> ttrpc::Result<proto::Empty> {
        self.call("DeleteProcess", &format!("{}/{}", r.container_id, r.exec_id)).await?;
        let gone = self.change(|state| state.processes.remove(&(r.container_id, r.exec_id)));
        gone.map(|_| proto::Empty::new()).ok_or(refusal(ttrpc::Code::NOT_FOUND))
    }

    async fn signal_process(&self, _: &TtrpcContext, r: proto::SignalRequest) -> ttrpc::Result<proto::Empty> {
        self.call("SignalProcess", &format!("{}/{} {}", r.container_id, r.exec_id, r.signal)).await?;
        self.change(|state| match state.processes.get_mut(&(r.container_id, r.exec_id)) {
            Some(code @ None) => {
                *code = Some(128 + r.signal);
                Ok(proto::Empty::new())
            }
            _ => Err(refusal(ttrpc::Code::NOT_FOUND)),
        })
    }

    async fn wait_process(&self, _: &TtrpcContext, r: proto::ProcessRequest) -> ttrpc::Result<proto::ExitStatus> {
        let key = (r.container_id, r.exec_id);
        let ended = self.until(|state| match state.processes.get(&key) {
            _ if state.held.contains("WaitProcess") => None,
            Some(None) => None,
            Some(Some(code)) => Some(Ok(*code)),
            None => Some(Err(refusal(ttrpc::Code::NOT_FOUND))),
        });
        Ok(proto::ExitStatus { code: ended.await?, ..proto::ExitStatus::default() })
    }
}

impl Sandbox {
    /// A sandbox whose share is in `dir` and has nothing mounted yet.
    pub async fn fake(dir: &Path) -> (Arc<Self>, Arc<FakeAgent>) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut vmm = tokio::process::Command::new("sleep");
        vmm.arg("1000").stdin(Stdio::null()).kill_on_drop(true);
        let vmm = vmm.spawn().unwrap();
        let pid = vmm.id().unwrap();
        let (vm, _) = Vm::supervise(ours, vmm, pid, oom::OomScore::of(pid)).unwrap();
        let fake = Arc::new(FakeAgent::default());
        tokio::spawn(obey(theirs, fake.clone()));
        let config = Config::validate(RawConfig::default(), Node { cpus: 8, memory_mib: 4096 }).unwrap();
        let (run_dir, inotify) = (RunDir::new(&dir.join("run"), "k8s.io", "s"), Inotify::default());
        let sandbox = Self {
            agent: Agent::connect(Deadline::begin(Operation::CreatePod), &vm).await.unwrap(),
            vm,
            share: Share::of(&run_dir),
            booted_at: Timestamp::now(),
            volumes: FollowedVolumes::new(inotify.clone()),
            disks: Disks::default(),
            images: Images::new(inotify),
            resizer: Resizer::new(Plan::new(&config, &SizeRequest::default()).unwrap()),
            cgroup: None,
            run_dir,
            network: Arc::new(PodNetwork::fake().await),
        };
        (Arc::new(sandbox), fake)
    }
}

/// Does what a VMM does, to the end of its control socket.
async fn obey(socket: OwnedFd, agent: Arc<FakeAgent>) {
    let socket = UnixDatagram::from_std(socket.into()).unwrap();
    // Connections last as long as the VMM.
    let mut served = Vec::new();
    loop {
        let mut received = Ok(None);
        let read = socket.async_io(Interest::READABLE, || {
            received = control::receive::<Request>(&socket);
            match received {
                Err(ControlError::Receive(Errno::AGAIN)) => Err(std::io::ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            }
        });
        read.await.unwrap();
        let Ok(Some((Request { id, command }, fds))) = received else { return };
        let reply = match command {
            Command::ConnectVsock { port } => {
                served.push(connected(port, fds, agent.clone()).await);
                Reply::Done { id }
            }
            Command::ResizeMemory { mib } => Reply::Resized { id, mib },
            Command::Counters => {
                Reply::Counters { id, devices: vec![DeviceCounters { kicks: 7, ..Default::default() }] }
            }
            _ => Reply::Done { id },
        };
        control::send(&socket, &reply, &[]).unwrap();
    }
}

async fn connected(port: u32, fds: Vec<OwnedFd>, agent: Arc<FakeAgent>) -> Option<Server> {
    let stream = std::os::unix::net::UnixStream::from(fds.into_iter().next().unwrap());
    stream.set_nonblocking(true).unwrap();
    let stream = UnixStream::from_std(stream).unwrap();
    if port != AGENT_RPC_PORT {
        tokio::spawn(accept(stream));
        return None;
    }
    let accepted = futures::stream::once(async { Ok(stream) }).chain(futures::stream::pending());
    let mut server = Server::new().add_listener(Listener::new(accepted));
    server = server.register_service(proto::create_agent(agent));
    server.start().await.unwrap();
    Some(server)
}

/// A standard stream on which nothing is said.
async fn accept(mut stream: UnixStream) {
    let mut prefix = [0; 2];
    stream.read_exact(&mut prefix).await.unwrap();
    stream.read_exact(&mut vec![0; decode_length(prefix).unwrap()]).await.unwrap();
    stream.write_all(&[ACCEPTED]).await.unwrap();
}
