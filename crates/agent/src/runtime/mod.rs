//! The seam to libcontainer: everything that creates a container's process goes through the few verbs of [`Runtime`].
//!
//! libcontainer changes directory, forks, blocks and keeps state in files, none of which a threaded PID 1 can have. So each
//! creation runs in a helper: a process with one thread ([`zygote`]), its request and the process's standard streams sent
//! over a socket pair ([`message`], [`helper`]). The processes that it creates are the
//! agent's children, not the helper's. Once a process exists libcontainer has no further part in it: signals, limits,
//! freezing and the removal of what is left are cgroup and file operations that the agent does by itself.

mod captured_errors;
mod channel;
pub mod directory;
mod error;
mod executor;
pub mod helper;
pub mod home_dir;
pub mod id_maps;
mod limits;
pub mod message;
pub mod pid_namespace;
mod seccomp;
pub mod tmpfs;
pub mod zygote;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::control;
use oci_spec::runtime::{Hook, Process, Spec};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::io::AsyncWriteExt;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;

use crate::reaper::{Birth, Exit, ExitWatch, Reaper};
use crate::{guest_time, sys};
use channel::{control_pair, receive};
pub use error::RuntimeError;
use executor::Confinement;
use message::{Action, IdMaps, Reply, Request, Seccomp, WindowSize};
use zygote::Zygote;

/// Bundles that the agent writes, one directory for each container.
const BUNDLES: &str = "/run/bulkhead/bundles";
/// libcontainer's state. Short: a socket's path in it must fit 108 bytes (unix(7)) with a container id of 76.
const STATE: &str = "/run/bulkhead/c";
/// What libcontainer sees of a container's state when it creates an exec: it leaves sockets there.
const EXEC_STATE: &str = "/run/bulkhead/x";
/// Time for a helper to answer. A container's root may stop whatever comes into it, and its share's host be slow. The caller
/// hears of it before it gives up, which is after 60 s: an exec waits 10 s for its init's program before this. Neither
/// counts time in which the pod has no CPU.
const HELPER_TIMEOUT: Duration = Duration::from_secs(45);
/// Filter of a container beside its configuration, compiled, for its execs.
const SECCOMP_FILE: &str = "seccomp.bpf";
/// The profile that it is compiled from, in the same place.
const PROFILE_FILE: &str = "seccomp.json";

/// Creates processes by way of helpers.
#[derive(Debug)]
pub struct Runtime {
    reaper: Arc<Reaper>,
    zygote: Zygote,
    /// The filter that was compiled last: the containers of a pod mostly have the same profile.
    compiled: Mutex<Option<Compiled>>,
}

/// A seccomp profile and its filter, both as they are in files.
#[derive(Debug)]
struct Compiled {
    profile: Vec<u8>,
    filter: Vec<u8>,
}

/// The standard streams that a new process gets, and its terminal.
#[derive(Debug)]
pub struct ProcessStdio {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
    /// Wanted if the process gets a terminal instead of the three.
    pub terminal: Option<WindowSize>,
}

/// A process that a helper has created.
#[derive(Debug)]
pub struct Created {
    /// Its pid, in the agent's namespace.
    pub pid: u32,
    /// Tells its end.
    pub exit: ExitWatch,
    /// Its terminal's master.
    pub terminal: Option<OwnedFd>,
    /// Of a container's init: a pipe that ends when the process executes its program, or ends.
    pub until_executed: Option<pipe::Receiver>,
}

impl Runtime {
    /// Uses the reaper that owns the agent's children, which helpers are.
    pub fn new(reaper: Arc<Reaper>, zygote: Zygote) -> Self {
        Self { reaper, zygote, compiled: Mutex::default() }
    }

    /// That reaper.
    pub fn reaper(&self) -> Arc<Reaper> {
        Arc::clone(&self.reaper)
    }

    /// Creates a container whose init waits for [`Self::start`].
    pub async fn create(&self, id: &str, mut spec: Spec, stdio: ProcessStdio) -> Result<Created, RuntimeError> {
        let bundle = bundle_dir(id);
        let uid = spec.process().as_ref().map_or(0, |process| process.user().uid());
        let prepared = self.prepare_bundle(&bundle, &mut spec);
        let (hooks, seccomp) = prepared.map_err(|source| RuntimeError::Files { path: bundle.clone(), source })?;
        let rlimits = spec.process().as_ref().and_then(|process| process.rlimits().clone()).unwrap_or_default();
        let compiles = seccomp.as_ref().is_some_and(|seccomp| seccomp.profile.is_some());
        let action =
            Action::Create { id: id.into(), bundle: bundle.clone(), state: STATE.into(), hooks, rlimits, seccomp };
        // The helper hands its end down by fork(2); execve(2) closes it.
        let (ends, held) =
            pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(|error| RuntimeError::Spawn(error.into()))?;
        let ends = pipe::Receiver::from_owned_fd(ends).map_err(RuntimeError::Spawn)?;
        let request = Request { action, uid, terminal: stdio.terminal };
        let created = self.run(request, Some(stdio), Some(held), None).await?;
        if compiles {
            self.remember_filter(&bundle);
        }
        Ok(Created { until_executed: Some(ends), ..created })
    }

    /// Writes what libcontainer is to see of a container; answers what helper and executor do in its place.
    fn prepare_bundle(&self, bundle: &Path, spec: &mut Spec) -> io::Result<(Vec<Hook>, Option<Seccomp>)> {
        std::fs::create_dir_all(bundle)?;
        std::fs::create_dir_all(STATE)?;
        let hooks = spec.hooks_mut().as_mut().and_then(|hooks| hooks.start_container_mut().take()).unwrap_or_default();
        let profile = spec.linux_mut().as_mut().and_then(|linux| linux.seccomp_mut().take());
        let seccomp = profile.map(|profile| {
            let (profile, filter) = (serde_json::to_vec(&profile)?, bundle.join(SECCOMP_FILE));
            let known = self.compiled().as_ref().filter(|last| last.profile == profile).map(|last| last.filter.clone());
            let profile = if let Some(known) = known {
                std::fs::write(&filter, known)?;
                None
            } else {
                let path = bundle.join(PROFILE_FILE);
                std::fs::write(&path, profile)?;
                Some(path)
            };
            let capabilities = spec.process_mut().as_mut().and_then(Confinement::widen);
            Ok::<_, io::Error>(Seccomp { filter, profile, capabilities })
        });
        let seccomp = seccomp.transpose()?;
        write_json(&bundle.join("config.json"), spec)?;
        Ok((hooks, seccomp))
    }

    /// Keeps the filter that a helper has compiled.
    fn remember_filter(&self, bundle: &Path) {
        let profile = bundle.join(PROFILE_FILE);
        if let (Ok(profile), Ok(filter)) = (std::fs::read(&profile), std::fs::read(bundle.join(SECCOMP_FILE))) {
            *self.compiled() = Some(Compiled { profile, filter });
        }
        let _ = std::fs::remove_file(profile);
    }

    fn compiled(&self) -> MutexGuard<'_, Option<Compiled>> {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a created container's init go on to its program.
    pub async fn start(&self, id: &str) -> Result<(), RuntimeError> {
        let path = Path::new(STATE).join(id).join(libcontainer::notify_socket::NOTIFY_FILE);
        let notify = async {
            let mut socket = tokio::net::UnixStream::connect(&path).await?;
            // Init waits for the end of whatever comes.
            socket.write_all(b"start").await?;
            socket.shutdown().await
        };
        notify.await.map_err(|source| RuntimeError::Start { path: path.clone(), source })
    }

    /// Creates a process in a container that has been started; it runs at once. It joins the container's control group, or
    /// the one with this name below.
    pub async fn exec(
        &self,
        id: &str,
        cgroup: Option<String>,
        serial: u64,
        mut process: Process,
        stdio: ProcessStdio,
    ) -> Result<Created, RuntimeError> {
        let bundle = bundle_dir(id);
        let path = bundle.join(format!("exec-{serial}.json"));
        let seccomp = Some(bundle.join(SECCOMP_FILE)).filter(|path| path.exists()).map(|filter| {
            let capabilities = Confinement::widen(&mut process);
            Seccomp { filter, profile: None, capabilities }
        });
        write_json(&path, &process).map_err(|source| RuntimeError::Files { path: path.clone(), source })?;
        let (name, state) = (serial.to_string(), Path::new(EXEC_STATE).join(serial.to_string()));
        let created = match link_state(&Path::new(STATE).join(id), &state) {
            Ok(()) => {
                let action = Action::Exec {
                    id: name,
                    state: EXEC_STATE.into(),
                    process: path.clone(),
                    cgroup,
                    oom_score_adj: process.oom_score_adj(),
                    rlimits: process.rlimits().clone().unwrap_or_default(),
                    seccomp,
                };
                let request = Request { action, uid: process.user().uid(), terminal: stdio.terminal };
                self.run(request, Some(stdio), None, Some(&state.join(helper::EXEC_PID))).await
            }
            Err(source) => Err(RuntimeError::Files { path: state.clone(), source }),
        };
        let _ = std::fs::remove_dir_all(state);
        let _ = std::fs::remove_file(path);
        created
    }

    /// Creates a pid namespace with an init that does nothing but reap, in a user and a network namespace of its own if ids
    /// are given to map. They live as long as that process.
    pub async fn pod_namespaces(&self, user: Option<IdMaps>) -> Result<Created, RuntimeError> {
        let action = Action::PidNamespace { user };
        self.run(Request { action, uid: 0, terminal: None }, None, None, None).await
    }

    /// Removes what the creation of a container has left in files.
    pub fn delete(&self, id: &str) -> Result<(), RuntimeError> {
        for path in [Path::new(STATE).join(id), bundle_dir(id)] {
            match std::fs::remove_dir_all(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(RuntimeError::Files { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Runs one helper to its answer. `held` stays open as long as the helper, and what it creates up to its program. Where
    /// there is no process for an answer there is none after it, as far as the helper, its process group or `pid_file` tell;
    /// the rest is in the container's control group.
    async fn run(
        &self,
        request: Request,
        stdio: Option<ProcessStdio>,
        held: Option<OwnedFd>,
        pid_file: Option<&Path>,
    ) -> Result<Created, RuntimeError> {
        let birth = self.reaper.expect();
        let (ours, theirs) = control_pair().map_err(|error| RuntimeError::Spawn(error.into()))?;
        let channel = sys::watch(ours, Interest::READABLE).map_err(RuntimeError::Spawn)?;
        let streams = stdio.iter().flat_map(|s| [s.stdin.as_fd(), s.stdout.as_fd(), s.stderr.as_fd()]);
        let fds: Vec<_> = streams.chain(held.iter().map(AsFd::as_fd)).collect();
        control::send(channel.get_ref(), &request, &fds).map_err(RuntimeError::Talk)?;
        drop(fds);
        // The process must be the only one to hold its ends of the streams, or their end would never be seen.
        drop((stdio, held));
        let helper = self.zygote.helper(theirs).await?;
        let mut helper_exit = birth.claim(helper);
        let answered = answer(&channel, &mut helper_exit, HELPER_TIMEOUT).await.and_then(|(reply, fds)| match reply {
            Reply::Created { pid } => Ok((pid, fds)),
            Reply::Failed { message } => Err(RuntimeError::Refused(message)),
        });
        match answered {
            Ok((pid, mut fds)) => {
                Ok(Created { pid, exit: birth.claim(pid), terminal: fds.pop(), until_executed: None })
            }
            Err(error) => {
                self.undo(&birth, helper, pid_file);
                Err(error)
            }
        }
    }

    /// Ends a helper that has created nothing, and what it may have created nevertheless.
    fn undo(&self, birth: &Birth, helper: u32, pid_file: Option<&Path>) {
        if let Err(error) = self.reaper.kill_group(helper) {
            tracing::warn!(%error, "cannot end a helper");
        }
        let _ = std::fs::remove_file(helper::console_path(helper));
        let pid = pid_file.and_then(|path| std::fs::read_to_string(path).ok()).and_then(|text| text.parse().ok());
        if let Some(pid) = pid
            && !birth.claim(pid).ended()
            && let Err(error) = self.reaper.kill(pid, sys::SIGKILL)
        {
            tracing::warn!(pid, %error, "cannot end a process that was not created");
        }
    }
}

/// A helper's answer, in bounded time.
async fn answer(
    channel: &AsyncFd<OwnedFd>,
    helper_exit: &mut ExitWatch,
    time: Duration,
) -> Result<(Reply, Vec<OwnedFd>), RuntimeError> {
    let answer = async {
        tokio::select! {
            biased;
            reply = receive(channel) => reply,
            exit = helper_exit.wait() => last_words(channel, exit),
        }
    };
    guest_time::timeout(time, answer).await.unwrap_or(Err(RuntimeError::Slow))
}

/// The answer of a helper that has ended, if it gave one before.
fn last_words(channel: &AsyncFd<OwnedFd>, exit: Exit) -> Result<(Reply, Vec<OwnedFd>), RuntimeError> {
    match control::receive(channel.get_ref()) {
        Ok(Some(reply)) => Ok(reply),
        _ => Err(RuntimeError::HelperEnded { code: Some(exit.code) }),
    }
}

fn bundle_dir(id: &str) -> PathBuf {
    Path::new(BUNDLES).join(id)
}

/// Makes a container's state files appear in another directory.
fn link_state(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        // Not its sockets.
        if entry.file_type()?.is_file() {
            std::fs::hard_link(entry.path(), to.join(entry.file_name()))?;
        }
    }
    Ok(())
}

fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> io::Result<()> {
    std::fs::write(path, serde_json::to_vec(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn helper_that_does_not_answer_is_not_waited_for() {
        let (ours, theirs) = control_pair().unwrap();
        let channel = sys::watch(ours, Interest::READABLE).unwrap();
        // Of no process, so it does not end either.
        let mut exit = Arc::new(Reaper::default()).expect().claim(u32::MAX);
        let slow = answer(&channel, &mut exit, Duration::from_millis(1)).await;
        assert!(matches!(slow, Err(RuntimeError::Slow)), "{slow:?}");
        control::send(&theirs, &Reply::Created { pid: 7 }, &[]).unwrap();
        let (reply, _) = answer(&channel, &mut exit, HELPER_TIMEOUT).await.unwrap();
        assert_eq!(reply, Reply::Created { pid: 7 });
    }
}
