//! A client of the shim contract: what containerd of each version, and CRI-O, run and send (containerd:
//! core/runtime/v2/README.md, api/runtime/{task,sandbox}; cri-o: internal/oci/runtime_vm.go).
//!
//! A [`Host`] is one such daemon with bundles of its own. It starts a shim with [`Host::start`], and speaks to it with a
//! [`Shim`]. The daemon of the node has no part in it.

mod bundle;
mod events;
mod fake;
mod host;

use std::time::Duration;

use anyhow::{Context as _, Result};
use protobuf::Message;
use ttrpc::asynchronous::Client;
pub use ttrpc::{Code, Error};

pub use bundle::{Output, memory_alone, process};
pub use host::{Caller, Host};

/// The services by name.
pub const TASK_V2: &str = "containerd.task.v2.Task";
/// The same messages under the name that containerd 2.x uses.
pub const TASK_V3: &str = "containerd.task.v3.Task";
/// The Sandbox API.
pub const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// Where containerd has the bundles of its pods.
const BUNDLES: [&str; 2] = [
    "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "/run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io",
];

/// A connection to a shim.
#[derive(Clone)]
pub struct Shim {
    client: Client,
    task: &'static str,
}

impl Shim {
    /// Connects to an address as `start` prints it; `version` is that of the contract.
    pub async fn connect(address: &str, version: i64) -> Result<Self> {
        let client = Client::connect(address).await.with_context(|| format!("no shim answers at {address}"))?;
        Ok(Self { client, task: if version >= 3 { TASK_V3 } else { TASK_V2 } })
    }

    /// Connects to the shim of a pod that the node's containerd has made, by either sandboxer.
    pub async fn of_pod(id: &str) -> Result<Self> {
        let found = BUNDLES.iter().find_map(|bundles| std::fs::read_to_string(format!("{bundles}/{id}/address")).ok());
        Self::connect(found.context("the pod has no bundle with an address")?.trim(), 2).await
    }

    /// One call of the Task API.
    pub async fn task<A: Message>(&self, method: &str, request: &impl Message) -> Result<A, Error> {
        self.call(self.task, method, request).await
    }

    /// One call of the Sandbox API.
    pub async fn sandbox<A: Message>(&self, method: &str, request: &impl Message) -> Result<A, Error> {
        self.call(SANDBOX, method, request).await
    }

    /// One call.
    pub async fn call<A: Message>(&self, service: &str, method: &str, request: &impl Message) -> Result<A, Error> {
        let payload = request.write_to_bytes().map_err(|error| Error::Others(error.to_string()))?;
        let mut message = ttrpc::Request::new();
        message.service = service.to_owned();
        message.method = method.to_owned();
        message.timeout_nano = i64::try_from(LIMIT.as_nanos()).unwrap_or(i64::MAX);
        message.payload = payload;
        let answer = self.client.request(message).await?;
        A::parse_from_bytes(&answer.payload).map_err(|error| Error::Others(error.to_string()))
    }
}

/// Longer than any bound of the shim's own, which are what the tests are about.
const LIMIT: Duration = Duration::from_secs(300);

/// The code of an answer: what containerd decides by.
pub fn code<T>(answer: &Result<T, Error>) -> Code {
    match answer {
        Ok(_) => Code::OK,
        Err(Error::RpcStatus(status)) => status.code(),
        Err(_) => Code::UNAVAILABLE,
    }
}
