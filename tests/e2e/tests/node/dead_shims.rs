//! What a shim leaves that was killed where nobody calls `delete`, as under CRI-O (tests play it with [`bulkhead_e2e::liar`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_e2e::{PATIENCE, node_command, on_shims};

use crate::liar::{Pod, Stage};

/// What there is of a pod on the node beside its bundle.
fn traces(stage: &Stage, pod: &Pod) -> Result<Vec<PathBuf>> {
    let run = Path::new("/run/bulkhead/k8s.io").join(&pod.id);
    let address = fs::read_to_string(stage.host.bundle(&pod.id).join("address"))?;
    let socket = PathBuf::from(address.trim().trim_start_matches("unix://"));
    let cgroup = PathBuf::from(fs::read_to_string(run.join("cgroup")).context("the pod has no cgroup")?);
    let traces = vec![socket.with_extension("pid"), socket, cgroup, run];
    ensure!(traces.iter().all(|trace| trace.exists()), "not all of {traces:?} are there");
    Ok(traces)
}

/// Waits until something holds, which nobody tells.
async fn until(what: &str, holds: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        if Instant::now() > deadline {
            bail!("still not: {what}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn kill_shim(pod: &Pod) -> Result<()> {
    node_command("kill", &["-KILL", &pod.shim_pid.to_string()])?;
    let status = format!("/proc/{}/status", pod.shim_pid);
    until("the shim has ended", || fs::read_to_string(&status).map_or(true, |status| status.contains("State:\tZ")))
        .await
}

#[test]
fn what_a_killed_shim_left_is_removed_by_the_next_one_and_by_bulkhead_clean() {
    on_shims(async || {
        let stage = Stage::empty().await?;
        let (_, killed) = stage.begin("killed", "").await?;
        let left = traces(&stage, &killed)?;
        kill_shim(&killed).await?;
        let (_, next) = stage.begin("next", "").await?;
        until("the next pod's shim cleans up", || left.iter().all(|trace| !trace.exists())).await?;
        let left = traces(&stage, &next)?;
        ensure!(node_command("bulkhead", &["clean"])?.is_empty(), "a pod that runs was cleaned up");
        ensure!(left.iter().all(|trace| trace.exists()), "of a pod that runs something is gone");
        kill_shim(&next).await?;
        let said = node_command("bulkhead", &["clean"])?;
        ensure!(said.contains("/run/bulkhead/k8s.io/next"), "{said}");
        ensure!(left.iter().all(|trace| !trace.exists()), "left: {left:?}");
        Ok(())
    });
}
