//! Runs groups: each once with runc and once with Bulkhead, both at the same time.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::stage::{Disk, Place, Stage};
use super::{Act, Group, IMAGE, Probe, shell};
use crate::{Node, with_node};

/// Begins the line that separates observations; followed by the number of the script, or its exit code, or the end.
const MARK: &str = "@@compat";

/// How long an act or a probe may take, so that one that hangs is a failure of its own; the longest takes half of this on a busy
/// machine.
const ACT_LIMIT: Duration = Duration::from_secs(180);

/// What was observed, by the case's name; an error is one of the suite's or the runtime's that no case expects.
pub type Observations = BTreeMap<&'static str, Result<String, String>>;

/// What one handler showed of a group; the error kept the whole group from running.
pub type Side = Result<Observations>;

/// Runs a group with runc and with Bulkhead. The error is something left behind.
pub async fn group(group: &Group) -> Result<(Side, Side)> {
    let mut sides = None;
    // Unmounted after the node's pods are gone.
    let disk_of_group = group.on_disk.then(|| Disk::new(disk())).transpose()?;
    with_node(async |node| {
        node.cri.pull(IMAGE).await?;
        sides = Some(tokio::join!(side(node, group, "runc"), side(node, group, "bulkhead")));
        if let Some(disk) = &disk_of_group {
            disk.clear()?;
        }
        Ok(())
    })
    .await?;
    sides.context("the group did not run")
}

async fn side(node: &Node, group: &Group, handler: &str) -> Side {
    let stage = stage(node, group, handler).await?;
    let mut observations = Observations::new();
    for probe in &group.probes {
        run_probe(&stage, probe, &mut observations).await;
    }
    // One after the other; those of two pods run side by side. With more at once on an emulated node runc's shim does not answer
    // containerd in the 2 s that it has for a task's state, and containerd takes the pod for gone.
    for act in &group.acts {
        let (name, observed) = run_act(&stage, act).await;
        observations.insert(name, observed);
    }
    Ok(observations)
}

fn disk() -> PathBuf {
    std::env::temp_dir().join("bulkhead-compat-disk")
}

async fn stage(node: &Node, group: &Group, handler: &str) -> Result<Stage> {
    let name = format!("{}-{handler}", group.name);
    let root = if group.on_disk { disk() } else { node.logs.clone() };
    let place = Place::new(root.join(format!("{name}-place")))?;
    let pod = node
        .pod_with(&name, handler, |config| {
            group.name.clone_into(&mut config.hostname);
            (group.change)(config, &place);
        })
        .await
        .with_context(|| format!("cannot run the pod {name}"))?;
    Stage::new(pod, place).await
}

async fn run_act(stage: &Stage, act: &Act) -> (&'static str, Result<String, String>) {
    let observed = tokio::time::timeout(ACT_LIMIT, (act.deed)(stage)).await;
    let observed = observed.unwrap_or_else(|_| Err(anyhow!("the case has not ended within {ACT_LIMIT:?}")));
    (act.case.name, observed.map(|text| stage.normalise(&text)).map_err(|error| format!("{error:#}")))
}

async fn run_probe(stage: &Stage, probe: &Probe, observations: &mut Observations) {
    let output = probe_output(stage, probe).await.map_err(|error| format!("{error:#}"));
    let output = output.map(|output| stage.normalise(&output));
    for (index, script) in probe.scripts.iter().enumerate() {
        let observed = output.clone().and_then(|output| {
            part(&output, index).map(str::to_owned).ok_or_else(|| format!("the probe ended before this case: {output}"))
        });
        observations.insert(script.case.name, observed);
    }
}

async fn probe_output(stage: &Stage, probe: &Probe) -> Result<String> {
    let script = combined(probe);
    // Its end is not waited for: containerd 1.6 loses what it has not read of the output by then.
    let init = if probe.by_exec { "exec sleep 3600" } else { &script };
    let mut config = shell(probe.name, init);
    (probe.change)(&mut config, &stage.place);
    let container = stage.run(config.clone()).await?;
    if probe.by_exec {
        return Ok(stage.shell(&container, &script).await?.stdout);
    }
    stage.wait_log_within(&config, &format!("{MARK} end"), ACT_LIMIT).await?;
    stage.text(&container, "stdout").await
}

/// All scripts of a probe as one. Each is a file of its own shell, so that none ends or changes the others.
fn combined(probe: &Probe) -> String {
    let mut script = String::new();
    for (index, part) in probe.scripts.iter().enumerate() {
        script.push_str(&format!("echo '{MARK} {index}'\n(\n{}\n) 2>&1 </dev/null\necho \"{MARK} = $?\"\n", part.text));
    }
    script.push_str(&format!("echo '{MARK} end'\n"));
    if !probe.by_exec {
        script.push_str("exec sleep 3600\n");
    }
    script
}

/// The output of one script in that of all.
fn part(output: &str, index: usize) -> Option<&str> {
    let (_, rest) = output.split_once(&format!("{MARK} {index}\n"))?;
    let (text, code) = rest.split_once(&format!("{MARK} = "))?;
    let code = code.split_once('\n')?.0;
    // The exit code is part of the observation when it is not 0.
    if code == "0" { Some(text) } else { rest.get(..text.len() + MARK.len() + 3 + code.len()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_with_their_exit_code() {
        let output = "@@compat 0\na\nb\n@@compat = 0\n@@compat 1\nc@@compat = 3\n@@compat end\n";
        assert_eq!(part(output, 0), Some("a\nb\n"));
        assert_eq!(part(output, 1), Some("c@@compat = 3"));
        assert_eq!(part(output, 2), None);
    }
}
