//! Where cases are measured: a pod of each handler with a container and a client in it, and rounds that take turns.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_cli::cri::{self, v1};

use super::client::Client;
use super::counts::{self, Counters};
use super::results::{Case, Counts, REFERENCE, Results, Sample};
use crate::log_watch::LogWatch;
use crate::{HANDLER, Node, PATIENCE, TestPod};

/// The image with the client, Python, and programs in /usr/bin.
pub const IMAGE: &str = "127.0.0.1:5000/bench:latest";

/// The port of the first client of a pod; streams go to the next one.
pub const PORT: u16 = 7700;

/// How much is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Depth {
    /// Both handlers, as often as it takes for times.
    Full,
    /// What is counted, with Bulkhead alone: numbers that are nearly the same each time need few rounds.
    Counts,
}

/// Rounds where times are asked for.
const ROUNDS: usize = 15;

/// Rounds where there are counts alone.
const COUNTED: usize = 2;

/// Rounds at least, of what takes long.
const FEWEST: usize = 3;

/// What has taken so long takes long: there are fewer rounds of it. Fifteen rounds of what takes less than a second with each
/// handler are well within this.
const LONG: Duration = Duration::from_secs(120);

impl Depth {
    /// Whether so many rounds are enough, after so much time.
    fn is_enough(self, rounds: usize, elapsed: Duration) -> bool {
        match self {
            Self::Full => rounds >= ROUNDS || (rounds >= FEWEST && elapsed > LONG),
            Self::Counts => rounds >= COUNTED,
        }
    }
}

/// A directory for the pods' volumes, gone with the value.
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes it.
    pub fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("bulkhead-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    /// A directory below it that a container sees.
    fn mount(&self, below: &str, container_path: &str) -> Result<v1::Mount> {
        let host = self.0.join(below);
        std::fs::create_dir_all(&host).with_context(|| format!("cannot create {}", host.display()))?;
        let host_path = host.to_string_lossy().into_owned();
        Ok(v1::Mount { container_path: container_path.to_owned(), host_path, ..Default::default() })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// All that cases need.
pub struct Bench {
    sides: Vec<Side>,
    depth: Depth,
    /// What was measured so far.
    pub results: Results,
}

/// One order of a case.
pub struct Step {
    /// The case.
    pub case: Case,
    /// What the client is told.
    pub order: String,
}

/// A case and a sample of it.
pub type Measurement = (Case, Sample);

impl Bench {
    /// Starts the pods.
    pub async fn start(node: &Node, scratch: &Scratch, depth: Depth, results: Results) -> Result<Self> {
        node.cri.pull(IMAGE).await?;
        let handlers: &[&'static str] = match depth {
            Depth::Full => &[REFERENCE, HANDLER],
            Depth::Counts => &[HANDLER],
        };
        let mut sides = Vec::new();
        for &handler in handlers {
            sides.push(Side::start(node, scratch, handler).await?);
        }
        Ok(Self { sides, depth, results })
    }

    /// How much is run.
    pub fn depth(&self) -> Depth {
        self.depth
    }

    /// Does something once with each side that is no part of a case.
    pub async fn prepare(&mut self, orders: &[String]) -> Result<()> {
        for side in &mut self.sides {
            for order in orders {
                side.client.order(order).await?;
            }
        }
        Ok(())
    }

    /// Measures cases that are one order each, one after the other in each round.
    pub async fn steps(&mut self, steps: &[Step]) -> Result<()> {
        self.rounds(async |side, _| {
            let mut measured = Vec::new();
            for Step { case, order } in steps {
                measured.push((case.clone(), side.order(order).await?));
            }
            Ok(measured)
        })
        .await
    }

    /// Runs a round with one side and then with the other, until it is enough. The first round warms up and does not count.
    pub async fn rounds(
        &mut self,
        mut round: impl AsyncFnMut(&mut Side, usize) -> Result<Vec<Measurement>>,
    ) -> Result<()> {
        let mut begun = Instant::now();
        for number in 0_usize.. {
            if number > 0 && self.depth.is_enough(number - 1, begun.elapsed()) {
                break;
            }
            if number == 1 {
                begun = Instant::now();
            }
            for side in &mut self.sides {
                let measured = round(side, number).await?;
                for (case, sample) in measured.into_iter().filter(|_| number > 0) {
                    self.results.add(side.handler, case, sample);
                }
            }
        }
        if let Some(last) = self.results.cases.last() {
            println!("bench: {} and what belongs to it: {} rounds", last.case.name, last.of(HANDLER).len());
        }
        Ok(())
    }
}

/// A pod of one handler.
pub struct Side {
    handler: &'static str,
    /// The pod.
    pub pod: TestPod,
    /// The container.
    pub container: String,
    /// The client in it.
    pub client: Client,
    /// The pod's address.
    pub address: IpAddr,
    /// Of a pod that has a VM.
    counters: Option<Counters>,
}

impl Side {
    async fn start(node: &Node, scratch: &Scratch, handler: &'static str) -> Result<Self> {
        let machines = counts::machines();
        let pod = node.pod_with(&format!("bench-{handler}"), handler, |_| {}).await?;
        let counters = match handler {
            REFERENCE => None,
            _ => Some(Counters::of(&pod.id, &machines).await?),
        };
        let address = pod.addresses().await?.first().context("the pod has no address")?.parse()?;
        let uid = pod.config.metadata.clone().unwrap_or_default().uid;
        let empty_dir = format!("{handler}/pods/{uid}/volumes/kubernetes.io~empty-dir/scratch");
        let mounts = vec![scratch.mount(&empty_dir, "/scratch")?, scratch.mount(&format!("{handler}/host"), "/host")?];
        let (container, client) = attend(&pod, address, "main", PORT, mounts).await?;
        Ok(Self { handler, pod, container, client, address, counters })
    }

    /// Starts another container with a client.
    pub async fn attend(&self, name: &str, port: u16) -> Result<(String, Client)> {
        attend(&self.pod, self.address, name, port, Vec::new()).await
    }

    /// Gives an order, and takes the time by the client's word.
    pub async fn order(&mut self, order: &str) -> Result<Sample> {
        let before = self.counts().await?;
        let taken = self.client.order(order).await?;
        let counts = self.since(&before).await?;
        Ok(Sample { value: taken.milliseconds, calls: taken.calls, counts })
    }

    /// What the pod's VM has counted; nothing if there is none.
    pub async fn counts(&self) -> Result<Counts> {
        match &self.counters {
            Some(counters) => counters.read().await,
            None => Ok(Counts::new()),
        }
    }

    /// What it has counted since.
    pub async fn since(&self, before: &Counts) -> Result<Counts> {
        Ok(counts::difference(before, &self.counts().await?))
    }
}

/// Starts a container whose process is a client, and connects to it.
async fn attend(
    pod: &TestPod,
    address: IpAddr,
    name: &str,
    port: u16,
    mounts: Vec<v1::Mount>,
) -> Result<(String, Client)> {
    let watch = LogWatch::new(Path::new(&pod.config.log_directory), &format!("{name}_0.log"))?;
    let mut config = cri::container_config(name, IMAGE, &["bench", "serve", &port.to_string()]);
    config.mounts = mounts;
    let container = pod.run(config).await?;
    watch.first_line(PATIENCE).await?;
    Ok((container, Client::connect(address, port).await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_done_less_often_but_not_once() {
        let second = Duration::from_secs(1);
        assert!(!Depth::Full.is_enough(14, 30 * second) && Depth::Full.is_enough(15, 30 * second));
        assert!(!Depth::Full.is_enough(2, 1000 * second) && Depth::Full.is_enough(3, 1000 * second));
        assert!(Depth::Counts.is_enough(2, second));
    }
}
