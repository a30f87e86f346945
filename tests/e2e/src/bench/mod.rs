//! `make bench`: what files, packets, streams and starts cost in a pod on Bulkhead, beside the same on runc in the same run.
//!
//! Two pods run side by side, one of each handler, and take turns: a round does the same with one and then with the other, so that
//! whatever else the machine does falls on both. Inside of each a small client (tests/node/images/bench.c) does what it is told over
//! TCP, and times it by itself. Around each order the counters of the pod's VM are read, so that a case has the exact number of
//! requests, kicks, interrupts and exits beside its time. Under emulation times mean something only as ratios; counts are counts.
//!
//! A new group is a module that adds samples to [`Results`], and its name in [`GROUPS`], [`run`] and tools/bench. What is no time has
//! another quantity ([`Case::quantity`](results::Case::quantity)); less must be better.

mod client;
mod counts;
mod files;
mod network;
mod report;
mod results;
mod stage;
mod starts;
mod stdio;
mod tools;

use anyhow::{Result, ensure};

use crate::Node;
pub use counts::mount_debugfs;
pub use report::{as_json, table};
pub use results::Results;
use stage::Bench;
pub use stage::{Depth, Scratch};

/// What there is to measure, in the order of the table.
pub const GROUPS: [&str; 5] = ["start", "files", "tools", "network", "stdio"];

/// Runs these groups, or all if none is named. Starts have nothing that is counted.
pub async fn run(node: &Node, scratch: &Scratch, depth: Depth, groups: &[String]) -> Result<Results> {
    for group in groups {
        ensure!(GROUPS.contains(&group.as_str()), "there is no group {group:?}; the groups are {GROUPS:?}");
    }
    let wanted = |group: &str| groups.is_empty() || groups.iter().any(|name| name == group);
    let mut results = Results::default();
    if wanted("start") && depth == Depth::Full {
        starts::measure(node, &mut results).await?;
    }
    if !GROUPS.iter().any(|group| *group != "start" && wanted(group)) {
        return Ok(results);
    }
    let mut bench = Bench::start(node, scratch, depth, results).await?;
    if wanted("files") {
        files::measure(&mut bench).await?;
    }
    if wanted("tools") {
        tools::measure(&mut bench).await?;
    }
    if wanted("network") {
        network::measure(&mut bench).await?;
    }
    if wanted("stdio") {
        stdio::measure(&mut bench).await?;
    }
    Ok(bench.results)
}
