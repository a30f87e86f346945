//! One container: its phase, its processes, its control group.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use oci_spec::runtime::Process as ProcessSpec;
use tokio::sync::Notify;

use super::error::ContainerError;
use super::process::Process;
use super::spec;
use crate::cgroup::Cgroup;
use crate::{events, guest_time, sys};

/// How long execs that are being created may take when their container's init has ended and its processes are killed, which is
/// what they wait for if they wait for anything in the guest. With twice 5 s for the killing it is less than the 20 s that a
/// deletion has.
const EXECS_MADE_TIMEOUT: Duration = Duration::from_secs(8);

/// How far a container has come. That its init has ended is init's own state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Phase {
    /// The id is taken, nothing answers yet.
    Creating,
    /// Init waits to be started.
    Created,
    /// Init was started.
    Running,
    /// Its processes are frozen.
    Paused,
    /// On its way out.
    Deleting,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Deleting => "being deleted",
        }
    }
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    cgroup: Cgroup,
    /// What its spec says of its init, once that is known.
    init_spec: OnceLock<ProcessSpec>,
    state: Mutex<State>,
    /// Told whenever the creation of an exec is over.
    exec_made: Notify,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// By exec id, init's being empty. `None` while it is being created.
    processes: HashMap<String, Option<Arc<Process>>>,
}

impl Container {
    pub(super) fn new(id: &str, cgroup: Cgroup) -> Self {
        let state = State { phase: Phase::Creating, processes: HashMap::new() };
        Self { id: id.into(), cgroup, init_spec: OnceLock::new(), state: Mutex::new(state), exec_made: Notify::new() }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its control group.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    pub(super) fn set_init_spec(&self, process: ProcessSpec) {
        let _ = self.init_spec.set(process);
    }

    /// What an exec has of that where it says nothing; `None` before the container's creation.
    pub(super) fn init_spec(&self) -> Option<&ProcessSpec> {
        self.init_spec.get()
    }

    /// One of its processes; an empty id means init.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        let process = self.state().processes.get(exec_id).cloned().flatten();
        process.ok_or_else(|| ContainerError::NoProcess { id: self.id.clone(), exec_id: exec_id.into() })
    }

    /// Freezes its processes. What they have written is in their files then, for who copies those.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        self.expect_running()?;
        self.advance(Phase::Running, Phase::Paused)?;
        if let Err(error) = self.cgroup.freeze(true).await {
            // Half frozen helps nobody.
            let _ = self.resume().await;
            return Err(error.into());
        }
        self.write_back().await;
        Ok(())
    }

    /// Writes what its root file system keeps to the host, as well as that can be done.
    async fn write_back(&self) {
        let Ok(init) = self.process("") else { return };
        let root = format!("/proc/{}/root", init.pid());
        let written = tokio::task::spawn_blocking(move || -> io::Result<()> {
            Ok(rustix::fs::syncfs(std::fs::File::open(root)?)?)
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(id = self.id, %error, "the paused container's last writes may not be in its files yet");
        }
    }

    /// Lets its processes go on.
    pub async fn resume(&self) -> Result<(), ContainerError> {
        self.advance(Phase::Paused, Phase::Running)?;
        Ok(self.cgroup.freeze(false).await?)
    }

    /// Changes its limits; `resources` is OCI's object as JSON.
    pub fn update(&self, resources: &[u8]) -> Result<(), ContainerError> {
        Ok(self.cgroup.update(&spec::adapt_resources(resources)?)?)
    }

    pub(super) fn signal_all(&self, signal: u32) -> Result<(), ContainerError> {
        // Which the kernel sends to a whole group at once.
        if signal == sys::SIGKILL {
            self.cgroup.kill()?
        } else {
            self.cgroup.signal_all(signal)?
        }
        Ok(())
    }

    pub(super) fn add_process(&self, exec_id: &str, process: Arc<Process>) {
        self.state().processes.insert(exec_id.into(), Some(process));
        self.exec_made.notify_waiters();
    }

    pub(super) fn reserve_exec(&self, exec_id: &str) -> Result<(), ContainerError> {
        self.expect_running()?;
        let mut state = self.state();
        if state.processes.contains_key(exec_id) {
            return Err(ContainerError::ExecExists { id: self.id.clone(), exec_id: exec_id.into() });
        }
        state.processes.insert(exec_id.into(), None);
        Ok(())
    }

    pub(super) fn forget_exec(&self, exec_id: &str) {
        self.state().processes.remove(exec_id);
        self.exec_made.notify_waiters();
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.state().phase = phase;
    }

    /// Goes from one phase to another, if it is in that one.
    pub(super) fn advance(&self, from: Phase, to: Phase) -> Result<(), ContainerError> {
        let mut state = self.state();
        if state.phase != from {
            return Err(self.wrong_state(state.phase.name(), from.name()));
        }
        state.phase = to;
        Ok(())
    }

    /// Takes the container out of use, if its init has ended.
    pub(super) fn begin_deletion(&self) -> Result<(), ContainerError> {
        let mut state = self.state();
        let ended = state.processes.get("").is_some_and(|init| init.as_ref().is_some_and(|init| init.ended()));
        // A deletion that failed may be tried again.
        if !ended || state.phase == Phase::Creating {
            return Err(self.wrong_state(state.phase.name(), "ended"));
        }
        state.phase = Phase::Deleting;
        Ok(())
    }

    /// Waits until no exec is being created any more; one that began before the deletion may put a process into the control
    /// group at any time, and make it again for that.
    pub(super) async fn execs_made(&self) -> Result<(), ContainerError> {
        let made = async {
            loop {
                // Before the look, so that nothing is missed.
                let made = self.exec_made.notified();
                if self.state().processes.values().all(Option::is_some) {
                    return;
                }
                made.await;
            }
        };
        let late = || self.wrong_state("entered by an exec", "left alone");
        guest_time::timeout(EXECS_MADE_TIMEOUT, made).await.ok_or_else(late)
    }

    fn expect_running(&self) -> Result<(), ContainerError> {
        let state = self.state();
        let init_runs = state.processes.get("").is_some_and(|init| init.as_ref().is_some_and(|init| !init.ended()));
        match state.phase {
            Phase::Running if init_runs => Ok(()),
            Phase::Running => Err(self.wrong_state("ended", "running")),
            phase => Err(self.wrong_state(phase.name(), "running")),
        }
    }

    fn wrong_state(&self, is: &'static str, wanted: &'static str) -> ContainerError {
        ContainerError::State { id: self.id.clone(), is, wanted }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Follows a container from its creation to the end of its init: reports out-of-memory kills, and ends what init leaves.
///
/// With a pid namespace of its own the kernel ends the other processes with init. In a shared one they would live on, in
/// a container that everybody holds for dead.
pub(super) async fn follow(container: Arc<Container>, init: Arc<Process>, events: events::Sender, shares_pids: bool) {
    let mut oom = container.cgroup.watch_oom().ok();
    loop {
        let killed = async {
            match &mut oom {
                Some(oom) => oom.killed().await.is_ok(),
                // Without the memory controller there is nothing to watch.
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            watching = killed => if watching { events.oom(&container.id) } else { oom = None },
            _ = init.wait() => break,
        }
    }
    // Init may be what was killed.
    if oom.is_some_and(|mut oom| oom.look().unwrap_or(false)) {
        events.oom(&container.id);
    }
    if shares_pids && let Err(error) = container.cgroup.kill() {
        tracing::warn!(id = container.id, %error, "cannot end the processes that outlive their container's init");
    }
}
