//! `make bench-boot`, the pod's part: from RunPodSandbox to the container's first log line, with Bulkhead and with runc in
//! turns in the same run. Times under emulation mean something only as ratios.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bulkhead_cli::cri::{self, Cri};
use bulkhead_e2e::log_watch::LogWatch;
use bulkhead_e2e::{BUSYBOX, PATIENCE, sh};

/// Runs of each handler; the median is printed.
const RUNS: usize = 5;

/// Milliseconds of each step, run by run.
type Samples = BTreeMap<String, Vec<f64>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let cri = Cri::connect(Path::new(cri::CONTAINERD_SOCKET)).await?;
    cri.pull(BUSYBOX).await?;
    let logs = std::env::temp_dir().join(format!("bulkhead-bench-{}", std::process::id()));
    let mut samples: BTreeMap<&str, Samples> = BTreeMap::new();
    for run in 0..RUNS {
        for handler in ["runc", "bulkhead"] {
            println!("pod with {handler}, {} of {RUNS}", run + 1);
            let steps = pod(&cri, handler, &logs.join(format!("{handler}-{run}"))).await?;
            let all = samples.entry(handler).or_default();
            for (step, time) in steps {
                all.entry(step).or_default().push(time);
            }
        }
    }
    let _ = fs::remove_dir_all(&logs);
    print(&samples);
    Ok(())
}

/// Runs one pod; returns the milliseconds of its steps.
async fn pod(cri: &Cri, handler: &str, logs: &Path) -> Result<Vec<(String, f64)>> {
    let watch = LogWatch::new(logs, "main_0.log")?;
    let mut steps = Vec::new();
    let begin = Instant::now();
    let mut last = begin;
    let mut done = |step: &str, steps: &mut Vec<(String, f64)>| {
        let now = Instant::now();
        steps.push((step.to_owned(), milliseconds(now - last)));
        last = now;
    };
    let pod = cri.run_pod(cri::pod_config("bench", logs), handler).await?;
    done("1 RunPodSandbox", &mut steps);
    let container = pod.create(sh("main", "echo up")).await?;
    done("2 CreateContainer", &mut steps);
    pod.start(&container).await?;
    done("3 StartContainer", &mut steps);
    watch.first_line(PATIENCE).await?;
    done("4 first log line", &mut steps);
    steps.push(("5 total".to_owned(), milliseconds(begin.elapsed())));
    steps.extend(breakdown(&pod.id)?);
    pod.wait_exit(&container, PATIENCE).await?;
    pod.remove().await?;
    Ok(steps)
}

/// What the shim wrote of the sandbox's boot; runc's wrote nothing.
fn breakdown(sandbox: &str) -> Result<Vec<(String, f64)>> {
    let path = PathBuf::from("/run/bulkhead/k8s.io").join(sandbox).join("boot.json");
    let Ok(text) = fs::read(&path) else { return Ok(Vec::new()) };
    let steps: Vec<(String, f64)> =
        serde_json::from_slice(&text).with_context(|| format!("{} is not understood", path.display()))?;
    Ok(steps.into_iter().enumerate().map(|(at, (step, time))| (format!("1.{} {step}", at + 1), time)).collect())
}

fn print(samples: &BTreeMap<&str, Samples>) {
    let empty = Samples::new();
    let (runc, bulkhead) = (samples.get("runc").unwrap_or(&empty), samples.get("bulkhead").unwrap_or(&empty));
    println!("\n{:<28}{:>12}{:>12}{:>8}   (median of {RUNS}, ms)", "step", "runc", "bulkhead", "ratio");
    for (step, times) in bulkhead {
        let mine = median(times);
        match runc.get(step).map(|times| median(times)) {
            Some(theirs) => println!("{step:<28}{theirs:>12.0}{mine:>12.0}{:>8.2}", mine / theirs),
            None => println!("{step:<28}{:>12}{mine:>12.0}", ""),
        }
    }
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
