//! What an operator sees of the work of a pod's VM.

use std::path::Path;

use anyhow::ensure;
use bulkhead_cli::counters::PodCounters;
use bulkhead_e2e::{node_command, on_node};
use bulkhead_protocol::counters::by_name;
use bulkhead_protocol::node::RUN_ROOT;

#[test]
fn counters_of_a_pod_are_those_of_what_its_containers_do() {
    on_node(async |node| {
        let pod = node.pod("counters").await?;
        let container = pod.sleeper("main").await?;
        let counters = PodCounters::connect(&Path::new(RUN_ROOT).join("k8s.io").join(&pod.id)).await?;
        let before = by_name(&counters.read().await?);
        pod.sh(&container, "for i in 1 2 3; do echo x >/tmp/$i; done").await?;
        let after = by_name(&counters.read().await?);
        for (name, least) in [("fs.CREATE", 3), ("fs.kicks", 1), ("fs.interrupts", 1)] {
            let of = |counters: &std::collections::BTreeMap<String, u64>| counters.get(name).copied().unwrap_or(0);
            ensure!(of(&after) >= of(&before) + least, "{name}: {before:?}, {after:?}");
        }
        let text = node_command("bulkhead", &["counters", &pod.id[..12]])?;
        ensure!(text.lines().any(|line| line.starts_with("fs.CREATE ")), "{text}");
        Ok(())
    });
}
