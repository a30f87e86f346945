//! The VMM's process and its control socket (DESIGN D1, D2).
//!
//! One task owns both. It ends, and with it the VM as far as anyone else is concerned, when the process has been waited
//! for; that happens at once when the process dies, however it dies. The socket is the process's stdin: inherited without
//! clearing close-on-exec on any descriptor of the shim.

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bulkhead_protocol::control::{self, Command, ControlError, ExitReason, Reply, Request};
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::io::Interest;
use tokio::net::{UnixDatagram, UnixStream};
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};

use super::console::{self, Tail};
use super::hypervisor::Machine;
use super::pid_namespace;
use crate::config::Config;

/// How long the VMM may take to connect to a port of the guest. The guest's kernel answers from its interrupt handler, so
/// a second is much on hardware; emulated CI nodes are some fifty times slower.
const CONNECT_DEADLINE: Duration = Duration::from_secs(30);

/// How long the VMM may take to fill or empty a slot. It waits for nothing but a request that a disk is working on; a disk
/// of the host that takes longer than a kernel's own patience is broken.
const SLOT_DEADLINE: Duration = Duration::from_secs(30);

/// How long the guest may take to plug memory. Linux takes some 100 ms for a GiB; emulated CI nodes are some fifty times
/// slower, and the kubelet waits two minutes for a container.
const PLUG_DEADLINE: Duration = Duration::from_secs(60);

/// How long the VMM's process may stay when it has said that the guest has ended, or has closed its socket. What it still has
/// to do is to say why on stderr, and to give the guest's memory back.
const AFTERWORD: Duration = Duration::from_secs(3);

/// Requests that wait for the task.
const REQUESTS: usize = 64;

/// Requests that wait until the VMM reads its socket. A VMM that reads has hardly ever one waiting; a kubelet probes all
/// containers of a pod at once, and each probe is a connection.
const UNSENT: usize = 1024;

type Answer = oneshot::Sender<Result<Reply, VmError>>;

/// A VM, as long as its VMM's process is there. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Vm {
    pid: u32,
    requests: mpsc::Sender<Order>,
    ended: watch::Receiver<bool>,
}

#[derive(Debug)]
enum Order {
    Ask(Unsent),
    Kill,
}

impl Vm {
    /// Starts the VMM, boots the machine and waits until its agent listens. Also says when the machine was built.
    pub async fn boot(config: &Config, machine: Machine<'_>, pid_file: &Path) -> Result<(Self, Instant), VmError> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(io_error)?;
        let tail = Tail::default();
        let (console, console_task) = console::follow("guest", &tail)?;
        let (stderr, stderr_task) = console::follow("vmm", &tail)?;
        let mut command = tokio::process::Command::new(&config.vmm);
        command.args(["--control-fd", "0"]).stdin(theirs).stdout(Stdio::null()).stderr(stderr);
        command.env_clear().current_dir("/").kill_on_drop(true);
        let spawned = pid_namespace::spawn(&mut command);
        // The command holds the VMM's end of the socket and of stderr; only the VMM may.
        drop(command);
        let child = spawned.map_err(|source| VmError::Spawn { path: config.vmm.clone(), source })?;
        let pid = child.id().unwrap_or(0);
        super::record(pid_file, pid);
        super::cgroup::set_oom_scores(pid);
        if let Some(cgroup) = machine.cgroup {
            cgroup.add(pid);
        }
        let (spec, fds) = machine.spec(config, &console);
        let boot = Request { id: 0, command: Command::Boot(spec) };
        control::send(&ours, &boot, &fds).map_err(VmError::Control)?;
        drop(fds);
        drop((machine, console));
        let (vm, ready) = Self::supervise(ours, child, pid)?;
        match tokio::time::timeout(config.boot_timeout, ready).await {
            Ok(Ok(Ok(built))) => Ok((vm, built)),
            Ok(Ok(Err(VmError::DiedEarly { how, .. }))) => {
                // The process is gone; what it has said may still be in the pipes.
                let said = async { tokio::join!(console_task, stderr_task) };
                let _ = tokio::time::timeout(AFTERWORD, said).await;
                Err(vm.fail(VmError::DiedEarly { how, last_words: tail.last_line() }).await)
            }
            Ok(Ok(Err(error))) => Err(vm.fail(error).await),
            Ok(Err(_)) => Err(vm.fail(VmError::Ended).await),
            Err(_) => Err(vm.fail(VmError::NotReady(config.boot_timeout, tail.last_line())).await),
        }
    }

    pub(super) fn supervise(
        socket: OwnedFd,
        child: Child,
        pid: u32,
    ) -> Result<(Self, oneshot::Receiver<Result<Instant, VmError>>), VmError> {
        // A SEQPACKET socket is waited for like a datagram socket; only `control` reads and writes it.
        let socket = std::os::unix::net::UnixDatagram::from(socket);
        socket.set_nonblocking(true).map_err(VmError::Socket)?;
        let socket = UnixDatagram::from_std(socket).map_err(VmError::Socket)?;
        let (requests, orders) = mpsc::channel(REQUESTS);
        let (tell_end, ended) = watch::channel(false);
        let (tell_ready, ready) = oneshot::channel();
        let supervisor = Supervisor {
            socket,
            child,
            unsent: VecDeque::new(),
            waiting: HashMap::new(),
            next_id: 1,
            built: Instant::now(),
            ready: Some(tell_ready),
            deaf: false,
            over: None,
            ends: false,
            reason: None,
        };
        tokio::spawn(supervisor.run(orders, tell_end));
        Ok((Self { pid, requests, ended }, ready))
    }

    async fn fail(self, error: VmError) -> VmError {
        self.kill().await;
        error
    }

    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the VMM's process is gone.
    pub fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Returns when the VMM's process is gone.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        // An error means that the task is gone, and the process with it.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Kills the VMM and waits for its process: SIGKILL is not refused, so this ends.
    pub async fn kill(&self) {
        let _ = self.requests.send(Order::Kill).await;
        self.ended().await;
    }

    /// Connects to a vsock port of the guest.
    pub async fn connect(&self, port: u32) -> Result<UnixStream, VmError> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(VmError::Socket)?;
        match self.ask(Command::ConnectVsock { port }, vec![theirs.into()], CONNECT_DEADLINE).await {
            Err(VmError::Silent(_)) => return Err(VmError::ConnectTimeout(port)),
            answer => answer?,
        };
        ours.set_nonblocking(true).map_err(VmError::Socket)?;
        UnixStream::from_std(ours).map_err(VmError::Socket)
    }

    /// Puts a disk into a slot of the machine and answers which.
    pub async fn add_disk(&self, file: OwnedFd, read_only: bool, serial: String) -> Result<u8, VmError> {
        let device = DeviceSpec::Block { file: FdIndex(0), read_only, serial };
        match self.ask(Command::AddDevice(device), vec![file], SLOT_DEADLINE).await? {
            Reply::Added { slot, .. } => Ok(slot),
            _ => Err(VmError::Unexpected),
        }
    }

    /// Empties a slot, whatever the guest does with it.
    pub async fn remove_device(&self, slot: u8) -> Result<(), VmError> {
        self.ask(Command::RemoveDevice { slot }, Vec::new(), SLOT_DEADLINE).await.map(drop)
    }

    /// Grows the guest to so much memory beyond its boot memory, and waits until it is there.
    pub async fn grow_memory(&self, mib: u64) -> Result<(), VmError> {
        match self.ask(Command::ResizeMemory { mib }, Vec::new(), PLUG_DEADLINE).await {
            Ok(Reply::Resized { mib: there, .. }) if there >= mib => Ok(()),
            Ok(Reply::Resized { .. }) | Err(VmError::Silent(_)) => Err(VmError::NotPlugged(mib)),
            Ok(_) => Err(VmError::Unexpected),
            Err(error) => Err(error),
        }
    }

    /// Asks the guest to shrink to so much memory beyond its boot memory. It does so as soon as it can; nobody waits.
    pub async fn shrink_memory(&self, mib: u64) -> Result<(), VmError> {
        let request = Unsent { command: Command::ResizeMemory { mib }, fds: Vec::new(), answer: None };
        self.requests.send(Order::Ask(request)).await.map_err(|_| VmError::Ended)
    }

    async fn ask(&self, command: Command, fds: Vec<OwnedFd>, deadline: Duration) -> Result<Reply, VmError> {
        let (answer, answered) = oneshot::channel();
        let order = Order::Ask(Unsent { command, fds, answer: Some(answer) });
        let done = async {
            self.requests.send(order).await.map_err(|_| VmError::Ended)?;
            answered.await.map_err(|_| VmError::Ended)?
        };
        tokio::time::timeout(deadline, done).await.map_err(|_| VmError::Silent(deadline))?
    }
}

fn io_error(error: Errno) -> VmError {
    VmError::Socket(error.into())
}

/// A request that the VMM has not been told of.
#[derive(Debug)]
struct Unsent {
    command: Command,
    fds: Vec<OwnedFd>,
    /// `None` if nobody waits.
    answer: Option<Answer>,
}

struct Supervisor {
    socket: UnixDatagram,
    child: Child,
    /// Connections that the VMM has not been told of.
    unsent: VecDeque<Unsent>,
    waiting: HashMap<u64, Answer>,
    next_id: u64,
    /// When the machine was built.
    built: Instant,
    ready: Option<oneshot::Sender<Result<Instant, VmError>>>,
    /// The socket has ended, or spoke nonsense: only the process's end is awaited.
    deaf: bool,
    /// The process has to end by itself, by then; `None` when it is being killed for it.
    over: Option<tokio::time::Instant>,
    /// `over` has been set once.
    ends: bool,
    /// Why the guest has ended.
    reason: Option<ExitReason>,
}

impl Supervisor {
    async fn run(mut self, mut orders: mpsc::Receiver<Order>, ended: watch::Sender<bool>) {
        loop {
            tokio::select! {
                status = self.child.wait() => {
                    tracing::info!(?status, "the VMM has ended");
                    self.hear_the_end();
                    self.tell_ready(Err(early_end(status.ok(), self.reason)));
                    break;
                }
                received = receive(&self.socket), if !self.deaf => self.take(received),
                () = until(self.over) => {
                    tracing::warn!("killing a VMM that goes on after its end");
                    self.over = None;
                    self.kill();
                }
                // Beside the orders, not among them: a VMM that reads nothing can still be killed.
                sent = send_next(&self.socket, self.next_id, self.unsent.front()) => self.sent(sent),
                order = orders.recv() => match order {
                    Some(Order::Ask(request)) => self.ask(request),
                    Some(Order::Kill) => self.kill(),
                    None => {
                        self.kill();
                        let _ = self.child.wait().await;
                        break;
                    }
                },
            }
        }
        ended.send_replace(true);
    }

    /// What the VMM has sent and this task has not read when the process is gone. As nobody sends any more, it ends.
    fn hear_the_end(&mut self) {
        while !self.deaf
            && let Ok(Some((reply, _))) = control::receive::<Reply>(&self.socket)
        {
            if matches!(reply, Reply::GuestExited { .. } | Reply::Failed { .. }) {
                self.answer(reply);
            }
        }
    }

    fn kill(&mut self) {
        if let Err(error) = self.child.start_kill() {
            tracing::warn!(%error, "cannot kill the VMM");
        }
    }

    fn take(&mut self, received: Result<Option<Reply>, ControlError>) {
        match received {
            Ok(Some(reply)) => self.answer(reply),
            Ok(None) => {
                self.deaf = true;
                self.over();
            }
            Err(error) => {
                tracing::error!("killing the VMM: {}", crate::pod::error::chain(&error));
                self.deaf = true;
                self.kill();
            }
        }
    }

    fn answer(&mut self, reply: Reply) {
        match reply {
            Reply::GuestReady => self.tell_ready(Ok(self.built)),
            Reply::GuestExited { reason } => {
                if self.over() {
                    tracing::info!(?reason, "the guest has ended");
                    self.reason = Some(reason);
                }
            }
            Reply::Done { id: 0 } => self.built = Instant::now(),
            Reply::Done { id } | Reply::Added { id, .. } | Reply::Resized { id, .. } => {
                if let Some(answer) = self.waiting.remove(&id) {
                    let _ = answer.send(Ok(reply));
                }
            }
            Reply::Failed { id: 0, message } => self.tell_ready(Err(VmError::Refused(bounded(&message)))),
            Reply::Failed { id, message } => {
                if let Some(answer) = self.waiting.remove(&id) {
                    let _ = answer.send(Err(VmError::Refused(bounded(&message))));
                }
            }
        }
    }

    /// The process has to end now by itself. Answers whether that is news.
    fn over(&mut self) -> bool {
        let news = !self.ends;
        if news {
            self.ends = true;
            self.over = Some(tokio::time::Instant::now() + AFTERWORD);
        }
        news
    }

    fn tell_ready(&mut self, result: Result<Instant, VmError>) {
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(result);
        }
    }

    fn ask(&mut self, request: Unsent) {
        // Whoever gave up is forgotten, so that both hold no more than what is being waited for.
        self.waiting.retain(|_, answer| !answer.is_closed());
        self.unsent.retain(|unsent| !unsent.answer.as_ref().is_some_and(Answer::is_closed));
        if self.unsent.len() < UNSENT {
            self.unsent.push_back(request);
        } else if let Some(answer) = request.answer {
            let _ = answer.send(Err(VmError::Busy));
        }
    }

    /// The first of the unsent requests has been told to the VMM, or cannot be.
    fn sent(&mut self, sent: Result<(), ControlError>) {
        let Some(Unsent { answer, .. }) = self.unsent.pop_front() else { return };
        let id = self.next_id;
        self.next_id += 1;
        let Some(answer) = answer else { return };
        match sent {
            Ok(()) => drop(self.waiting.insert(id, answer)),
            Err(error) => drop(answer.send(Err(VmError::Control(error)))),
        }
    }
}

/// Why there is no guest, when the VMM's process has ended before it was ready.
fn early_end(status: Option<ExitStatus>, reason: Option<ExitReason>) -> VmError {
    if let Some(signal) = status.and_then(|status| status.signal()) {
        return VmError::Killed(signal);
    }
    let how = match reason {
        Some(ExitReason::Reset) => "it reset itself, as its kernel does when it panics",
        Some(ExitReason::VcpuFault) => "its vCPU met something that KVM cannot go on from",
        None => "the VMM ended",
    };
    VmError::DiedEarly { how, last_words: String::new() }
}

async fn until(time: Option<tokio::time::Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Tells the VMM of a request as soon as it can take it; never returns without one. May be dropped at any time: a
/// message has left whole exactly when this returns.
async fn send_next(socket: &UnixDatagram, id: u64, next: Option<&Unsent>) -> Result<(), ControlError> {
    let Some(Unsent { command, fds, .. }) = next else { return std::future::pending().await };
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    send(socket, &Request { id, command: command.clone() }, &fds).await
}

async fn receive(socket: &UnixDatagram) -> Result<Option<Reply>, ControlError> {
    let mut got = Ok(None);
    let wait = socket.async_io(Interest::READABLE, || {
        got = control::receive::<Reply>(socket);
        would_block(matches!(&got, Err(ControlError::Receive(error)) if *error == Errno::AGAIN))
    });
    // An error of the reactor's own: the socket is of no use any more.
    if wait.await.is_err() {
        return Ok(None);
    }
    // A VMM sends no descriptors; what came is closed here.
    got.map(|message| message.map(|(reply, _)| reply))
}

async fn send(socket: &UnixDatagram, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
    let mut sent = Ok(());
    let wait = socket.async_io(Interest::WRITABLE, || {
        sent = control::send(socket, request, fds);
        would_block(matches!(&sent, Err(ControlError::Send(error)) if *error == Errno::AGAIN))
    });
    match wait.await {
        Ok(()) => sent,
        Err(_) => Err(ControlError::Send(Errno::PIPE)),
    }
}

fn would_block(yes: bool) -> std::io::Result<()> {
    if yes { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
}

/// The VMM's words may be the guest's: bounded, and one line.
fn bounded(message: &str) -> String {
    message.chars().filter(|c| !c.is_control()).take(512).collect()
}

/// The machine cannot be had, or is gone.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No KVM.
    #[error("cannot open /dev/kvm; enable virtualization in the firmware and load kvm_intel or kvm_amd")]
    NoKvm(#[source] std::io::Error),
    /// A file of the installation.
    #[error("cannot open the {what} {path}; install it, or set `{what}` in /etc/bulkhead/config.toml")]
    NoFile {
        /// Its key in the configuration.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// open(2).
        #[source]
        source: std::io::Error,
    },
    /// The VMM cannot be run.
    #[error("cannot start the VMM {path}")]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// execve(2).
        #[source]
        source: std::io::Error,
    },
    /// A socket or pipe.
    #[error("cannot make a socket or pipe for the VMM")]
    Socket(#[source] std::io::Error),
    /// The control socket.
    #[error("the VMM does not understand or does not answer")]
    Control(#[source] ControlError),
    /// The VMM says no.
    #[error("the VMM refused: {0}")]
    Refused(String),
    /// The guest or the VMM ended while booting.
    #[error("the guest ended before it was ready: {how}; last words: {last_words:?}")]
    DiedEarly {
        /// How.
        how: &'static str,
        /// Of the guest's console, or of the VMM.
        last_words: String,
    },
    /// A signal ended the VMM while booting, the out-of-memory killer's above all.
    #[error(
        "signal {0} ended the VMM before the guest was ready; if it was SIGKILL, raise the pod's memory limit, which has to \
         hold the guest's kernel as well"
    )]
    Killed(i32),
    /// The guest took too long.
    #[error("the guest was not ready within {0:?}; its last words: {1:?}; raise boot_timeout_s on a slow node")]
    NotReady(Duration, String),
    /// The VM is gone.
    #[error("the pod's VM has ended")]
    Ended,
    /// The VMM did not answer.
    #[error("the pod's VMM has not done within {0:?} what it was asked for")]
    Silent(Duration),
    /// The VMM answered something else.
    #[error("the pod's VMM answered another question; are shim and VMM of the same version?")]
    Unexpected,
    /// The guest does not take the memory.
    #[error(
        "the guest has not plugged {0} MiB of memory within {PLUG_DEADLINE:?}; lower the pod's limits, or restart it"
    )]
    NotPlugged(u64),
    /// The VMM reads nothing.
    #[error("the pod's VMM does not read its socket, and {UNSENT} requests wait already; remove the pod")]
    Busy,
    /// The guest did not accept.
    #[error("the guest did not accept a connection to its port {0} within {CONNECT_DEADLINE:?}")]
    ConnectTimeout(u32),
}
