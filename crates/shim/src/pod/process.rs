//! One process as containerd sees it: a container's init, an exec, or the sandbox, which ends with its VM.
//!
//! Everything that `State`, `Pids` and `Connect` need is here, so that they never ask the guest (ARCHITECTURE.md, D9).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::types::task::Status;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::host_pid::{HostPid, Keeper};
use crate::io::{ProcessIo, Stdio};
use crate::pod::error::TaskError;
use crate::sandbox::agent::ProcessKey;

/// How a process ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Exit {
    /// 0 to 255.
    pub code: u32,
    /// When, by the host's clock. The guest could name a time before the start.
    pub at: Timestamp,
}

impl Exit {
    /// What a process is said to have ended with when its VM has: 128 + SIGKILL.
    pub const KILLED: u32 = 137;

    /// An exit now. A code of the guest that no process can have is cut to one that it can.
    pub fn now(code: u32) -> Self {
        Self { code: code & 0xff, at: Timestamp::now() }
    }
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its names in the guest.
    pub key: ProcessKey,
    /// Its streams on the host.
    pub stdio: Stdio,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
    /// Held while starting and while ending, so that events leave in order. Taken before `state`.
    pub order: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    status: Status,
    pid: u32,
    host_pid: Option<HostPid>,
    io: Option<Arc<ProcessIo>>,
    /// containerd may close stdin before the process is started, and says so only once.
    stdin_closed: bool,
}

impl Process {
    /// A created process; an exec gets its pid when it is started.
    pub fn new(key: ProcessKey, stdio: Stdio) -> Self {
        let state = State { status: Status::CREATED, pid: 0, host_pid: None, io: None, stdin_closed: false };
        Self { key, stdio, state: Mutex::new(state), exit: watch::channel(None).0, order: tokio::sync::Mutex::new(()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can panic half way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the process a pid of its own on the host.
    pub fn assign_pid(&self, keeper: &Keeper, arguments: &[String]) -> Result<u32, TaskError> {
        let host_pid = keeper.hold(arguments).map_err(TaskError::HostPid)?;
        let pid = host_pid.get();
        let mut state = self.state();
        state.pid = pid;
        state.host_pid = Some(host_pid);
        Ok(pid)
    }

    /// The pid that was reported, also after the end; 0 before.
    pub fn pid(&self) -> u32 {
        self.state().pid
    }

    /// The status.
    pub fn status(&self) -> Status {
        self.state().status
    }

    /// Sets the status of a process that has not ended.
    pub fn set_status(&self, status: Status) {
        let mut state = self.state();
        if state.status != Status::STOPPED {
            state.status = status;
        }
    }

    /// Fails unless the status is one of those.
    pub fn expect(&self, what: &'static str, allowed: &[Status]) -> Result<(), TaskError> {
        let status = self.status();
        if allowed.contains(&status) { Ok(()) } else { Err(TaskError::State { what, state: name(status) }) }
    }

    /// Sets the copies of its streams.
    pub fn set_io(&self, io: ProcessIo) {
        let mut state = self.state();
        if state.stdin_closed {
            io.close_stdin();
        }
        state.io = Some(Arc::new(io));
    }

    /// containerd will write no more to stdin.
    pub fn close_stdin(&self) {
        let mut state = self.state();
        state.stdin_closed = true;
        if let Some(io) = &state.io {
            io.close_stdin();
        }
    }

    /// The copies of its streams.
    pub fn io(&self) -> Option<Arc<ProcessIo>> {
        self.state().io.clone()
    }

    /// Whether its pid is there.
    #[cfg(test)]
    pub fn holds_pid(&self) -> bool {
        self.state().host_pid.is_some()
    }

    /// Records the end, once; answers whether it was the first.
    pub fn ended(&self, exit: Exit) -> bool {
        {
            let mut state = self.state();
            state.status = Status::STOPPED;
            state.host_pid = None;
        }
        self.exit.send_if_modified(|known| {
            let first = known.is_none();
            if first {
                *known = Some(exit);
            }
            first
        })
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Waits for the end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        // The sender lives in `self`.
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone().unwrap_or_default(),
            Err(_) => Exit::now(Exit::KILLED),
        }
    }
}

/// A status in words.
pub fn name(status: Status) -> &'static str {
    match status {
        Status::CREATED => "created",
        Status::RUNNING => "running",
        Status::STOPPED => "stopped",
        Status::PAUSED => "paused",
        Status::PAUSING => "pausing",
        Status::UNKNOWN => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process() -> Process {
        Process::new(ProcessKey { container: "c".into(), exec: String::new() }, Stdio::default())
    }

    #[tokio::test]
    async fn end_is_recorded_once_and_waited_for_by_all() {
        let process = process();
        assert!(process.ended(Exit::now(3)));
        assert!(!process.ended(Exit::now(4)));
        assert_eq!((process.wait().await.code, process.wait().await.code), (3, 3));
        process.set_status(Status::RUNNING);
        assert_eq!(process.status(), Status::STOPPED);
    }

    #[test]
    fn pid_is_kept_after_the_end() {
        let process = process();
        let pid = process.assign_pid(&Keeper::start().unwrap(), &[]).unwrap();
        process.ended(Exit::now(300));
        assert_eq!(process.pid(), pid);
        assert_eq!(process.exit().unwrap().code, 300 & 0xff);
    }

    #[test]
    fn wrong_state_is_named() {
        let error = process().expect("pause", &[Status::RUNNING]).unwrap_err();
        assert_eq!(error.to_string(), "cannot pause a created process");
    }
}
