//! The fixture of the end-to-end suites: they run in the test node and play the kubelet over the CRI socket.
//!
//! A test is `on_node(async |node| ...)`. It starts pods with [`Node::pod`] and executes in them with [`TestPod::exec`]; when
//! it ends, whether it passed or not, its pods are removed and [`leftovers`] decides whether anything of them is left.

pub mod bench;
pub mod chaos;
pub mod cni;
pub mod compat;
pub mod containerd;
pub mod erofs;
pub mod guest_root;
pub mod leftovers;
pub mod liar;
pub mod log_watch;
mod netns;
mod node;
mod node_state;
pub mod port_forward;
pub mod processes;
pub mod shim;
pub mod soak;
mod streaming;
pub mod terminal;

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cli::cri::{self, Cri, ExecOutput, Pod, v1};
use bulkhead_cli::log;

use crate::leftovers::Before;
pub use crate::netns::Netns;
pub use crate::node::{PATIENCE, node_command};

/// An image with busybox and its applets.
pub const BUSYBOX: &str = "127.0.0.1:5000/busybox:latest";
/// The same with `watch DIRECTORY`, which prints inotify events.
pub const WATCH: &str = "127.0.0.1:5000/watch:latest";
/// An image with nginx that serves on port 80.
pub const NGINX: &str = "127.0.0.1:5000/nginx:latest";

/// The runtime handler of Bulkhead.
pub const HANDLER: &str = "bulkhead";

/// Tests share one node, whose processes, mounts and interfaces they count: one at a time.
static NODE: Mutex<()> = Mutex::new(());

/// The node under test.
pub struct Node {
    /// The CRI of its containerd.
    pub cri: Cri,
    logs: PathBuf,
    pods: RefCell<Vec<String>>,
}

/// Runs one test on the node, then asserts that nothing is left of it.
pub fn on_node(test: impl AsyncFnOnce(&Node) -> Result<()>) {
    let _alone = NODE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => panic!("no runtime for the test: {error}"),
    };
    if let Err(error) = runtime.block_on(with_node(test)) {
        panic!("{error:#}");
    }
}

/// Runs one test that starts shims by itself and needs no containerd, then asserts that nothing is left of it.
pub fn on_shims(test: impl AsyncFnOnce() -> Result<()>) {
    let _alone = NODE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let outcome = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(anyhow::Error::from);
    let outcome = outcome.and_then(|runtime| {
        let before = Before::look()?;
        runtime.block_on(test())?;
        drop(runtime);
        before.assert_as_it_was()
    });
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

/// Connects to the node, runs a test, and removes its pods. The caller sees to it that nothing else comes or goes meanwhile.
pub async fn with_node(test: impl AsyncFnOnce(&Node) -> Result<()>) -> Result<()> {
    let socket = std::env::var_os("BULKHEAD_CRI_SOCKET").map_or_else(|| cri::CONTAINERD_SOCKET.into(), PathBuf::from);
    let logs = std::env::temp_dir().join(format!("bulkhead-e2e-{}", std::process::id()));
    std::fs::create_dir_all(&logs).context("cannot create the log directory")?;
    let node = Node { cri: Cri::connect(&socket).await?, logs, pods: RefCell::default() };
    node.cri.pull(BUSYBOX).await?;
    let before = Before::look()?;
    let outcome = test(&node).await;
    for id in node.pods.take() {
        if let Err(error) = node.cri.remove_pod(&id).await {
            bail!(
                "{:#?}\nand then the pod could not be removed: {error:#}",
                outcome.err().map(|error| error.to_string())
            );
        }
    }
    outcome?;
    before.assert_as_it_was()
}

impl Node {
    /// Starts a pod with the Bulkhead handler.
    pub async fn pod(&self, name: &str) -> Result<TestPod> {
        self.pod_with(name, HANDLER, |_| {}).await
    }

    /// Starts a pod with any handler, its configuration changed first.
    pub async fn pod_with(
        &self,
        name: &str,
        handler: &str,
        change: impl FnOnce(&mut v1::PodSandboxConfig),
    ) -> Result<TestPod> {
        let mut config = cri::pod_config(name, &self.logs.join(name));
        change(&mut config);
        // A node may have several handlers of Bulkhead; the suites run with any.
        let other = std::env::var("BULKHEAD_HANDLER").ok().filter(|_| handler == HANDLER);
        let pod = self.cri.run_pod(config, other.as_deref().unwrap_or(handler)).await?;
        self.pods.borrow_mut().push(pod.id.clone());
        Ok(TestPod { pod })
    }

    /// Expects that a pod is refused, and returns the message.
    pub async fn refused_pod(&self, name: &str, change: impl FnOnce(&mut v1::PodSandboxConfig)) -> Result<String> {
        match self.pod_with(name, HANDLER, change).await {
            Ok(_) => bail!("pod {name} was not refused"),
            Err(error) => Ok(error.to_string()),
        }
    }
}

/// A pod of a test.
pub struct TestPod {
    pod: Pod,
}

impl std::ops::Deref for TestPod {
    type Target = Pod;

    fn deref(&self) -> &Pod {
        &self.pod
    }
}

impl TestPod {
    /// Starts a container that stays: a shell that waits for its stop signal.
    pub async fn sleeper(&self, name: &str) -> Result<String> {
        self.run(sh(name, "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done")).await
    }

    /// Runs a shell script in a new container to its end; returns exit status and log text of stdout.
    pub async fn run_to_end(&self, config: v1::ContainerConfig) -> Result<(v1::ContainerStatus, String)> {
        let container = self.run(config).await?;
        let status = self.wait_exit(&container, PATIENCE).await?;
        let lines = self.log(&container).await?;
        Ok((status, log::text_of(&lines, "stdout")))
    }

    /// The OCI spec of the pod's sandbox.
    pub async fn runtime_spec(&self) -> Result<serde_json::Value> {
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        let answer = self.cri().runtime().pod_sandbox_status(request).await.map_err(cri::status)?.into_inner();
        let info: serde_json::Value = serde_json::from_str(answer.info.get("info").context("no verbose status")?)?;
        Ok(info["runtimeSpec"].clone())
    }

    /// The path of the pod's network namespace on the host.
    pub async fn netns(&self) -> Result<String> {
        let spec = self.runtime_spec().await?;
        let namespaces = spec["linux"]["namespaces"].as_array().context("no namespaces")?;
        let network = namespaces.iter().find(|namespace| namespace["type"] == "network");
        Ok(network.and_then(|network| network["path"].as_str()).context("no network namespace")?.to_owned())
    }

    /// Executes a shell script in a container; it must succeed. Returns its standard output, trimmed.
    pub async fn sh(&self, container: &str, script: &str) -> Result<String> {
        let ExecOutput { stdout, stderr, code } = self.exec(container, &["/bin/sh", "-c", script]).await?;
        ensure!(code == 0, "{script:?} ended with {code}: {stderr}");
        Ok(stdout.trim().to_owned())
    }
}

/// A container that runs a shell script.
pub fn sh(name: &str, script: &str) -> v1::ContainerConfig {
    cri::container_config(name, BUSYBOX, &["/bin/sh", "-c", script])
}
