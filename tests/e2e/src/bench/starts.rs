//! From RunPodSandbox to the container's first line of output.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use bulkhead_protocol::node::RUN_ROOT;

use super::results::{Case, REFERENCE, Results, Sample};
use crate::log_watch::LogWatch;
use crate::{BUSYBOX, HANDLER, Node, PATIENCE, sh};

/// Pods of each handler.
const PODS: usize = 5;

/// Measures all of it.
pub async fn measure(node: &Node, results: &mut Results) -> Result<()> {
    node.cri.pull(BUSYBOX).await?;
    for number in 0..PODS {
        for handler in [REFERENCE, HANDLER] {
            for (step, value) in pod(node, handler, number).await? {
                let sample = Sample { value, ..Sample::default() };
                results.add(handler, Case::time(format!("start/{step}"), "pod", 1), sample);
            }
        }
    }
    println!("bench: start: {PODS} pods of each handler");
    Ok(())
}

/// Runs one pod; returns the milliseconds of its steps.
async fn pod(node: &Node, handler: &str, number: usize) -> Result<Vec<(String, f64)>> {
    let name = format!("start-{handler}-{number}");
    let logs = node.logs.join(&name);
    let watch = LogWatch::new(&logs, "main_0.log")?;
    let mut steps = Vec::new();
    let begin = Instant::now();
    let mut last = begin;
    let mut done = |step: &str| {
        let now = Instant::now();
        steps.push((step.to_owned(), (now - last).as_secs_f64() * 1000.0));
        last = now;
    };
    let pod = node.pod_with(&name, handler, |_| {}).await?;
    done("RunPodSandbox");
    let container = pod.create(sh("main", "echo up")).await?;
    done("CreateContainer");
    pod.start(&container).await?;
    done("StartContainer");
    watch.first_line(PATIENCE).await?;
    done("first log line");
    steps.push(("all of it".to_owned(), begin.elapsed().as_secs_f64() * 1000.0));
    steps.extend(breakdown(&pod.id)?);
    pod.wait_exit(&container, PATIENCE).await?;
    node.cri.remove_pod(&pod.id).await?;
    Ok(steps)
}

/// What the shim wrote of the sandbox's boot; runc's wrote nothing.
fn breakdown(sandbox: &str) -> Result<Vec<(String, f64)>> {
    let path = PathBuf::from(RUN_ROOT).join("k8s.io").join(sandbox).join("boot.json");
    let Ok(text) = std::fs::read(&path) else { return Ok(Vec::new()) };
    let steps: Vec<(String, f64)> =
        serde_json::from_slice(&text).with_context(|| format!("{} is not understood", path.display()))?;
    Ok(steps.into_iter().map(|(step, time)| (format!("RunPodSandbox: {step}"), time)).collect())
}
