//! What a pod mounts is its own: the node's mount table has none of it, and nothing of the node is busy for a pod's sake.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::{on_node, sh};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};

use crate::volumes::{KubeletDir, SLEEP, following, mounted};

/// Where the node has mounts, and how many.
fn node_mounts() -> Result<BTreeMap<String, usize>> {
    let mut points = BTreeMap::new();
    for point in crate::read("/proc/self/mountinfo")?.lines().filter_map(|line| line.split(' ').nth(4)) {
        *points.entry(point.to_owned()).or_default() += 1;
    }
    Ok(points)
}

/// What there is more of than before, but for what containerd mounts for any pod: its shared memory and its network namespace.
fn more_mounts(before: &BTreeMap<String, usize>, pod: &str) -> Result<Vec<String>> {
    let of_containerd = |point: &str| point.ends_with(&format!("/{pod}/shm")) || point.contains("/netns/cni-");
    let now = node_mounts()?.into_iter();
    let more = now.filter(|(point, count)| *count > before.get(point).copied().unwrap_or(0) && !of_containerd(point));
    Ok(more.map(|(point, _)| point).collect())
}

#[test]
fn node_unmounts_and_removes_what_it_likes_below_the_volumes_of_a_pod() {
    on_node(async |node| {
        let mut kubelet = KubeletDir::new("busy")?;
        let base = kubelet.dir.clone();
        kubelet.tmpfs(&base, c"")?;
        mount_change(&base, MountPropagationFlags::SHARED)?;
        let volume = base.join("volume");
        for at in ["volume/inner", "theirs"] {
            kubelet.tmpfs(&base.join(at), c"")?;
        }
        let old = node.pod_with("older", "runc", |_| {}).await?;
        old.sleeper("main").await?;
        let before = node_mounts()?;
        let pod = node.pod("whole-node").await?;
        // The whole node, as node-exporter has it, what follows the host in both ways, and a volume with a mount below it.
        let mut config = mounted(sh("main", SLEEP), &volume, "/data", false);
        config = mounted(config, Path::new("/"), "/host", true);
        config = following(mounted(config, &base, "/follows", true));
        config = following(mounted(config, &base, "/writes", false));
        let main = pod.run(config).await?;
        let more = more_mounts(&before, &pod.id)?;
        ensure!(more.is_empty(), "the pod has mounted on the node: {more:?}");
        let inside = base.strip_prefix("/")?.display().to_string();
        // What it looks at where it may write and follows the host would be busy (docs/compatibility.md).
        let seen = format!("ls -d /host/{inside}/theirs /follows/theirs /data/inner /writes");
        ensure!(pod.sh(&main, &seen).await?.lines().count() == 4);
        // The kubelet's way with a volume: no lazy unmount, and the directory has to go.
        for gone in ["volume/inner", "theirs"].map(|at| base.join(at)) {
            unmount(&gone, UnmountFlags::empty()).with_context(|| format!("cannot unmount {}", gone.display()))?;
            fs::remove_dir(&gone).with_context(|| format!("cannot remove {}", gone.display()))?;
        }
        node.cri.remove_pod(&old.id).await.context("another pod cannot be removed")?;
        let bundle = Path::new("/run/containerd/io.containerd.runtime.v2.task/k8s.io").join(&old.id);
        ensure!(!bundle.exists(), "the other pod's bundle is left");
        ensure!(pod.sh(&main, "echo x > /data/file && cat /data/file").await? == "x");
        node.cri.remove_pod(&pod.id).await?;
        fs::remove_dir_all(&volume).context("the volume is busy")?;
        Ok(())
    });
}
