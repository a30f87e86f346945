//! A guest that asks for everything at once, for a minute (docs/negative-tests.md, 7): what its VMM and its shim need for
//! themselves stays what it was. The devices alone are flooded harder by the VMM's own test of that number, whose guest
//! programs the rings by hand; here the shim takes part, and containerd.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::guest_root::{self, privileged};
use bulkhead_e2e::processes::{Processes, descriptors, own_kib};
use bulkhead_e2e::{TestPod, on_node, sh};

/// How long it goes on.
const FLOOD: Duration = Duration::from_secs(60);

/// By how much either process may grow.
const MOST_KIB: u64 = 8 << 10;

/// By how many descriptors the shim may: an exec that is under way has some.
const MOST_DESCRIPTORS: usize = 32;

/// Each goes on until it is killed. The files of virtio-fs, and what is written to the log, are bounded: they cost the node, which
/// is charged to the pod, and not the two processes.
const FLOODS: [(&str, &str); 7] = [
    (
        "network",
        "while :; do head -c 200k /dev/zero | nc -u -w 1 $(route -n | awk '$1 == \"0.0.0.0\" { print $2 }') 9; done",
    ),
    (
        "fs",
        "mkdir -p /many; n=0; while :; do n=$(((n + 1) % 2000)); echo $n > /many/$n; cat /many/*0 /bin/busybox; rm -f /many/*9; ls -lR /many; done > /dev/null",
    ),
    ("fs-missing", "while :; do for n in 1 2 3 4 5 6 7 8 9; do test -e /missing-$n-$RANDOM; done; sync; done"),
    ("entropy", "while :; do cat /dev/hwrng; done > /dev/null"),
    ("console", "while :; do head -c 4k /dev/zero | tr '\\0' x; echo; done > /dev/console"),
    ("vsock", "while :; do escape vsock; done > /dev/null 2>&1"),
    ("log", "n=0; while [ $n -lt 2000 ]; do n=$((n + 1)); head -c 16k /dev/zero | tr '\\0' y > /proc/1/fd/1; done"),
];

/// A container that is out of memory again and again, each time an event.
fn hungry() -> v1::ContainerConfig {
    let mut config = sh("hungry", "while :; do sh -c 'x=x; while :; do x=$x$x; done'; done");
    config.linux.get_or_insert_default().resources =
        Some(v1::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() });
    config
}

/// The two processes' memory in KiB.
fn memory(pod: &Processes) -> Result<[u64; 2]> {
    Ok([own_kib(pod.vmm)?, own_kib(pod.shim)?])
}

/// Those that have ended of the floods that were begun.
async fn ended(pod: &TestPod, container: &str) -> Result<String> {
    let alive = "for flood in /tmp/*.pid; do kill -0 $(cat $flood) 2> /dev/null || basename $flood .pid; done";
    pod.sh(container, alive).await
}

#[test]
fn hostile_07_flood_of_everything_leaves_vmm_and_shim_flat() {
    on_node(async |node| {
        let pod = guest_root::pod(node, "flood").await?;
        let main = pod.run(privileged("main")).await?;
        let processes = Processes::of(&pod)?;
        let (before, open) = (memory(&processes)?, descriptors(processes.shim)?);
        for (name, script) in FLOODS {
            pod.sh(&main, &format!("cat > /tmp/{name} <<'the end'\n{script}\nthe end")).await?;
            let begin = format!("sh /tmp/{name} < /dev/null > /tmp/{name}.out 2>&1 & echo $! > /tmp/{name}.pid");
            pod.sh(&main, &begin).await?;
        }
        pod.run(hungry()).await?;
        let (begin, mut most, mut execs) = (Instant::now(), before, 0);
        while begin.elapsed() < FLOOD {
            // The kubelet goes on asking: exec probes and statistics.
            ensure!(pod.sh(&main, "echo alive").await? == "alive", "the pod does not answer");
            let stats = v1::ContainerStatsRequest { container_id: main.clone() };
            pod.cri().runtime().container_stats(stats).await.context("statistics")?;
            execs += 1;
            let now = memory(&processes)?;
            most = [most[0].max(now[0]), most[1].max(now[1])];
        }
        let ended = ended(&pod, &main).await?;
        ensure!(ended.is_empty() || ended == "log", "{ended:?} have not gone on");
        for (name, (before, most)) in ["VMM", "shim"].into_iter().zip(before.into_iter().zip(most)) {
            // tools/hostile reads this.
            let seconds = FLOOD.as_secs();
            println!("flood: {name} of a pod, {seconds} s, {execs} execs: {before} KiB before, at most {most}");
            ensure!(most < before + MOST_KIB, "{before} KiB have become {most}");
        }
        let now = descriptors(processes.shim)?;
        ensure!(now < open + MOST_DESCRIPTORS, "the shim had {open} descriptors open and has {now}");
        Ok(())
    });
}
