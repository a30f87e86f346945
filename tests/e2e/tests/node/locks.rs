//! Locks on a volume that pods have in common.

use std::path::Path;

use anyhow::{Result, ensure};
use bulkhead_cli::cri::{self, v1};
use bulkhead_e2e::log_watch::LogWatch;
use bulkhead_e2e::{PATIENCE, TestPod, on_node};

use crate::volumes::KubeletDir;

/// Has `probe`, which locks files in all the ways that there are.
pub const IMAGE: &str = "127.0.0.1:5000/compat:latest";

pub fn with_volume(name: &str, volume: &Path, script: &str) -> v1::ContainerConfig {
    let mut config = cri::container_config(name, IMAGE, &["/bin/sh", "-c", script]);
    config.mounts.push(v1::Mount {
        container_path: "/shared".into(),
        host_path: volume.display().to_string(),
        ..Default::default()
    });
    config
}

pub async fn says(pod: &TestPod, config: &v1::ContainerConfig, text: &str) -> Result<()> {
    LogWatch::new(Path::new(&pod.config.log_directory), &config.log_path)?.contains(text.to_owned(), PATIENCE).await
}

#[test]
fn lock_on_a_volume_holds_against_another_pod_until_its_holder_ends_and_waiting_can_be_killed() {
    on_node(async |node| {
        let kubelet = KubeletDir::new("locks")?;
        let volume = kubelet.volume("empty-dir", "shared")?;
        node.cri.pull(IMAGE).await?;
        let (one, two) = (node.pod("lock-one").await?, node.pod("lock-two").await?);
        let holder = with_volume("holder", &volume, "exec probe lock /shared");
        let holding = one.run(holder.clone()).await?;
        says(&one, &holder, "locked").await?;

        let other = two.run(with_volume("other", &volume, "exec sleep 3600")).await?;
        let refused = two.sh(&other, "probe try /shared").await?;
        let said: Vec<_> = refused.lines().collect();
        ensure!(said.iter().filter(|line| line.ends_with(": EAGAIN")).count() == 5, "{refused}");
        ensure!(said.iter().filter(|line| line.ends_with("waited for: EINTR")).count() == 2, "{refused}");
        ensure!(said.contains(&"lock of type 1 from 0 for 0"), "{refused}");

        // Signals end those who wait, also the one that nothing survives; and who is left gets what the holder leaves.
        let killed = "probe lock /shared & sleep 1; kill -9 $!; wait $!; echo $?";
        ensure!(two.sh(&other, killed).await? == "137");
        let next = with_volume("next", &volume, "probe lock /shared & wait");
        two.run(next.clone()).await?;
        one.remove_container(&holding).await?;
        says(&two, &next, "locked").await?;

        // The end of a guest, whose processes close nothing.
        let after = with_volume("after", &volume, "exec probe lock /shared");
        one.run(after.clone()).await?;
        node.cri.remove_pod(&two.id).await?;
        says(&one, &after, "locked").await
    });
}

/// What databases do: who gets the lock sees what was written under it, and nothing is lost.
#[test]
fn counter_that_two_pods_raise_under_a_lock_loses_nothing() {
    on_node(async |node| {
        let kubelet = KubeletDir::new("counter")?;
        let volume = kubelet.volume("empty-dir", "shared")?;
        std::fs::write(volume.join("counter"), format!("{:08}", 0))?;
        node.cri.pull(IMAGE).await?;
        let count = |name| with_volume(name, &volume, "exec probe count /shared/counter 100");
        let (one, two) = (node.pod("count-one").await?, node.pod("count-two").await?);
        let (first, second) = (one.run(count("first")).await?, two.run(count("second")).await?);
        ensure!(one.wait_exit(&first, PATIENCE).await?.exit_code == 0);
        ensure!(two.wait_exit(&second, PATIENCE).await?.exit_code == 0);
        let counted = std::fs::read_to_string(volume.join("counter"))?;
        ensure!(counted == "00000200", "{counted}");
        Ok(())
    });
}
