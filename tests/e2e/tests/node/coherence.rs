//! Who sees what of a volume's files, and when: containers of one pod have them in common, pods within a second.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::log;
use bulkhead_e2e::{PATIENCE, TestPod, on_node};

use crate::locks::{IMAGE, says, with_volume};
use crate::root_files::on_the_node;
use crate::volumes::KubeletDir;

/// How long what a guest knows of a volume's file is true.
const FRESH: Duration = Duration::from_secs(1);

/// What comes to that: a look at all changes, on a machine that has other guests to run, and the difference of two clocks.
const MOMENT: Duration = Duration::from_millis(500);

/// The files that `probe change` changes.
const FILES: [&str; 7] = ["content", "open", "length", "mode", "gone", "from", "replaced"];

/// How many changes it makes, of which `probe see` says a line each.
const CHANGES: usize = 10;

#[test]
fn store_in_a_mapped_file_is_the_other_containers_at_once() {
    on_node(async |node| {
        const TURNS: u32 = 200;
        let kubelet = KubeletDir::new("mapped")?;
        node.cri.pull(IMAGE).await?;
        let pod = node.pod("mapped").await?;
        for volume in [kubelet.volume("empty-dir", "own")?, kubelet.volume("host", "path")?] {
            let file = volume.join("number");
            fs::write(&file, [0; 4096])?;
            let kind = volume.file_name().and_then(|name| name.to_str()).context("no name")?.to_owned();
            let mut players = Vec::new();
            for who in 0..2 {
                let script = format!("exec probe turns /shared/number {who} {TURNS}");
                players.push(pod.run(with_volume(&format!("{kind}-{who}"), &volume, &script)).await?);
            }
            for player in players {
                let status = pod.wait_exit(&player, PATIENCE).await?;
                ensure!(status.exit_code == 0, "{kind}: {status:?} {:?}", pod.log(&player).await?);
            }
            // What is mapped is written when its process ends, at the latest.
            let number = fs::read(&file)?;
            ensure!(number.starts_with(&(2 * TURNS).to_ne_bytes()), "{kind}: {:?}", number.get(..4));
        }
        Ok(())
    });
}

#[test]
fn change_by_another_pod_or_the_node_is_seen_within_a_second() {
    on_node(async |node| {
        let kubelet = KubeletDir::new("coherence")?;
        node.cri.pull(IMAGE).await?;
        let (one, two) = (node.pod("coherence-one").await?, node.pod("coherence-two").await?);
        let volume = kubelet.volume("host", "by-pod")?;
        let changer = one.run(with_volume("changer", &volume, "exec sleep 3600")).await?;
        let by_pod = async || one.sh(&changer, "probe change /shared").await;
        seen_in_time(&two, "by-pod", &volume, by_pod).await?;
        let volume = kubelet.volume("host", "by-node")?;
        let by_node = async || {
            let output = Command::new(on_the_node("bin/probe")?).arg("change").arg(&volume).output()?;
            anyhow::Ok(String::from_utf8(output.stdout)?)
        };
        seen_in_time(&two, "by-node", &volume, by_node).await
    });
}

/// Has a container of the pod look at the volume's files while they are changed.
async fn seen_in_time(
    pod: &TestPod,
    name: &str,
    volume: &Path,
    change: impl AsyncFnOnce() -> Result<String>,
) -> Result<()> {
    for file in FILES {
        fs::write(volume.join(file), "before")?;
    }
    let config = with_volume(name, volume, "exec probe see /shared");
    let observer = pod.run(config.clone()).await?;
    says(pod, &config, "looking").await?;
    let changed = time_of(&change().await?)?;
    pod.wait_exit(&observer, PATIENCE).await?;
    let said = log::text_of(&pod.log(&observer).await?, "stdout");
    let (_, seen) = said.split_once("looking\n").with_context(|| format!("it has not looked: {said}"))?;
    ensure!(seen.lines().count() == CHANGES, "{said}");
    for line in seen.lines() {
        let after = Duration::from_nanos(u64::try_from(time_of(line)? - changed).unwrap_or(0));
        println!("coherence: {name}: after {after:.0?}: {line}");
        ensure!(after < FRESH + MOMENT, "{name}: seen after {after:?}: {line}");
    }
    Ok(())
}

/// The time at the end of a line, in nanoseconds.
fn time_of(line: &str) -> Result<i64> {
    let (_, time) = line.trim().rsplit_once(": ").with_context(|| format!("no time in {line:?}"))?;
    time.parse().with_context(|| format!("no time in {line:?}"))
}
