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

/// How often each flood must have come, on an emulated node.
const LEAST_ROUNDS: usize = 2;

/// By how many descriptors the shim may: an exec that is under way has some.
const MOST_DESCRIPTORS: usize = 32;

/// What each does again and again until it is killed; a round that fails is the last. Files and lines of the log are bounded:
/// they cost the node, and not the two processes.
const FLOODS: [(&str, &str); 7] = [
    (
        "network",
        "to=$(route -n | awk '$1 == \"0.0.0.0\" { print $2 }') && test -n \"$to\" && \
         for n in $(seq 10); do head -c 1m /dev/zero | nc -u -w 1 $to 9 & done; wait",
    ),
    (
        "files",
        "mkdir -p /many && touch /many/7 && for n in $(seq 30); do echo $n > /many/$((RANDOM % 1000)); done && \
         cat /many/*7 /bin/busybox && ls -l /many && rm -f /many/*9 && sync",
    ),
    ("names", "for n in $(seq 200); do ! test -e /missing-$n-$RANDOM || exit 1; done"),
    ("entropy", "head -c 64k /dev/hwrng"),
    ("console", "head -c 16k /dev/zero | tr '\\0' x > /dev/hvc0"),
    ("vsock", "escape vsock"),
    ("log", "test $(cat /tmp/log.rounds | wc -l) -gt 2000 || head -c 16k /dev/zero | tr '\\0' y > /proc/1/fd/1"),
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

/// Begins to do something again and again.
async fn begin(pod: &TestPod, container: &str, name: &str, round: &str) -> Result<()> {
    pod.sh(container, &format!("cat > /tmp/{name} <<'the end'\n{round}\nthe end")).await?;
    let again = format!(
        "while sh -e /tmp/{name} < /dev/null > /dev/null 2> /tmp/{name}.error; do echo >> /tmp/{name}.rounds; done; \
         echo ended >> /tmp/{name}.end; cat /tmp/{name}.error >> /tmp/{name}.end"
    );
    pod.sh(container, &format!("touch /tmp/{name}.rounds; ({again}) > /dev/null 2>&1 &")).await.map(drop)
}

/// How often it was done; what it said if it has failed.
async fn rounds(pod: &TestPod, container: &str, name: &str) -> Result<(usize, String)> {
    let told = pod.sh(container, &format!("cat /tmp/{name}.end 2> /dev/null; wc -l < /tmp/{name}.rounds")).await?;
    let (error, rounds) = told.rsplit_once('\n').unwrap_or(("", &told));
    Ok((rounds.parse()?, error.to_owned()))
}

#[test]
fn hostile_07_flood_of_everything_leaves_vmm_and_shim_flat() {
    on_node(async |node| {
        let pod = guest_root::pod(node, "flood").await?;
        let main = pod.run(privileged("main")).await?;
        let processes = Processes::of(&pod)?;
        let (before, open) = (memory(&processes)?, descriptors(processes.shim)?);
        for (name, round) in FLOODS {
            begin(&pod, &main, name, round).await?;
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
        for (name, _) in FLOODS {
            let (rounds, error) = rounds(&pod, &main, name).await?;
            println!("flood: {rounds} rounds of {name} {error}");
            ensure!(rounds >= LEAST_ROUNDS && error.is_empty(), "{name} was done {rounds} times: {error}");
        }
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
