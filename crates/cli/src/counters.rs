//! `bulkhead counters POD`: what the devices of a running pod's VM have counted since it was booted, as its shim tells it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_protocol::counters::{DeviceCounters, by_name};
use bulkhead_protocol::node::SHIM_SOCKET;
use bulkhead_protocol::operator::{CountersRequest, OperatorClient};
use ttrpc::asynchronous::Client;

use crate::pods;

/// Longer than the shim waits for the VMM, so that it can say what is wrong.
const PATIENCE: Duration = Duration::from_secs(30);

/// Options of `bulkhead counters`.
#[derive(clap::Args)]
pub struct CountersArguments {
    /// A running pod's sandbox id, or the beginning of it
    #[arg(value_name = "POD")]
    pod: String,
    /// Print JSON, device by device
    #[arg(long)]
    json: bool,
}

/// Prints them.
pub async fn run(arguments: &CountersArguments) -> Result<()> {
    let pod = pods::find(&arguments.pod)?;
    let devices = PodCounters::connect(&pod).await?.read().await?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&devices)?);
        return Ok(());
    }
    for (name, count) in by_name(&devices) {
        println!("{name:<24}{count:>16}");
    }
    Ok(())
}

/// A connection to the shim of one pod.
pub struct PodCounters(OperatorClient);

impl PodCounters {
    /// Connects to the shim of the pod with this directory.
    pub async fn connect(pod: &Path) -> Result<Self> {
        let link = pod.join(SHIM_SOCKET);
        // The link's own path may be longer than a socket's can be.
        let socket = std::fs::read_link(&link).with_context(|| {
            format!("no link {} to the shim's socket; is the pod's shim of another release?", link.display())
        })?;
        let client = Client::connect(&format!("unix://{}", socket.display())).await;
        let client = client.with_context(|| format!("the pod's shim does not answer on {}", socket.display()))?;
        Ok(Self(OperatorClient::new(client)))
    }

    /// What the devices have counted until now.
    pub async fn read(&self) -> Result<Vec<DeviceCounters>> {
        let nanoseconds = i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX);
        let context = ttrpc::context::with_timeout(nanoseconds);
        let answer =
            self.0.counters(context, &CountersRequest::new()).await.context("the pod's shim tells no counters")?;
        serde_json::from_str(&answer.devices).context("the shim's counters make no sense; is it of another release?")
    }
}
