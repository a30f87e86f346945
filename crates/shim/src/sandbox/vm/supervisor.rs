//! The task that owns a VMM's process and its control socket. It ends, and with it the VM as far as anyone else is
//! concerned, when the process has been waited for; that happens at once when the process dies, however it dies.

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Instant;

use bulkhead_protocol::control::{self, Command, ControlError, ExitReason, Reply, Request};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};

use super::VmError;
use crate::deadlines::Operation;

/// Requests that wait for the task.
const REQUESTS: usize = 64;

/// Requests that wait until the VMM reads its socket. A VMM that reads has hardly ever one waiting; a kubelet probes all
/// containers of a pod at once, and each probe is a connection.
const UNSENT: usize = 1024;

type Answer = oneshot::Sender<Result<Reply, VmError>>;

/// What the task is told.
#[derive(Debug)]
pub(super) enum Order {
    Ask(Unsent),
    Kill,
}

/// A request that the VMM has not been told of.
#[derive(Debug)]
pub(super) struct Unsent {
    pub command: Command,
    pub fds: Vec<OwnedFd>,
    /// `None` if nobody waits.
    pub answer: Option<Answer>,
}

/// A VMM that has its task.
pub(super) struct Supervised {
    /// Its process.
    pub process: OwnedFd,
    /// Where the task takes orders.
    pub requests: mpsc::Sender<Order>,
    /// Set when the process is gone.
    pub ended: watch::Receiver<bool>,
    /// Says when the machine was built, once the agent listens.
    pub ready: oneshot::Receiver<Result<Instant, VmError>>,
}

/// Starts the task of a VMM that has been told to boot.
pub(super) fn supervise(socket: OwnedFd, child: Child, pid: u32) -> Result<Supervised, VmError> {
    // A SEQPACKET socket is waited for like a datagram socket; only `control` reads and writes it.
    let socket = std::os::unix::net::UnixDatagram::from(socket);
    socket.set_nonblocking(true).map_err(VmError::Socket)?;
    let socket = UnixDatagram::from_std(socket).map_err(VmError::Socket)?;
    // Here it has not been waited for, so that the number is still its own.
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(VmError::Ended)?;
    let process = pidfd_open(raw, PidfdFlags::empty()).map_err(|error| VmError::Process(error.into()))?;
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
        socket_closed: false,
        kill_at: None,
        ending: false,
        reason: None,
    };
    tokio::spawn(supervisor.run(orders, tell_end));
    Ok(Supervised { process, requests, ended, ready })
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
    socket_closed: bool,
    /// When the process is killed if it has not ended by itself; `None` before it has to end, and once it has been killed.
    kill_at: Option<tokio::time::Instant>,
    /// The process has to end: `kill_at` has been set once.
    ending: bool,
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
                received = receive(&self.socket), if !self.socket_closed => self.take(received),
                () = until(self.kill_at) => {
                    let limit = Operation::VmmExit.budget();
                    tracing::warn!("the VMM has not exited {limit:?} after it reported the guest's end; killing it");
                    self.kill_at = None;
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

    /// Reads what the VMM has sent before its process ended. Nobody sends any more, so the loop ends.
    fn hear_the_end(&mut self) {
        while !self.socket_closed
            && let Ok(Some(reply)) = control::receive_bare::<Reply>(&self.socket)
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
                self.socket_closed = true;
                self.end_soon();
            }
            Err(error) => {
                tracing::error!("killing the VMM: {}", bulkhead_protocol::error::chain(&error));
                self.socket_closed = true;
                self.kill();
            }
        }
    }

    fn answer(&mut self, reply: Reply) {
        match reply {
            Reply::GuestReady => self.tell_ready(Ok(self.built)),
            Reply::GuestExited { reason } => {
                if self.end_soon() {
                    match reason {
                        ExitReason::NoTask => tracing::error!("the guest has ended: {}", ExitReason::NO_TASK),
                        ExitReason::MemoryGone => tracing::error!("the guest has ended: {}", ExitReason::MEMORY_GONE),
                        _ => tracing::info!(?reason, "the guest has ended"),
                    }
                    self.reason = Some(reason);
                }
            }
            Reply::Done { id: 0 } => self.built = Instant::now(),
            Reply::Added { id, slot } => {
                let waiting = self.waiting.remove(&id);
                if waiting.is_none_or(|answer| answer.send(Ok(reply)).is_err()) {
                    // The caller has given up and does not know the slot, so we take the device out.
                    self.ask(Unsent { command: Command::RemoveDevice { slot }, fds: Vec::new(), answer: None });
                }
            }
            Reply::Done { id } | Reply::Resized { id, .. } | Reply::Counters { id, .. } => {
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
    fn end_soon(&mut self) -> bool {
        let news = !self.ending;
        if news {
            self.ending = true;
            self.kill_at = Some(tokio::time::Instant::now() + Operation::VmmExit.budget());
        }
        news
    }

    fn tell_ready(&mut self, result: Result<Instant, VmError>) {
        if let Some(ready) = self.ready.take() {
            let _ = ready.send(result);
        }
    }

    fn ask(&mut self, request: Unsent) {
        // Drop requests whose callers have given up, so that both lists stay small. A removal of a device is sent all the same.
        self.waiting.retain(|_, answer| !answer.is_closed());
        self.unsent.retain(|unsent| {
            matches!(unsent.command, Command::RemoveDevice { .. })
                || !unsent.answer.as_ref().is_some_and(Answer::is_closed)
        });
        if self.unsent.len() < UNSENT {
            self.unsent.push_back(request);
        } else if let Some(answer) = request.answer {
            let _ = answer.send(Err(VmError::Busy(UNSENT)));
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
        Some(ExitReason::NoTask) => ExitReason::NO_TASK,
        Some(ExitReason::MemoryGone) => ExitReason::MEMORY_GONE,
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
        got = control::receive_bare::<Reply>(socket);
        would_block(matches!(&got, Err(ControlError::Receive(error)) if *error == Errno::AGAIN))
    });
    // An error of the reactor's own: the socket is of no use any more.
    if wait.await.is_err() {
        return Ok(None);
    }
    got
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

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::super::Vm;
    use super::*;
    use crate::deadlines::Deadline;
    use crate::sandbox::oom::OomScore;

    /// A VM whose process does nothing, and the VMM's end of its control socket.
    fn vm() -> (Vm, OwnedFd) {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let child = tokio::process::Command::new("sleep").arg("1000").kill_on_drop(true).spawn().unwrap();
        let pid = child.id().unwrap();
        (Vm::supervise(ours, child, pid, OomScore::of(pid)).unwrap().0, theirs)
    }

    async fn request(socket: &OwnedFd) -> Request {
        let socket = socket.try_clone().unwrap();
        let received = tokio::task::spawn_blocking(move || control::receive::<Request>(&socket));
        received.await.unwrap().unwrap().unwrap().0
    }

    #[tokio::test]
    async fn device_that_nobody_waits_for_any_more_is_taken_out() {
        let (vm, vmm) = vm();
        let file = std::fs::File::open("/dev/null").unwrap();
        let late = vm.add_disk(Deadline::over(), file.into(), true, String::new());
        assert!(matches!(late.await, Err(VmError::Silent(_))), "the VMM has not answered");
        let Request { id, command: Command::AddDevice(_) } = request(&vmm).await else {
            panic!("not told of the disk")
        };
        control::send(&vmm, &Reply::Added { id, slot: 7 }, &[]).unwrap();
        assert_eq!(request(&vmm).await.command, Command::RemoveDevice { slot: 7 });
    }

    #[tokio::test]
    async fn device_goes_even_if_nobody_waits_for_it_to_go() {
        let (vm, vmm) = vm();
        let late = vm.remove_device(Deadline::over(), 3);
        assert!(matches!(late.await, Err(VmError::Silent(_))));
        // Another order, upon which those are forgotten that nobody waits for.
        vm.shrink_memory(0).await.unwrap();
        assert_eq!(request(&vmm).await.command, Command::RemoveDevice { slot: 3 });
        assert_eq!(request(&vmm).await.command, Command::ResizeMemory { mib: 0 });
    }
}
