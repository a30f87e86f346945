//! The VM's size follows its containers' limits, and what it costs is charged to the pod.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::{status, v1};
use bulkhead_e2e::processes::{Processes, own_kib};
use bulkhead_e2e::{PATIENCE, TestPod, node_command, on_node, sh};

const MIB: u64 = 1 << 20;
const SLEEP: &str = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done";

fn limits(cpus: i64, memory_mib: u64) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_quota: cpus * 100_000,
        cpu_period: 100_000,
        memory_limit_in_bytes: i64::try_from(memory_mib * MIB).unwrap_or(i64::MAX),
        ..Default::default()
    }
}

fn limited(name: &str, script: &str, resources: v1::LinuxContainerResources) -> v1::ContainerConfig {
    let mut config = sh(name, script);
    config.linux.get_or_insert_default().resources = Some(resources);
    config
}

async fn update(pod: &TestPod, container: &str, resources: v1::LinuxContainerResources) -> Result<()> {
    let container_id = container.to_owned();
    let request = v1::UpdateContainerResourcesRequest { container_id, linux: Some(resources), ..Default::default() };
    pod.cri().runtime().update_container_resources(request).await.map_err(status)?;
    Ok(())
}

/// The guest's memory in MiB and its CPUs.
async fn size(pod: &TestPod, container: &str) -> Result<(u64, u64)> {
    let text =
        pod.sh(container, "grep MemTotal /proc/meminfo | tr -dc 0-9; echo; grep -c ^processor /proc/cpuinfo").await?;
    let mut numbers = text.split_whitespace().map(str::parse::<u64>);
    let mut next = || numbers.next().context("no number")?.context("no number");
    Ok((next()? / 1024, next()?))
}

/// CPUs of a pod that says nothing: four, unless node or configuration have fewer.
fn few_cpus() -> u64 {
    let node = std::thread::available_parallelism().map_or(1, usize::from);
    u64::try_from(node.min(3)).unwrap_or(1)
}

/// Waits until the guest has at most so much memory: unplugging goes on after the answer to whoever made it possible.
async fn shrunk(pod: &TestPod, container: &str, mib: u64) -> Result<()> {
    let script =
        format!("while [ $(grep MemTotal /proc/meminfo | tr -dc 0-9) -gt {} ]; do sleep 0.2; done", mib * 1024);
    let waited = tokio::time::timeout(PATIENCE, pod.sh(container, &script)).await;
    waited.with_context(|| format!("the guest has more than {mib} MiB for good"))?.map(drop)
}

/// The pod's cgroup on the host.
async fn cgroup(pod: &TestPod) -> Result<PathBuf> {
    let spec = pod.runtime_spec().await?;
    let path = spec["linux"]["cgroupsPath"].as_str().context("no cgroup")?.trim_start_matches('/').to_owned();
    Ok(Path::new("/sys/fs/cgroup").join(path))
}

fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    Ok(std::fs::read_to_string(path).with_context(|| path.display().to_string())?.trim().to_owned())
}

fn vmm() -> Result<String> {
    Ok(node_command("pgrep", &["-x", "bulkhead-vmm"])?.trim().to_owned())
}

/// A field of the VMM's status in MiB.
fn vmm_mib(field: &str) -> Result<u64> {
    let status = read(format!("/proc/{}/status", vmm()?))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    Ok(line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>()? / 1024)
}

#[test]
fn vm_grows_for_a_containers_limits_and_gives_all_back_after() {
    on_node(async |node| {
        let pod = node.pod("grow").await?;
        let main = pod.sleeper("main").await?;
        let (memory, cpus) = size(&pod, &main).await?;
        ensure!(memory < 256 && cpus == few_cpus(), "a pod without limits has {memory} MiB and {cpus} CPUs");
        // It uses what it got: dd fills a buffer of that size.
        let script = format!("dd if=/dev/zero of=/dev/null bs=160M count=1 && {SLEEP}");
        let big = pod.run(limited("big", &script, limits(2, 600))).await?;
        let (grown, cpus) = size(&pod, &main).await?;
        ensure!(grown >= memory + 590 && cpus == few_cpus().max(2), "{memory} MiB have become {grown}, CPUs {cpus}");
        pod.stop(&big, Duration::from_secs(60)).await?;
        let peak = vmm_mib("VmHWM:")?;
        pod.remove_container(&big).await?;
        shrunk(&pod, &main, memory + 16).await?;
        ensure!(size(&pod, &main).await?.1 == few_cpus(), "the CPUs have stayed");
        let begin = Instant::now();
        while vmm_mib("VmRSS:")? + 128 > peak {
            ensure!(
                begin.elapsed() < PATIENCE,
                "the host has got no memory back: {} of {peak} MiB",
                vmm_mib("VmRSS:")?
            );
            // Nothing tells that another process has become smaller.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        println!("VMM: peak {peak} MiB, then {} MiB", vmm_mib("VmRSS:")?);
        ensure!(pod.sh(&main, "echo alive").await? == "alive", "the neighbour was hit");
        Ok(())
    });
}

#[test]
fn update_resizes_a_running_container_both_ways() {
    on_node(async |node| {
        let pod = node.pod("update").await?;
        // By rename, so that whoever reads it finds a number.
        let count = "i=0; while :; do i=$((i+1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; sleep 0.2; done";
        let main = pod.run(limited("main", count, limits(1, 64))).await?;
        let (memory, cpus) = size(&pod, &main).await?;
        ensure!(cpus == few_cpus(), "{cpus} CPUs");
        let limit = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
        update(&pod, &main, limits(3, 320)).await?;
        ensure!(pod.sh(&main, limit).await? == format!("{}\n300000 100000", 320 * MIB), "the limits are not raised");
        let (grown, cpus) = size(&pod, &main).await?;
        ensure!(grown >= memory + 250 && cpus == 3, "{memory} MiB have become {grown}, CPUs {cpus}");
        let before: u64 = pod.sh(&main, "cat /tmp/count").await?.parse()?;
        update(&pod, &main, limits(1, 48)).await?;
        ensure!(pod.sh(&main, limit).await? == format!("{}\n100000 100000", 48 * MIB), "the limits are not lowered");
        shrunk(&pod, &main, memory).await?;
        ensure!(size(&pod, &main).await?.1 == few_cpus(), "the CPUs have stayed");
        // What is requested counts where it is more than the limit.
        let requests = |shares| v1::LinuxContainerResources { cpu_shares: shares, ..Default::default() };
        update(&pod, &main, requests(1025)).await?;
        ensure!(size(&pod, &main).await?.1 == few_cpus().max(2), "no CPUs for a request of more than one");
        update(&pod, &main, requests(2)).await?;
        ensure!(size(&pod, &main).await?.1 == few_cpus(), "the CPUs that were requested have stayed");
        let script = format!("while [ $(cat /tmp/count) -le {before} ]; do sleep 0.1; done");
        tokio::time::timeout(PATIENCE, pod.sh(&main, &script)).await.context("the workload does not go on")??;
        // Beyond what the operator allows: refused, and nothing has changed.
        let error = update(&pod, &main, limits(1, 1 << 30)).await.expect_err("no ceiling").to_string();
        ensure!(error.contains("max_memory_mib"), "{error}");
        ensure!(pod.sh(&main, limit).await?.starts_with(&(48 * MIB).to_string()), "a refused limit was set");
        Ok(())
    });
}

#[test]
fn huge_pages_are_reserved_for_those_who_may_use_them() {
    on_node(async |node| {
        let pod = node.pod("huge").await?;
        let main = pod.sleeper("main").await?;
        let mut resources = limits(1, 64);
        resources.hugepage_limits = vec![v1::HugepageLimit { page_size: "2MB".into(), limit: 8 * MIB }];
        let user = pod.run(limited("user", SLEEP, resources)).await?;
        let total = "grep HugePages_Total /proc/meminfo | tr -dc 0-9";
        ensure!(pod.sh(&user, total).await? == "4", "no pool of four pages");
        let limit = pod.sh(&user, "cat /sys/fs/cgroup/hugetlb.2MB.max").await?;
        ensure!(limit == (8 * MIB).to_string(), "the limit is {limit}");
        pod.stop(&user, Duration::from_secs(60)).await?;
        pod.remove_container(&user).await?;
        let gone = "while [ $(grep HugePages_Total /proc/meminfo | tr -dc 0-9) != 0 ]; do sleep 0.2; done";
        tokio::time::timeout(PATIENCE, pod.sh(&main, gone)).await.context("the pool has stayed")??;
        Ok(())
    });
}

#[test]
fn vmm_is_as_likely_to_be_killed_for_memory_as_the_pods_most_protected_container() {
    on_node(async |node| {
        let pod = node.pod("oom-score").await?;
        let Processes { shim, vmm } = Processes::of(&pod)?;
        let scores = || {
            let score = |pid: u32| anyhow::Ok(read(format!("/proc/{pid}/oom_score_adj"))?.parse::<i32>()?);
            anyhow::Ok((score(vmm)?, score(shim)?))
        };
        ensure!(scores()? == (0, -999), "before any container: {:?}", scores()?);
        // What the kubelet gives BestEffort, Burstable and Guaranteed containers.
        let mut last = String::new();
        for (name, adjustment) in [("best-effort", 1000), ("burstable", 950), ("guaranteed", -997)] {
            let resources = v1::LinuxContainerResources { oom_score_adj: adjustment, ..Default::default() };
            last = pod.run(limited(name, SLEEP, resources)).await?;
            ensure!(scores()? == (i32::try_from(adjustment)?, -999), "{name}: {:?}", scores()?);
        }
        pod.stop(&last, Duration::from_secs(60)).await?;
        pod.remove_container(&last).await?;
        ensure!(scores()? == (950, -999), "after the guaranteed one: {:?}", scores()?);
        Ok(())
    });
}

#[test]
fn shim_and_vmm_are_charged_to_the_pod_and_bound_to_its_cpus() {
    on_node(async |node| {
        let pod = node.pod("charged").await?;
        let main = pod.sleeper("main").await?;
        let cgroup = cgroup(&pod).await?;
        let Processes { shim, vmm } = Processes::of(&pod)?;
        let members = read(cgroup.join("cgroup.procs"))?;
        for pid in [vmm, shim] {
            ensure!(members.lines().any(|member| member == pid.to_string()), "{pid} is not among {members:?}");
        }
        let score = |pid: u32| anyhow::Ok(read(format!("/proc/{pid}/oom_score_adj"))?.parse::<i32>()?);
        ensure!(score(vmm)? > score(shim)?, "the shim would be killed before the VMM");
        ensure!(read(cgroup.join("cpuset.cpus"))?.is_empty(), "bound to CPUs that nobody named");
        update(&pod, &main, v1::LinuxContainerResources { cpuset_cpus: "0".into(), ..Default::default() }).await?;
        ensure!(read(cgroup.join("cpuset.cpus"))? == "0", "not bound to the container's CPUs");
        let overhead = own_kib(shim)? + own_kib(vmm)?;
        println!("shim and VMM: {overhead} KiB of their own, without the guest's memory");
        pod.stop(&main, Duration::from_secs(60)).await?;
        Ok(())
    });
}
