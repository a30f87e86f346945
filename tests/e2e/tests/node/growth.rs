//! A pod without limits has memory as it needs it, and no more than there is.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::{HANDLER, PATIENCE, TestPod, on_node, sh};

/// The guest's memory in MiB.
async fn memory(pod: &TestPod, container: &str) -> Result<u64> {
    let kib = pod.sh(container, "grep MemTotal /proc/meminfo | tr -dc 0-9").await?;
    Ok(kib.parse::<u64>().context("no number")? / 1024)
}

/// Has a process that fills a buffer of so many MiB.
async fn fill(pod: &TestPod, container: &str, mib: u64) -> Result<()> {
    let begin = Instant::now();
    pod.sh(container, &format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1")).await?;
    println!("{mib} MiB filled in {:?}, of {} MiB then", begin.elapsed(), memory(pod, container).await?);
    Ok(())
}

#[test]
fn container_without_a_limit_gets_memory_when_it_needs_it_and_a_bomb_ends_in_its_own_pod() {
    on_node(async |node| {
        let pod = node.pod("grows").await?;
        let main = pod.sleeper("main").await?;
        let before = memory(&pod, &main).await?;
        ensure!(before < 256, "it begins with {before} MiB");
        fill(&pod, &main, 400).await?;
        let grown = memory(&pod, &main).await?;
        ensure!(grown > 400, "400 MiB were filled, of {grown}");
        let freed = Instant::now();
        let neighbour = node.pod("neighbour").await?;
        let other = neighbour.sleeper("main").await?;
        bomb(node, (&neighbour, other.as_str())).await?;
        // What has not been needed for a while is taken back. Nothing tells that the guest has become smaller.
        while memory(&pod, &main).await? > before + 16 {
            ensure!(freed.elapsed() < 3 * PATIENCE, "it keeps its memory, {grown} MiB");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        println!("as small as before after {:?}", freed.elapsed());
        // And it can have it again.
        fill(&pod, &main, 400).await
    });
}

/// Processes that fill memory without end, in a pod without limits whose cgroup has one, as that of all pods has.
async fn bomb(node: &bulkhead_e2e::Node, neighbour: (&TestPod, &str)) -> Result<()> {
    let group = Path::new("/sys/fs/cgroup/growth");
    fs::create_dir_all(group)?;
    let in_group = |config: &mut v1::PodSandboxConfig| {
        config.linux.get_or_insert_default().cgroup_parent = "/growth".into();
    };
    let pod = node.pod_with("bombed", HANDLER, in_group).await?;
    fs::write(group.join("memory.max"), "700M").context("the group has no limit")?;
    let main = pod.sleeper("main").await?;
    let fill = "tail -c 2000000000 /dev/zero";
    let bomb = pod.run(sh("bomb", &format!("for i in 1 2 3; do {fill} & done; exec {fill}"))).await?;
    let begin = Instant::now();
    let end = pod.wait_exit(&bomb, 3 * PATIENCE).await?;
    println!("the bomb has ended after {:?}, of {} MiB then", begin.elapsed(), memory(&pod, &main).await?);
    ensure!(end.exit_code == 137 && end.reason == "OOMKilled", "{end:?}");
    let grown = memory(&pod, &main).await?;
    ensure!((300..700).contains(&grown), "it had {grown} MiB of 700");
    for (pod, container) in [(&pod, main.as_str()), neighbour] {
        ensure!(pod.sh(container, "echo alive").await? == "alive", "others were hit");
    }
    let events = fs::read_to_string(group.join("memory.events"))?;
    ensure!(events.lines().any(|line| line == "oom_kill 0"), "the node has killed: {events}");
    node.cri.remove_pod(&pod.id).await?;
    fs::remove_dir(group).context("the group is still used")
}
