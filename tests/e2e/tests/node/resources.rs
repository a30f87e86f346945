//! Accounting and limits.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::{status, v1};
use bulkhead_e2e::{PATIENCE, TestPod, node_command, on_node, sh};

async fn stats(pod: &TestPod, container: &str) -> Result<v1::ContainerStats> {
    let request = v1::ContainerStatsRequest { container_id: container.to_owned() };
    let answer = pod.cri().runtime().container_stats(request).await.map_err(status)?.into_inner();
    answer.stats.context("no stats")
}

#[test]
fn stats_count_cpu_and_memory_of_the_container() {
    on_node(async |node| {
        let pod = node.pod("stats").await?;
        let container = pod.sleeper("main").await?;
        let cpu = |stats: &v1::ContainerStats| {
            stats.cpu.as_ref().and_then(|cpu| cpu.usage_core_nano_seconds.as_ref()).map_or(0, |value| value.value)
        };
        let before = stats(&pod, &container).await?;
        pod.sh(
            &container,
            "head -c 20000000 /dev/zero > /dev/shm/ballast; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done",
        )
        .await?;
        let after = stats(&pod, &container).await?;
        let memory = after.memory.as_ref().and_then(|memory| memory.working_set_bytes.as_ref()).map_or(0, |m| m.value);
        ensure!(cpu(&after) > cpu(&before) && cpu(&before) > 0, "{before:?} {after:?}");
        ensure!((18_000_000..64_000_000).contains(&memory), "{memory} bytes of memory: {after:?}");
        Ok(())
    });
}

#[test]
fn container_over_its_memory_limit_is_oom_killed_and_the_pod_goes_on() {
    on_node(async |node| {
        let pod = node.pod("oom").await?;
        let neighbour = pod.sleeper("neighbour").await?;
        let mut config = sh("glutton", "x=x; while :; do x=$x$x; done");
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(v1::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() });
        let container = pod.run(config).await?;
        let end = pod.wait_exit(&container, PATIENCE).await?;
        ensure!(end.exit_code == 137 && end.reason == "OOMKilled", "{end:?}");
        ensure!(pod.sh(&neighbour, "echo alive").await? == "alive", "the neighbour was killed as well");
        Ok(())
    });
}

#[test]
fn pid_limit_and_cpu_quota_reach_the_guests_cgroup() {
    on_node(async |node| {
        let pod = node.pod("limits").await?;
        let mut config = sh("main", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done");
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(v1::LinuxContainerResources {
            cpu_quota: 50_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        });
        let container = pod.run(config).await?;
        let shown = pod.sh(&container, "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max").await?;
        ensure!(shown == "50000 100000\n67108864", "{shown}");
        pod.stop(&container, Duration::from_secs(20)).await
    });
}

/// What a container's numbers are made of: the path of each that is not zero.
fn fields(value: &serde_json::Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        serde_json::Value::Object(map) => {
            map.iter().for_each(|(key, value)| fields(value, &format!("{path}.{key}"), found))
        }
        serde_json::Value::Array(list) => list.iter().for_each(|value| fields(value, path, found)),
        serde_json::Value::Null => {}
        other if *other == 0 => {}
        _ => drop(found.insert(path.to_owned())),
    }
}

#[test]
fn stats_have_every_field_that_runcs_have() {
    on_node(async |node| {
        let mut seen = Vec::new();
        for handler in ["runc", "bulkhead"] {
            let pod = node.pod_with(&format!("fields-{handler}"), handler, |_| {}).await?;
            let work =
                "head -c 4000000 /dev/zero > /tmp/file; cat /tmp/file > /dev/null; echo x > /dev/shm/x; sleep 3600";
            let mut config = sh("main", work);
            let linux = config.linux.get_or_insert_default();
            linux.resources = Some(v1::LinuxContainerResources {
                cpu_quota: 50_000,
                cpu_period: 100_000,
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            });
            let container = pod.run(config).await?;
            pod.sh(&container, "while [ ! -s /dev/shm/x ]; do sleep 0.1; done").await?;
            let json = node_command("ctr", &["-n", "k8s.io", "tasks", "metrics", "--format", "json", &container])?;
            let mut found = BTreeSet::new();
            fields(&serde_json::from_str(&json).context("ctr prints no JSON")?, "", &mut found);
            seen.push(found);
        }
        let [runc, ours] = seen.as_slice() else { anyhow::bail!("two handlers") };
        println!("runc {runc:?}\nbulkhead {ours:?}");
        // The files are the host's: nothing of the guest's is written back to a disk, nor is its cache of them dirty. And the
        // guest's kernel gives transparent huge pages to those who ask for them, the node's to everybody.
        let forced = [".io.usage", ".memory.file_dirty", ".memory.file_writeback", ".memory.thp_"];
        let missing: Vec<_> =
            runc.difference(ours).filter(|path| !forced.iter().any(|prefix| path.starts_with(prefix))).collect();
        ensure!(missing.is_empty(), "missing: {missing:?}");
        ensure!(ours.len() > 20, "{ours:?}");
        Ok(())
    });
}
