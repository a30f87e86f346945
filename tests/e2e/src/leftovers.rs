//! What "nothing is left" means: the one checker that every suite uses.
//!
//! It lists everything of a pod that lives outside containerd's own database: processes, network interfaces, traffic
//! control, addresses, mounts, sockets, run directories, bundles, cgroups, network namespaces. A test takes the list
//! before and compares after; what is there in addition is a leak.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Directories whose entries belong to running pods.
const DIRECTORIES: [&str; 6] = [
    "/run/bulkhead",
    "/run/containerd/s",
    "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "/run/containerd/io.containerd.runtime.v2.task/default",
    "/run/netns",
    "/var/run/netns",
];

/// Names of the processes that a pod brings.
const PROCESSES: [&str; 4] = ["bulkhead-vmm", "bulkhead-liar", "containerd-shim", "bulkhead-agent"];

/// How long leftovers may take to vanish after the CRI has said that the pod is removed: processes exit, and lazily
/// unmounted file systems go, a moment after the call that ends them; on an emulated node a moment is a second.
const SETTLE: Duration = Duration::from_secs(10);

/// Everything on the node that a pod could leave behind.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// Lists what is there.
    pub fn find() -> Result<Self> {
        let mut found = BTreeSet::new();
        processes(&mut found)?;
        mounts(&mut found)?;
        interfaces(&mut found)?;
        cgroups(Path::new("/sys/fs/cgroup"), 0, &mut found);
        leases(&mut found);
        for directory in DIRECTORIES {
            entries(Path::new(directory), 0, &mut found);
        }
        Ok(Self(found))
    }

    /// Asserts that nothing has come since; gives what is on its way out a bounded time.
    pub fn assert_nothing_more(&self) -> Result<()> {
        let deadline = std::time::Instant::now() + SETTLE;
        loop {
            let now = Self::find()?;
            let more: Vec<_> = now.0.difference(&self.0).cloned().collect();
            if more.is_empty() {
                return Ok(());
            }
            if std::time::Instant::now() > deadline {
                bail!("left behind:\n  {}", more.join("\n  "));
            }
            // The kernel has no event for "anything of all this is gone".
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn processes(found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/proc").context("cannot list /proc")?.flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let Ok(command) = fs::read(entry.path().join("cmdline")) else { continue };
        let program = String::from_utf8_lossy(command.split(|&byte| byte == 0).next().unwrap_or_default()).into_owned();
        let name = program.rsplit('/').next().unwrap_or_default();
        if PROCESSES.iter().any(|prefix| name.starts_with(prefix)) {
            found.insert(format!("process {pid} {name}"));
        }
    }
    Ok(())
}

fn mounts(found: &mut BTreeSet<String>) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    // ip-netns(8) makes its directory a mount at its first use, and keeps it.
    found.extend(points.filter(|&point| point != "/run/netns").map(|point| format!("mount {point}")));
    Ok(())
}

fn interfaces(found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir("/sys/class/net").context("cannot list the network interfaces")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // The bridge belongs to the CNI configuration and stays.
        if name != "cni0" {
            found.insert(format!("interface {name}"));
        }
    }
    Ok(())
}

/// Addresses that CNI's host-local plugin has given: a file for each, in a directory for each network.
fn leases(found: &mut BTreeSet<String>) {
    for network in fs::read_dir("/run/node/cni/networks").into_iter().flatten().flatten() {
        for lease in fs::read_dir(network.path()).into_iter().flatten().flatten() {
            if lease.file_name().to_str().is_some_and(|name| name.parse::<std::net::IpAddr>().is_ok()) {
                found.insert(format!("address {}", lease.path().display()));
            }
        }
    }
}

/// cgroups down to the depth at which the kubelet's pods and their containers are.
fn cgroups(directory: &Path, depth: usize, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if depth < 5 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // Parents that containerd makes once and keeps.
            if !matches!(entry.file_name().to_str(), Some("k8s.io" | "default")) {
                found.insert(format!("cgroup {}", entry.path().display()));
            }
            cgroups(&entry.path(), depth + 1, found);
        }
    }
}

fn entries(directory: &Path, depth: usize, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // /run/bulkhead/<namespace> stays; what is in it must go.
        if !(directory == Path::new("/run/bulkhead") && is_directory) {
            found.insert(format!("file {}", entry.path().display()));
        }
        if is_directory && depth < 1 {
            entries(&entry.path(), depth + 1, found);
        }
    }
}
