//! Runs a container's OCI hooks on the host (runtime-spec: config.md, POSIX-platform Hooks; runtime.md, Lifecycle).
//!
//! They come from containerd's side, NRI plugins for example, and are trusted as that is. The pid in the state that they
//! get is the one that the shim reports: it exists on the host, in the pod's network namespace; its other namespaces are
//! neither the container's nor the node's.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bulkhead_protocol::error::chain;
use oci_spec::runtime::{ContainerState, Hook, Spec, State};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::deadlines::{Deadline, Operation};
use crate::host_files;
use crate::spec::HostHooks;

/// A container's hooks, and what they are told.
#[derive(Debug)]
pub struct ContainerHooks {
    hooks: HostHooks,
    state: State,
}

impl ContainerHooks {
    /// Those of a container.
    pub fn new(hooks: HostHooks, spec: &Spec, id: &str, bundle: &Path) -> Self {
        let mut state = State::default();
        state.set_version(spec.version().clone()).set_id(id.to_owned()).set_bundle(bundle.to_path_buf());
        state.set_annotations(spec.annotations().clone());
        Self { hooks, state }
    }

    /// The container is created; a hook that fails is its failure.
    pub async fn created(&self, pid: u32) -> Result<(), HookError> {
        for hook in &self.hooks.created {
            run(hook, &self.state(ContainerState::Created, pid)).await?;
        }
        Ok(())
    }

    /// The container has been started. A hook that fails is only logged, as the specification wants.
    pub async fn started(&self, pid: u32) {
        self.run_all(&self.hooks.started, &self.state(ContainerState::Running, pid)).await;
    }

    /// The container has been deleted. A hook that fails is only logged, as the specification wants.
    pub async fn deleted(&self) {
        self.run_all(&self.hooks.deleted, &self.state(ContainerState::Stopped, 0)).await;
    }

    async fn run_all(&self, hooks: &[Hook], state: &State) {
        for hook in hooks {
            if let Err(error) = run(hook, state).await {
                tracing::warn!(container = self.state.id(), "{}", chain(&error));
            }
        }
    }

    fn state(&self, status: ContainerState, pid: u32) -> State {
        let mut state = self.state.clone();
        state.set_status(status).set_pid(i32::try_from(pid).ok().filter(|pid| *pid != 0));
        state
    }
}

async fn run(hook: &Hook, state: &State) -> Result<(), HookError> {
    let path = hook.path().clone();
    let failed = |source| HookError::Run { path: path.clone(), source };
    let limit = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
    let limit = limit.map_or(Operation::Hook.budget(), Duration::from_secs);
    let input = serde_json::to_vec(state).map_err(|error| failed(error.into()))?;
    // Dropped at the limit, and killed with that.
    let output = tokio::time::timeout(limit, execute(hook, state.bundle(), &input));
    let output = output.await.map_err(|_| HookError::Timeout { path: path.clone(), limit })?.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(HookError::Status { path: path.clone(), status: output.status, said })
}

async fn execute(hook: &Hook, bundle: &Path, input: &[u8]) -> io::Result<std::process::Output> {
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_ref().and_then(|args| args.split_first()) {
        command.arg0(name).args(arguments);
    }
    let env = hook.env().iter().flatten().filter_map(|pair| pair.split_once('='));
    command.env_clear().envs(env).current_dir(bundle).kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    // Waits for the file system of the program.
    let spawned = host_files::HOOKS.run(Deadline::begin(Operation::Hook), move || command.spawn()).await;
    let mut child = spawned.map_err(io::Error::other)??;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        let _ = stdin.write_all(input).await;
    }
    child.wait_with_output().await
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// execve(2).
    #[error(
        "cannot run the OCI hook {path}; is it there and executable? whoever configures hooks on this node can remove it"
    )]
    Run {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It says no.
    #[error("the OCI hook {path} failed, {status}: {said}")]
    Status {
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// Its standard error.
        said: String,
    },
    /// It was killed.
    #[error(
        "the OCI hook {path} did not end within {limit:?} and was killed; a `timeout` in its configuration gives it more"
    )]
    Timeout {
        /// The program.
        path: PathBuf,
        /// What it had.
        limit: Duration,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn hooks(dir: &Path, hooks: serde_json::Value) -> ContainerHooks {
        let mut spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2", "root": {"path": "rootfs"}, "annotations": {"a": "b"}, "hooks": hooks
        }))
        .unwrap();
        let host = crate::spec::take_hooks(&mut spec).unwrap();
        ContainerHooks::new(host, &spec, "c", dir)
    }

    fn shell(script: &str) -> serde_json::Value {
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["X=y"]})
    }

    #[tokio::test]
    async fn hook_gets_the_state_and_its_environment() {
        let dir = tempfile::tempdir().unwrap();
        let hooks = hooks(
            dir.path(),
            json!({"prestart": [shell("cat > one; echo $X > env")], "createRuntime": [shell("cat > two")], "poststop": [shell("cat > three")]}),
        );
        hooks.created(7).await.unwrap();
        hooks.started(7).await;
        hooks.deleted().await;
        let state = |name: &str| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(dir.path().join(name)).unwrap()).unwrap()
        };
        let expected = json!({
            "ociVersion": "1.0.2", "id": "c", "status": "created", "pid": 7,
            "bundle": dir.path(), "annotations": {"a": "b"}
        });
        assert_eq!((state("one"), state("two")), (expected.clone(), expected));
        assert_eq!((state("three")["status"].clone(), state("three")["pid"].clone()), (json!("stopped"), json!(null)));
        assert_eq!(std::fs::read_to_string(dir.path().join("env")).unwrap(), "y\n");
    }

    #[tokio::test]
    async fn failure_tells_what_the_hook_said() {
        let dir = tempfile::tempdir().unwrap();
        let failing = hooks(dir.path(), json!({"createRuntime": [shell("echo no >&2; exit 3")]}));
        let error = failing.created(1).await.unwrap_err().to_string();
        assert!(error.contains("/bin/sh") && error.ends_with("exit status: 3: no"), "{error}");
        let missing = hooks(dir.path(), json!({"createRuntime": [{"path": "/nonexistent"}]}));
        assert!(matches!(missing.created(1).await, Err(HookError::Run { .. })));
    }

    #[tokio::test]
    async fn hook_that_takes_too_long_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let slow = json!({"path": "/bin/sh", "args": ["sh", "-c", "exec sleep 1000"], "timeout": 1});
        let hooks = hooks(dir.path(), json!({"createRuntime": [slow]}));
        assert!(matches!(hooks.created(1).await, Err(HookError::Timeout { .. })));
    }
}
