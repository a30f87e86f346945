//! A daemon that starts shims: its bundles, what it puts on the command line, into the environment and on stdin, and how it
//! reads the answer.

use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;

use super::Shim;
use super::events::Events;
use super::fake::FakeContainerd;

/// The parent of the pods' cgroups, `/contract` in specs.
const CGROUP: &str = "/sys/fs/cgroup/contract";

/// Who starts the shim.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Caller {
    /// No `GRPC_ADDRESS`; reads a plain address.
    Containerd1_6,
    /// Reads JSON of version 2 at most.
    Containerd1_7,
    /// Reads JSON of version 3.
    Containerd2_1,
    /// Writes `BootstrapParams` and reads `BootstrapResult`.
    Containerd2_3,
    /// `runtime_type = "vm"`: no events, namespace `default`, its own annotations, reads a plain address.
    CriO,
}

impl Caller {
    /// The version of the contract that it must be answered with for a pod.
    pub fn version(self) -> i64 {
        match self {
            Self::Containerd1_6 | Self::Containerd1_7 | Self::CriO => 2,
            Self::Containerd2_1 | Self::Containerd2_3 => 3,
        }
    }
}

/// A daemon with its state in a directory, which goes with it.
pub struct Host {
    /// Who it is.
    pub caller: Caller,
    /// The events that it got.
    pub events: Events,
    pub(super) directory: PathBuf,
    /// The log fifos of the bundles.
    pub(super) logs: Mutex<Vec<File>>,
    binary: String,
    fake: FakeContainerd,
}

impl Host {
    /// A daemon that starts this shim.
    pub async fn new(caller: Caller, binary: &str) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("bulkhead-host-{}-{caller:?}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).context("cannot make the daemon's directory")?;
        // The kubelet's part: a parent for the pods, whose children are accounted.
        std::fs::create_dir_all(CGROUP).context("cannot make a cgroup")?;
        std::fs::write(format!("{CGROUP}/cgroup.subtree_control"), "+cpu +memory +pids")?;
        let version = if caller.version() >= 3 { "v2.1.9" } else { "1.7.24" };
        Ok(Self {
            caller,
            events: Events::listen(&directory.join("ttrpc.sock")).await?,
            fake: FakeContainerd::listen(&directory.join("grpc.sock"), version)?,
            directory,
            logs: Mutex::default(),
            binary: binary.to_owned(),
        })
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> &'static str {
        if self.caller == Caller::CriO { "default" } else { "k8s.io" }
    }

    /// The bundle of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.directory.join("state/io.containerd.runtime.v2.task").join(self.namespace()).join(id)
    }

    /// The persistent directory that the bundle's link `work` leads to.
    pub(super) fn work(&self, id: &str) -> PathBuf {
        self.path("root/io.containerd.runtime.v2.task").join(self.namespace()).join(id)
    }

    /// Runs `start` for a bundle and connects to the address that it answers.
    pub async fn start(&self, id: &str) -> Result<(i64, Shim)> {
        let stdin = self.stdin(id)?;
        let output = self.run(id, "start", &stdin)?;
        let (version, address) = self.answer(&output)?;
        Ok((version, Shim::connect(&address, version).await?))
    }

    /// Runs `delete` for a bundle, as after every end of a connection, and removes the bundle.
    pub fn delete(&self, id: &str) -> Result<DeleteResponse> {
        let output = self.run(id, "delete", &[])?;
        std::fs::remove_dir_all(self.bundle(id)).context("the bundle cannot be removed")?;
        let _ = std::fs::remove_dir_all(self.work(id));
        DeleteResponse::parse_from_bytes(&output).context("delete answered nonsense")
    }

    /// Runs the shim's binary; what it prints on either stream is its answer.
    fn run(&self, id: &str, action: &str, stdin: &[u8]) -> Result<Vec<u8>> {
        let crio = self.caller == Caller::CriO;
        let (grpc, ttrpc) = (self.fake.path(), self.events.path());
        let mut command = Command::new(&self.binary);
        command.args(["-namespace", self.namespace(), "-address", if crio { "" } else { grpc }]);
        command.args(["-publish-binary", "/usr/bin/containerd", "-id", id]);
        if action == "delete" {
            command.arg("-bundle").arg(self.bundle(id));
        }
        command.arg(action).current_dir(self.bundle(id)).process_group(0);
        command.env("TTRPC_ADDRESS", if crio { "" } else { ttrpc }).env("GOMAXPROCS", "2");
        command.env_remove("GRPC_ADDRESS");
        if self.caller != Caller::Containerd1_6 {
            command.env("GRPC_ADDRESS", if crio { "" } else { grpc }).env("MAX_SHIM_VERSION", "2");
            command.env("NAMESPACE", self.namespace());
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if let Some(mut pipe) = child.stdin.take() {
            // A shim that does not read its stdin may have ended.
            let _ = pipe.write_all(stdin);
        }
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{action} failed: {}{said}", String::from_utf8_lossy(&output.stdout));
        ensure!(said.is_empty(), "{action} wrote to stderr, which containerd takes for its answer: {said}");
        Ok(output.stdout)
    }

    fn stdin(&self, id: &str) -> Result<Vec<u8>> {
        if self.caller != Caller::Containerd2_3 {
            return Ok(Vec::new());
        }
        let params = BootstrapParams {
            instance_id: id.to_owned(),
            namespace: self.namespace().to_owned(),
            containerd_version: "v2.3.0".to_owned(),
            containerd_ttrpc_address: self.events.path().to_owned(),
            containerd_grpc_address: self.fake.path().to_owned(),
            containerd_binary: "/usr/bin/containerd".to_owned(),
            ..BootstrapParams::default()
        };
        Ok(params.write_to_bytes()?)
    }

    /// Reads the answer as this daemon does, and no other form.
    fn answer(&self, output: &[u8]) -> Result<(i64, String)> {
        match self.caller {
            Caller::Containerd1_6 | Caller::CriO => {
                let address = std::str::from_utf8(output).context("the answer is no text")?.trim();
                ensure!(address.starts_with("unix://"), "no address: {address:?}");
                Ok((2, address.to_owned()))
            }
            Caller::Containerd1_7 | Caller::Containerd2_1 => {
                let answer: serde_json::Value = serde_json::from_slice(output).context("the answer is no JSON")?;
                ensure!(answer["protocol"] == "ttrpc", "{answer}");
                match (answer["version"].as_i64(), answer["address"].as_str()) {
                    (Some(version), Some(address)) => Ok((version, address.to_owned())),
                    _ => bail!("an incomplete answer: {answer}"),
                }
            }
            Caller::Containerd2_3 => {
                let answer = BootstrapResult::parse_from_bytes(output).context("the answer is no BootstrapResult")?;
                ensure!(answer.protocol == "ttrpc", "{answer}");
                Ok((answer.version.into(), answer.address))
            }
        }
    }

    /// A path below the daemon's directory.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What a test that failed has left behind must not fail the next one.
        let bundles = self.bundle("x").parent().map(std::fs::read_dir);
        for bundle in bundles.into_iter().flatten().flatten().flatten() {
            let _ = self.delete(&bundle.file_name().to_string_lossy());
        }
        let _ = std::fs::remove_dir(CGROUP);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
