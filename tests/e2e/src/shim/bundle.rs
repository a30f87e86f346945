//! Bundles as containerd and CRI-O write them: the spec, the link to the persistent directory, the fifos of the streams.

use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use protobuf::well_known_types::any::Any;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use super::{Caller, Host};

impl Host {
    /// Makes a bundle without a spec, as for a sandbox of the Sandbox API.
    pub fn empty_bundle(&self, id: &str) -> Result<PathBuf> {
        let (bundle, work) = (self.bundle(id), self.work(id));
        let mut directory = std::fs::DirBuilder::new();
        directory.recursive(true).mode(0o700);
        directory.create(&bundle).and_then(|()| directory.create(&work)).context("cannot make a bundle")?;
        symlink(&work, bundle.join("work"))?;
        // Held open for both ends, and larger than what a test makes a shim say: nobody has to read it.
        let log = bundle.join("log");
        mknodat(CWD, &log, FileType::Fifo, Mode::from_raw_mode(0o600), 0).context("cannot make a fifo")?;
        let log = std::fs::OpenOptions::new().read(true).write(true).open(log)?;
        self.logs.lock().map_err(|_| anyhow::anyhow!("a test has panicked"))?.push(log);
        Ok(bundle)
    }

    /// Makes the bundle of a pod's own container.
    pub fn sandbox_bundle(&self, id: &str, netns: &Path) -> Result<PathBuf> {
        self.spec_bundle(id, &sandbox_spec(self.caller, id, netns))
    }

    /// Makes the bundle of a container of a pod, which runs a shell script.
    pub fn container_bundle(&self, id: &str, sandbox: &str, sandbox_pid: u32, script: &str) -> Result<PathBuf> {
        self.spec_bundle(id, &container_spec(self.caller, id, sandbox, sandbox_pid, script))
    }

    fn spec_bundle(&self, id: &str, spec: &Value) -> Result<PathBuf> {
        let bundle = self.empty_bundle(id)?;
        std::fs::write(bundle.join("config.json"), spec.to_string())?;
        rootfs(&bundle.join("rootfs"))?;
        Ok(bundle)
    }
}

/// busybox, and what a container needs to find.
fn rootfs(root: &Path) -> Result<()> {
    for name in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
        std::fs::create_dir_all(root.join(name))?;
    }
    std::fs::copy("/usr/bin/busybox", root.join("bin/busybox")).context("the node has no busybox")?;
    for applet in ["sh", "cat", "sleep", "hostname", "kill", "true"] {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}

/// The annotations that say what a container is to its pod.
fn annotations(caller: Caller, kind: &str, sandbox: &str) -> Value {
    if caller == Caller::CriO {
        json!({ "io.kubernetes.cri-o.ContainerType": kind, "io.kubernetes.cri-o.SandboxID": sandbox })
    } else {
        json!({ "io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox })
    }
}

fn sandbox_spec(caller: Caller, id: &str, netns: &Path) -> Value {
    let namespaces = json!([
        { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network", "path": netns }
    ]);
    spec(annotations(caller, "sandbox", id), "exec sleep 3600", &namespaces, id)
}

fn container_spec(caller: Caller, id: &str, sandbox: &str, pid: u32, script: &str) -> Value {
    let of_sandbox = |name: &str| format!("/proc/{pid}/ns/{name}");
    let namespaces = json!([
        { "type": "pid" }, { "type": "mount" },
        { "type": "network", "path": of_sandbox("net") },
        { "type": "ipc", "path": of_sandbox("ipc") },
        { "type": "uts", "path": of_sandbox("uts") },
    ]);
    let mut spec = spec(annotations(caller, "container", sandbox), script, &namespaces, id);
    if caller == Caller::CriO {
        spec["linux"]["resources"] = memory_alone(32 << 20);
    }
    spec
}

/// A limit of memory as CRI-O says it: every other limit is there too, as zero (cri-o: internal/factory/container).
pub fn memory_alone(limit: u64) -> Value {
    json!({
        "cpu": { "shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": "" },
        "memory": { "limit": limit, "swap": limit, "reservation": 0 },
        "pids": { "limit": 0 },
    })
}

fn spec(annotations: Value, script: &str, namespaces: &Value, id: &str) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "hostname": if namespaces[2]["path"].is_null() { "contract" } else { "" },
        "root": { "path": "rootfs" },
        "process": process_spec(script),
        "annotations": annotations,
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
        ],
        "linux": { "namespaces": namespaces, "cgroupsPath": format!("/contract/{id}") },
    })
}

/// The OCI process of a shell script, as an exec is given it.
pub fn process(script: &str) -> Any {
    Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
        value: process_spec(script).to_string().into_bytes(),
        ..Any::default()
    }
}

fn process_spec(script: &str) -> Value {
    json!({
        "user": { "uid": 0, "gid": 0 },
        "cwd": "/",
        "env": ["PATH=/bin"],
        "args": ["/bin/sh", "-c", script],
        "capabilities": { "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"] },
    })
}

/// A fifo that a process's output goes to, read by us as containerd does.
pub struct Output {
    path: PathBuf,
    reader: tokio::net::unix::pipe::Receiver,
}

impl Output {
    /// Makes the fifo.
    pub fn new(path: PathBuf) -> Result<Self> {
        mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).context("cannot make a fifo")?;
        let reader = tokio::net::unix::pipe::OpenOptions::new().open_receiver(&path)?;
        Ok(Self { path, reader })
    }

    /// Its path.
    pub fn path(&self) -> String {
        self.path.display().to_string()
    }

    /// Waits until there is something to read, and leaves it there.
    pub async fn begun(&self) -> Result<()> {
        tokio::time::timeout(LIMIT, self.reader.readable()).await.context("no output")?.context("cannot wait")
    }

    /// Reads until the other side has closed its end.
    pub async fn to_end(mut self) -> Result<String> {
        let mut text = String::new();
        let read = tokio::time::timeout(LIMIT, self.reader.read_to_string(&mut text)).await;
        read.with_context(|| format!("the output does not end; it said {text:?}"))??;
        Ok(text)
    }
}

/// As long as anything in an emulated node.
const LIMIT: Duration = crate::PATIENCE;
