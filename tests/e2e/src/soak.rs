//! Many containers one after the other and many pods at once: nothing may be left, and what a pod costs on the host may
//! not grow with what has run in it.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use futures::{StreamExt, TryStreamExt};

use crate::processes::{Processes, descriptors};
use crate::{Node, TestPod, sh};

/// Cycles of a pod before its cost is first looked at, 20 of four pods together: thread pools, tables and the allocator's
/// arenas have their size then.
pub const WARM_UP: usize = 5;

/// Growth of a shim's memory from [`WARM_UP`] on that is taken for noise, in KiB. The allocator keeps some of what is freed
/// in each arena; a leak of one connection's 16 KiB buffer in each of a pod's 45 later cycles is 720.
const MEMORY_NOISE: u64 = 512;

/// Growth of the number of open descriptors that is taken for noise: a connection that is about to be closed has two.
const DESCRIPTOR_NOISE: usize = 8;

/// Files that each container reads from its volume: a leak of one cycle's is more than noise.
const VOLUME_FILES: usize = 20;

/// The annotation that makes a guest small, and half of the default memory, in MiB: 20 of them fit into the test node.
const SMALL: (&str, &str) = ("io.bulkhead.memory-mib", "128");

/// Pods that boot at the same time. One emulated processor boots them no faster together, and each has a time limit.
const BOOTING: usize = 4;

/// What a pod costs on the host.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Memory of the shim that is its own, in KiB (smaps_rollup of proc(5)): anonymous pages, not those of its program.
    shim_kib: u64,
    /// Open descriptors of the shim.
    shim_descriptors: usize,
    /// Open descriptors of the VMM. Its memory is the guest's, which grows as the guest touches it.
    vmm_descriptors: usize,
}

impl Cost {
    fn of(pod: &TestPod) -> Result<Self> {
        let Processes { shim, vmm } = Processes::of(pod)?;
        let rollup = fs::read_to_string(format!("/proc/{shim}/smaps_rollup"))?;
        let anonymous = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:")).context("no Anonymous line")?;
        Ok(Self {
            shim_kib: anonymous.trim().trim_end_matches(" kB").parse()?,
            shim_descriptors: descriptors(shim)?,
            vmm_descriptors: descriptors(vmm)?,
        })
    }

    fn assert_no_more_than(&self, earlier: &Self) -> Result<()> {
        ensure!(
            self.shim_kib <= earlier.shim_kib + MEMORY_NOISE
                && self.shim_descriptors <= earlier.shim_descriptors + DESCRIPTOR_NOISE
                && self.vmm_descriptors <= earlier.vmm_descriptors + DESCRIPTOR_NOISE,
            "a pod costs more and more: first {earlier:?}, now {self:?}"
        );
        Ok(())
    }
}

fn small(pod: &mut v1::PodSandboxConfig) {
    pod.annotations.insert(SMALL.0.to_owned(), SMALL.1.to_owned());
}

/// Creates, executes in and deletes `cycles` containers, in `pods` pods by turns; the pods may not cost more at the end
/// than after [`WARM_UP`] cycles each.
pub async fn cycles(node: &Node, pods: usize, cycles: usize) -> Result<()> {
    let mut running = Vec::new();
    for index in 0..pods {
        running.push(node.pod_with(&format!("soak-{index}"), "bulkhead", small).await?);
    }
    let mut first = BTreeMap::new();
    let begin = Instant::now();
    for cycle in 0..cycles {
        let index = cycle % pods;
        let pod = &running[index];
        one_cycle(node, pod, cycle).await.with_context(|| format!("cycle {cycle}"))?;
        if cycle / pods + 1 == WARM_UP {
            first.insert(index, Cost::of(pod)?);
        }
        if (cycle + 1) % 20 == 0 {
            println!("soak: {} of {cycles} cycles, {:.0?}, {:?}", cycle + 1, begin.elapsed(), Cost::of(pod)?);
        }
    }
    for (index, earlier) in first {
        let last = Cost::of(&running[index])?;
        println!("soak: pod {index}: after {WARM_UP} cycles of its own {earlier:?}, at the end {last:?}");
        last.assert_no_more_than(&earlier)?;
    }
    Ok(())
}

/// With a volume of its own, whose files the VMM must not hold when the container is gone.
async fn one_cycle(node: &Node, pod: &TestPod, cycle: usize) -> Result<()> {
    let volume = node.logs.join(format!("soak-volume-{cycle}"));
    fs::create_dir(&volume)?;
    (0..VOLUME_FILES).try_for_each(|number| fs::write(volume.join(number.to_string()), "x"))?;
    let mut config = sh(&format!("cycle-{cycle}"), "exec sleep 3600");
    config.mounts = vec![v1::Mount {
        container_path: "/volume".into(),
        host_path: volume.to_string_lossy().into_owned(),
        ..Default::default()
    }];
    let container = pod.run(config).await?;
    let answer = pod.sh(&container, "cat /volume/* | wc -c").await?;
    ensure!(answer == VOLUME_FILES.to_string(), "the exec says {answer:?}");
    pod.stop(&container, Duration::ZERO).await?;
    pod.remove_container(&container).await?;
    Ok(fs::remove_dir_all(&volume)?)
}

/// Runs that many pods at once, with a container and an exec in each.
pub async fn at_once(node: &Node, pods: usize) -> Result<()> {
    let begin = Instant::now();
    let start = async |index: usize| -> Result<(TestPod, String)> {
        let pod = node.pod_with(&format!("crowd-{index}"), "bulkhead", small).await?;
        let container = pod.sleeper("main").await?;
        println!("soak: pod {index} runs, {:.0?}", begin.elapsed());
        Ok((pod, container))
    };
    let running: Vec<_> = futures::stream::iter((0..pods).map(start)).buffer_unordered(BOOTING).try_collect().await?;
    ensure!(running.len() == pods, "{} of {pods} pods run", running.len());
    for (pod, container) in &running {
        ensure!(pod.sh(container, "echo alive").await? == "alive", "{} does not answer", pod.id);
    }
    println!("soak: {pods} pods at once, all answer, {:.0?}", begin.elapsed());
    let free = fs::read_to_string("/proc/meminfo")?;
    println!("soak: {}", free.lines().nth(2).unwrap_or_default());
    Ok(())
}

/// Makes and removes that many pods with a container each, `at_once` of them at any time, and prints how long each call of the
/// kubelet's took: the median, the 99th percentile and the longest.
pub async fn storm(node: &Node, pods: usize, at_once: usize) -> Result<()> {
    let begin = Instant::now();
    let one = async |index: usize| -> Result<[Duration; 3]> {
        let mut laps = Laps(Instant::now());
        let pod = node.pod_with(&format!("storm-{index}"), "bulkhead", small).await?;
        let made = laps.next();
        pod.sleeper("main").await?;
        let started = laps.next();
        node.cri.remove_pod(&pod.id).await?;
        Ok([made, started, laps.next()])
    };
    let times: Vec<_> = futures::stream::iter((0..pods).map(one)).buffer_unordered(at_once).try_collect().await?;
    println!("soak: a storm of {pods} pods, {at_once} at once, {:.0?}", begin.elapsed());
    for (index, call) in ["RunPodSandbox", "CreateContainer and StartContainer", "removal"].into_iter().enumerate() {
        let mut sorted: Vec<_> = times.iter().map(|times| times[index]).collect();
        sorted.sort();
        let at = |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        let (median, most) = (at(50).unwrap_or_default(), at(99).unwrap_or_default());
        println!("soak: {call}: median {median:.1?}, p99 {most:.1?}, longest {:.1?}", at(100).unwrap_or_default());
    }
    Ok(())
}

/// Times one after the other.
struct Laps(Instant);

impl Laps {
    fn next(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}
