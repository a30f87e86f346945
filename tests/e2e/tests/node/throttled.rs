//! A pod with little CPU. Its VM is under the pod's limit as well: it is slow, and not hung.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::{HANDLER, PATIENCE, on_node, sh};

use crate::chaos::{Group, in_group};

/// A fifth of a processor. The emulated one of the node is so slow that this is less than a tenth of a real one.
const QUOTA: &str = "20000 100000";

/// What a kubelet gives a container to end.
const GRACE: Duration = Duration::from_secs(30);

/// Ends by a code of its own when it is asked to, and tells that it was.
const ORDERLY: &str = "trap 'echo asked; exit 7' TERM; while :; do sleep 3600 & wait $!; done";

#[test]
fn pod_with_a_fifth_of_a_cpu_becomes_ready_answers_probes_and_ends_in_order() {
    on_node(async |node| {
        let group = Group::new("throttled")?;
        group.set("cpu.max", QUOTA)?;
        let pod = node.pod_with("throttled", HANDLER, |config| in_group(config, &group)).await?;
        // As the kubelet starts a sidecar and then a container, with a probe and a preStop hook, and ends them the other way round.
        let sidecar = pod.run(sh("sidecar", ORDERLY)).await?;
        let main = pod.run(sh("main", ORDERLY)).await?;
        ensure!(pod.sh(&main, "echo ready").await? == "ready", "the probe");
        ensure!(pod.sh(&main, "touch /tmp/stopping && echo done").await? == "done", "the preStop hook");
        for (name, container) in [("main", &main), ("sidecar", &sidecar)] {
            pod.stop(container, GRACE).await?;
            let status = pod.wait_exit(container, PATIENCE).await?;
            ensure!(status.exit_code == 7, "{name} was not left the time to end: {}", status.exit_code);
            if name == "main" {
                ensure!(pod.sh(&sidecar, "echo alive").await? == "alive", "the sidecar has ended with it");
            }
        }
        pod.cri().remove_pod(&pod.id).await?;
        ensure!(throttled(&group)? > Duration::from_secs(1), "nothing was throttled: {:?}", throttled(&group)?);
        Ok(())
    });
}

fn throttled(group: &Group) -> Result<Duration> {
    let stat = group.get("cpu.stat")?;
    let line = stat.lines().find_map(|line| line.strip_prefix("throttled_usec ")).context("no such line")?;
    Ok(Duration::from_micros(line.parse()?))
}
