//! The helper's side of the seam: one request, one call of libcontainer, one reply.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_protocol::control::{self, ControlError};
use bulkhead_protocol::error::chain;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::PosixRlimit;
use rustix::fs::{Gid, Uid};
use rustix::pty::OpenptFlags;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::de::DeserializeOwned;

use super::captured_errors::CapturedErrors;
use super::executor::{AgentExecutor, Confinement, Init};
use super::message::{Action, IdMaps, Reply, Request, Seccomp};
use super::seccomp::{Filter, FilterError};
use super::{id_maps, limits, pid_namespace};

/// Name of the file, in the state of an exec, in which libcontainer leaves the pid of an exec before it has an answer.
pub const EXEC_PID: &str = "pid";

/// Standard streams of a process.
const STREAMS: usize = 3;

/// Runs a helper with its end of the socket to the agent. Answers the exit status.
pub fn main(agent: &OwnedFd) -> i32 {
    let Ok(Some((request, stdio))) = control::receive::<Request>(agent) else { return 1 };
    let mut captured = CapturedErrors::capture();
    let sent = match perform(request, stdio) {
        Ok((pid, terminal)) => {
            let terminal: Vec<BorrowedFd<'_>> = terminal.iter().map(AsFd::as_fd).collect();
            control::send(agent, &Reply::Created { pid }, &terminal)
        }
        Err(error) => {
            let message = chain(&error);
            let told = of_program(&message).map(str::to_owned);
            let told =
                told.unwrap_or_else(|| match captured.as_mut().ok().and_then(|captured| captured.behind(&message)) {
                    Some(behind) => format!("{message} ({behind})"),
                    None => message,
                });
            control::send(agent, &Reply::Failed { message: told }, &[])
        }
    };
    i32::from(sent.is_err())
}

/// What is said of a program that cannot be executed, if that is the error: it needs no account of the way there, and people
/// and tools look for runc's words, which it is in.
fn of_program(message: &str) -> Option<&str> {
    message.find("exec: \"").and_then(|at| message.get(at..))
}

fn perform(request: Request, mut stdio: Vec<OwnedFd>) -> Result<(u32, Option<OwnedFd>), HelperError> {
    if let Action::PidNamespace { user } = &request.action {
        return spawn_pid_namespace(user.as_ref()).map(|pid| (pid, None));
    }
    // What comes with the streams is only held.
    let _held = stdio.split_off(stdio.len().min(STREAMS));
    give_streams(&stdio, request.uid)?;
    let console = request.terminal.map(|_| Console::listen()).transpose()?;
    let console_path = console.as_ref().map(|console| console.path.clone());
    let window = request.terminal;
    let pid = match request.action {
        Action::Create { id, bundle, state, hooks, rlimits, seccomp } => {
            limits::raise(&rlimits);
            let confinement = seccomp.map(confinement).transpose()?;
            let init = Some(Init { id: id.clone(), bundle: bundle.clone(), hooks });
            let executor = AgentExecutor { init, window, confinement };
            let mut container = builder(id, &state, console_path, stdio, executor)?
                .as_init(bundle)
                .with_systemd(false)
                .with_detach(true)
                .as_sibling(true)
                .build()?;
            // The agent knows whether the container was started; libcontainer's own notion would only refuse execs.
            container.set_status(ContainerStatus::Running).save()?;
            container.pid().map_or(0, nix_pid)
        }
        Action::Exec { id, state, process, cgroup, oom_score_adj, rlimits, seccomp } => {
            let confinement = seccomp.map(confinement).transpose()?;
            let executor = AgentExecutor { init: None, window, confinement };
            prepare(&rlimits, oom_score_adj)?;
            join_user_namespace(&state.join(&id))?;
            let pid_file = state.join(&id).join(EXEC_PID);
            let pid = builder(id, &state, console_path, stdio, executor)?
                .with_pid_file(Some(pid_file))?
                .as_tenant()
                .with_process(Some(process))
                .with_sub_cgroup(cgroup)
                .with_detach(true)
                .as_sibling(true)
                .build()?;
            nix_pid(pid)
        }
        Action::PidNamespace { .. } => 0,
    };
    let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0).ok_or(HelperError::NoPid)?;
    let terminal = console.map(|console| console.master(request.uid)).transpose()?;
    Ok((pid, terminal))
}

fn builder(
    id: String,
    state: &Path,
    console: Option<PathBuf>,
    stdio: Vec<OwnedFd>,
    executor: AgentExecutor,
) -> Result<ContainerBuilder, HelperError> {
    let [stdin, stdout, stderr] = <[OwnedFd; STREAMS]>::try_from(stdio).map_err(|_| HelperError::Streams)?;
    Ok(ContainerBuilder::new(id, SyscallType::default())
        .validate_id()?
        .with_root_path(state)?
        .with_executor(executor)
        .with_console_socket(console)
        .with_stdin(stdin)
        .with_stdout(stdout)
        .with_stderr(stderr))
}

/// libcontainer has its own version of nix.
fn nix_pid<P: Into<i32>>(pid: P) -> i32 {
    pid.into()
}

/// Makes the streams the user's, as runc does: opening /dev/stdout reopens the pipe, which its owner may.
fn give_streams(stdio: &[OwnedFd], uid: u32) -> Result<(), HelperError> {
    for fd in stdio {
        let kind = rustix::fs::fstat(fd).map_err(HelperError::Owner)?.st_mode;
        if rustix::fs::FileType::from_raw_mode(kind) == rustix::fs::FileType::Fifo {
            rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), None).map_err(HelperError::Owner)?;
        }
    }
    Ok(())
}

/// Reads a compiled filter, or compiles it for this process and the container's execs.
fn confinement(seccomp: Seccomp) -> Result<Confinement, HelperError> {
    let Seccomp { filter: path, profile, capabilities } = seccomp;
    let unusable = |source| HelperError::File { path: path.clone(), source };
    let filter = if let Some(profile) = profile {
        let filter = Filter::compile(&read_json(&profile)?)?;
        std::fs::write(&path, filter.to_bytes()).map_err(unusable)?;
        filter
    } else {
        let bytes = std::fs::read(&path).map_err(unusable)?;
        Filter::from_bytes(&bytes).ok_or_else(|| unusable(io::ErrorKind::InvalidData.into()))?
    };
    Ok(Confinement { filter, capabilities })
}

/// Gives this process what an exec inherits and could not take in its container's user namespace.
fn prepare(rlimits: &[PosixRlimit], oom_score_adj: Option<i32>) -> Result<(), HelperError> {
    limits::raise(rlimits);
    oom_score_adj.map_or(Ok(()), limits::set_oom_score).map_err(HelperError::OomScore)
}

/// Joins the container's user namespace, if it has one of its own. libcontainer 0.7 joins all others for an exec but not
/// this one, and the process would have its capabilities over the whole guest. The helper goes on as that namespace's root,
/// which is all that the rest takes: the control group's files belong to the user that it still is.
fn join_user_namespace(state: &Path) -> Result<(), HelperError> {
    let container = Container::load(state.to_path_buf())?;
    let Some(pid) = container.pid() else { return Ok(()) };
    let path = PathBuf::from(format!("/proc/{}/ns/user", nix_pid(pid)));
    let join = || {
        if std::fs::read_link(&path)? == std::fs::read_link("/proc/self/ns/user")? {
            return Ok(());
        }
        let namespace = std::fs::File::open(&path)?;
        Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::User))?)
    };
    join().map_err(|source| HelperError::File { path: path.clone(), source })
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, HelperError> {
    std::fs::read(path)
        .and_then(|text| serde_json::from_slice(&text).map_err(Into::into))
        .map_err(|source| HelperError::File { path: path.into(), source })
}

/// Where a helper's [`Console`] is.
pub fn console_path(helper: u32) -> PathBuf {
    PathBuf::from(format!("/run/bulkhead/console-{helper}"))
}

/// The socket over which libcontainer hands out the master of a terminal.
struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    fn listen() -> Result<Self, HelperError> {
        let path = console_path(std::process::id());
        let listener = UnixListener::bind(&path).map_err(|source| HelperError::File { path: path.clone(), source })?;
        Ok(Self { listener, path })
    }

    /// The master that was sent. libcontainer has sent it by the time that its call returns.
    fn master(self, uid: u32) -> Result<OwnedFd, HelperError> {
        let (socket, _) =
            self.listener.accept().map_err(|source| HelperError::File { path: self.path.clone(), source })?;
        let master = receive_descriptor(&socket)?;
        // The user of the process owns its terminal. The peer is opened through the master: its path is the container's.
        let slave =
            rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
                .map_err(HelperError::Owner)?;
        rustix::fs::fchown(&slave, Some(Uid::from_raw(uid)), None::<Gid>).map_err(HelperError::Owner)?;
        Ok(master)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One descriptor from a stream socket; the bytes with it are the terminal's name and of no use.
fn receive_descriptor(socket: impl AsFd) -> Result<OwnedFd, HelperError> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut name = [0; 256];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(&mut name)];
    recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        .map_err(|errno| HelperError::Agent(ControlError::Receive(errno)))?;
    let descriptor = ancillary.drain().find_map(|item| match item {
        RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
        _ => None,
    });
    descriptor.ok_or(HelperError::NoTerminal)
}

/// OOM score of what holds a pod's namespaces: below that of any container, -997 at the least, for they end with it. The
/// pause process of others has the same.
const HOLDER_SCORE: i32 = -998;

/// Starts the init of a new pid namespace; it outlives this helper.
fn spawn_pid_namespace(user: Option<&IdMaps>) -> Result<u32, HelperError> {
    // Before the user namespace, where it could not. Without the capability, as in tests, it stays what the agent has.
    let _ = limits::set_oom_score(HOLDER_SCORE);
    if let Some(maps) = user {
        // Before the pid namespace, which shall belong to it.
        id_maps::enter(maps, CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET)
            .map_err(HelperError::UserNamespace)?;
    }
    unshare(CloneFlags::CLONE_NEWPID).map_err(|errno| HelperError::PidNamespace(errno.into()))?;
    // Executed anew: containers see this process, and it has nothing of the helper's.
    Command::new("/proc/self/exe")
        .arg(pid_namespace::ARGUMENT)
        .stdin(Stdio::null())
        .spawn()
        .map(|child| child.id())
        .map_err(HelperError::PidNamespace)
}

/// A helper's work failed. Only its text leaves the helper.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error(transparent)]
    Libcontainer(#[from] LibcontainerError),
    #[error(transparent)]
    Seccomp(#[from] FilterError),
    #[error("the agent did not send three standard streams")]
    Streams,
    #[error("libcontainer does not tell the pid of the process that it has created")]
    NoPid,
    #[error("libcontainer did not send a terminal")]
    NoTerminal,
    #[error("cannot talk to the agent")]
    Agent(#[source] ControlError),
    #[error("cannot give the standard streams to the user of the process")]
    Owner(#[source] rustix::io::Errno),
    #[error("cannot set the OOM score of the process")]
    OomScore(#[source] io::Error),
    #[error("cannot use {path}")]
    File { path: PathBuf, source: io::Error },
    #[error("cannot create a pid namespace")]
    PidNamespace(#[source] io::Error),
    #[error("cannot create the pod's user namespace")]
    UserNamespace(#[source] io::Error),
}
