//! The VMM's process and its control socket (ARCHITECTURE.md, D1, D2).
//!
//! One task owns both ([`supervisor`]). The socket is the process's stdin: inherited without clearing close-on-exec on any
//! descriptor of the shim.

mod console;
mod error;
pub mod machine_spec;
mod supervisor;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_protocol::control::{self, Command, Reply, Request};
use bulkhead_protocol::counters::DeviceCounters;
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, Image};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};

use super::oom::{self, OomScore};
use super::{pid_namespace, pids};
use crate::config::Config;
use crate::deadlines::{Deadline, Operation};
use crate::network::NetDevice;
use console::Tail;
pub use error::VmError;
use machine_spec::Machine;
use supervisor::{Order, Supervised, Unsent};

/// A VM, as long as its VMM's process is there. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Vm {
    pid: u32,
    process: Arc<OwnedFd>,
    requests: mpsc::Sender<Order>,
    ended: watch::Receiver<bool>,
    oom_score: Arc<OomScore>,
}

impl Vm {
    /// Starts the VMM, boots the machine and waits until its agent listens. Also says when the machine was built.
    pub async fn boot(
        deadline: Deadline,
        config: &Config,
        machine: Machine<'_>,
        pid_file: &Path,
    ) -> Result<(Self, Instant), VmError> {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).map_err(io_error)?;
        let tail = Tail::default();
        let (console, console_task) = console::follow("guest", &tail)?;
        let (stderr, stderr_task) = console::follow("vmm", &tail)?;
        let mut command = tokio::process::Command::new(&config.vmm);
        command.args(["--control-fd", "0"]).stdin(theirs).stdout(Stdio::null()).stderr(stderr);
        command.env_clear().current_dir("/").kill_on_drop(true);
        // The command holds the VMM's end of the socket and of stderr. Only the VMM may, so the command is gone after this.
        let spawned = pid_namespace::spawn(deadline, command).await;
        let child = spawned.map_err(|source| VmError::Spawn { path: config.vmm.clone(), source })?;
        let pid = child.id().unwrap_or(0);
        super::record(pid_file, pid);
        oom::protect_shim();
        let oom_score = OomScore::of(pid);
        if let Some(cgroup) = machine.cgroup {
            cgroup.add(pid);
        }
        let (spec, fds) = machine.spec(config, &console);
        let boot = Request { id: 0, command: Command::Boot(spec) };
        control::send(&ours, &boot, &fds).map_err(VmError::Control)?;
        drop(fds);
        let cgroup = machine.cgroup.cloned();
        drop((machine, console));
        let (vm, ready) = Self::supervise(ours, child, pid, oom_score)?;
        match deadline.part_of(Operation::BootGuest, config.boot_timeout).timeout(ready).await {
            Ok(Ok(Ok(built))) => {
                pids::warn_without_room(cgroup.as_ref(), pid);
                Ok((vm, built))
            }
            Ok(Ok(Err(VmError::DiedEarly { how, .. }))) => {
                // The process is gone; what it has said may still be in the pipes.
                let said = async { tokio::join!(console_task, stderr_task) };
                let _ = Deadline::begin(Operation::VmmExit).timeout(said).await;
                Err(vm.fail(VmError::DiedEarly { how, last_words: tail.last_line() }).await)
            }
            Ok(Ok(Err(error))) => Err(vm.fail(error).await),
            Ok(Err(_)) => Err(vm.fail(VmError::Ended).await),
            Err(waited) => Err(vm.fail(VmError::NotReady(waited, tail.last_line())).await),
        }
    }

    /// Follows a VMM that has been told to boot. Also says when the machine was built, once the agent listens.
    pub(super) fn supervise(
        socket: OwnedFd,
        child: Child,
        pid: u32,
        oom_score: OomScore,
    ) -> Result<(Self, oneshot::Receiver<Result<Instant, VmError>>), VmError> {
        let Supervised { process, requests, ended, ready } = supervisor::supervise(socket, child, pid)?;
        Ok((Self { pid, process: Arc::new(process), requests, ended, oom_score: Arc::new(oom_score) }, ready))
    }

    async fn fail(self, error: VmError) -> VmError {
        self.kill().await;
        error
    }

    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A pidfd of the VMM's process. Unlike the pid it never comes to mean another process.
    pub fn process(&self) -> Result<OwnedFd, VmError> {
        self.process.try_clone().map_err(VmError::Process)
    }

    /// Says how soon the kernel kills the VMM when there is no more memory.
    pub fn set_oom_score(&self, score: i32) {
        self.oom_score.set(score);
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

    /// Kills the VMM and waits for its process, though not for ever: SIGKILL is not refused, but a thread that waits for a
    /// disk of the host dies only when that answers. The time for it is always the same, whatever a call has left.
    pub async fn kill(&self) {
        let killed = async {
            let _ = self.requests.send(Order::Kill).await;
            self.ended().await;
        };
        if let Err(waited) = Deadline::begin(Operation::KillVmm).timeout(killed).await {
            tracing::warn!("the VMM is still there {waited:?} after SIGKILL; does a disk of the host not answer?");
        }
    }

    /// Connects to a vsock port of the guest.
    pub async fn connect(&self, deadline: Deadline, port: u32) -> Result<UnixStream, VmError> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(VmError::Socket)?;
        match self
            .ask(deadline.part(Operation::GuestConnection), Command::ConnectVsock { port }, vec![theirs.into()])
            .await
        {
            Err(VmError::Silent(waited)) => return Err(VmError::ConnectTimeout(port, waited)),
            answer => answer?,
        };
        ours.set_nonblocking(true).map_err(VmError::Socket)?;
        UnixStream::from_std(ours).map_err(VmError::Socket)
    }

    /// Puts a disk into a slot of the machine and answers which.
    pub async fn add_disk(
        &self,
        deadline: Deadline,
        file: OwnedFd,
        read_only: bool,
        serial: String,
    ) -> Result<u8, VmError> {
        self.add_device(deadline, DeviceSpec::Block { file: FdIndex(0), read_only, serial }, vec![file]).await
    }

    /// Shows the guest files of these sizes as images of read-only file systems, and answers in which slot.
    pub async fn add_images(&self, deadline: Deadline, files: Vec<(OwnedFd, u64)>) -> Result<u8, VmError> {
        let (files, sizes): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let image = |(index, size)| Image { file: FdIndex(index), size };
        let images = sizes.into_iter().enumerate().map(image).collect();
        self.add_device(deadline, DeviceSpec::Pmem { images }, files).await
    }

    /// Puts a network device into a slot of the machine and answers which.
    pub async fn add_net(&self, deadline: Deadline, device: NetDevice) -> Result<u8, VmError> {
        let NetDevice { tap, mac, mtu, .. } = device;
        self.add_device(deadline, DeviceSpec::Net { tap: FdIndex(0), mac, mtu }, vec![tap]).await
    }

    async fn add_device(&self, deadline: Deadline, device: DeviceSpec, fds: Vec<OwnedFd>) -> Result<u8, VmError> {
        match self.ask(deadline.part(Operation::DeviceSlot), Command::AddDevice(device), fds).await? {
            Reply::Added { slot, .. } => Ok(slot),
            _ => Err(VmError::Unexpected),
        }
    }

    /// Empties a slot, whatever the guest does with it.
    pub async fn remove_device(&self, deadline: Deadline, slot: u8) -> Result<(), VmError> {
        self.ask(deadline.part(Operation::DeviceSlot), Command::RemoveDevice { slot }, Vec::new()).await.map(drop)
    }

    /// Grows the guest to so much memory beyond its boot memory, and waits until it is there.
    pub async fn grow_memory(&self, deadline: Deadline, mib: u64) -> Result<(), VmError> {
        match self.ask(deadline.part(Operation::GuestMemory), Command::ResizeMemory { mib }, Vec::new()).await {
            Ok(Reply::Resized { mib: there, .. }) if there >= mib => Ok(()),
            // A later request has taken its place.
            Ok(Reply::Resized { .. }) => Err(VmError::NotPlugged(mib, Duration::ZERO)),
            Err(VmError::Silent(waited)) => Err(VmError::NotPlugged(mib, waited)),
            Ok(_) => Err(VmError::Unexpected),
            Err(error) => Err(error),
        }
    }

    /// Asks the guest to shrink to so much memory beyond its boot memory. It does so as soon as it can; nobody waits.
    pub async fn shrink_memory(&self, mib: u64) -> Result<(), VmError> {
        let request = Unsent { command: Command::ResizeMemory { mib }, fds: Vec::new(), answer: None };
        self.requests.send(Order::Ask(request)).await.map_err(|_| VmError::Ended)
    }

    /// What the devices have counted.
    pub async fn counters(&self, deadline: Deadline) -> Result<Vec<DeviceCounters>, VmError> {
        match self.ask(deadline, Command::Counters, Vec::new()).await? {
            Reply::Counters { devices, .. } => Ok(devices),
            _ => Err(VmError::Unexpected),
        }
    }

    async fn ask(&self, deadline: Deadline, command: Command, fds: Vec<OwnedFd>) -> Result<Reply, VmError> {
        let (answer, answered) = oneshot::channel();
        let order = Order::Ask(Unsent { command, fds, answer: Some(answer) });
        let done = async {
            self.requests.send(order).await.map_err(|_| VmError::Ended)?;
            answered.await.map_err(|_| VmError::Ended)?
        };
        deadline.timeout(done).await.map_err(VmError::Silent)?
    }
}

fn io_error(error: Errno) -> VmError {
    VmError::Socket(error.into())
}
