//! What "nothing is left" means: the one checker that every suite uses.
//!
//! It lists everything of a pod that lives outside containerd's own database: processes (zombies too), KVM's VMs, addresses that
//! CNI has given, sockets, run directories, bundles, fifos, shared memory, cgroups, network namespaces, and descriptors of
//! containerd. A test takes the list before and compares after; what is there in addition is a leak. Taps and redirects are in
//! the pod's network namespace, and go with it at the latest. Beside it what a node has without pods is compared both ways
//! ([`crate::node_state`]).

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::containerd;
use crate::node_state::{NodeState, Sysctls};

/// Directories whose entries belong to running pods.
const DIRECTORIES: [&str; 13] = [
    "/dev/shm",
    // A directory for each VM, where debugfs is mounted (Linux: Documentation/virt/kvm/, virt/kvm/kvm_main.c).
    "/sys/kernel/debug/kvm",
    "/run/bulkhead",
    "/run/containerd/fifo",
    "/run/containerd/io.containerd.grpc.v1.cri/containers",
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "/run/node/containerd/io.containerd.grpc.v1.cri/containers",
    "/run/node/containerd/io.containerd.grpc.v1.cri/sandboxes",
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

/// Connections that containerd may have more than before: its clients' and its own, which close when it finds the time.
const CONNECTIONS: usize = 8;

/// Everything on the node that a pod could leave behind or change.
#[derive(Clone, Debug)]
pub struct Before {
    leftovers: Leftovers,
    sysctls: Sysctls,
}

impl Before {
    /// Looks at the node.
    pub fn look() -> Result<Self> {
        Ok(Self { leftovers: Leftovers::find()?, sysctls: Sysctls::look() })
    }

    /// Asserts that nothing has come or changed since; gives what is on its way out a bounded time.
    pub fn assert_as_it_was(&self) -> Result<()> {
        self.leftovers.assert_nothing_more()?;
        let changed = Sysctls::look().changes_since(&self.sysctls);
        ensure!(changed.is_empty(), "changed on the node:\n  {}", changed.join("\n  "));
        Ok(())
    }
}

/// What of that goes away by and by.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Leftovers {
    found: BTreeSet<String>,
    containerd: Option<(u32, usize)>,
    node: NodeState,
}

impl Leftovers {
    /// Lists what is there.
    fn find() -> Result<Self> {
        let mut found = BTreeSet::new();
        processes(&mut found)?;
        cgroups(Path::new("/sys/fs/cgroup"), 0, &mut found);
        leases(&mut found);
        for directory in DIRECTORIES {
            entries(Path::new(directory), 0, &mut found);
        }
        let containerd = containerd::pid().ok().map(|pid| (pid, descriptors(pid, &mut found)));
        Ok(Self { found, containerd, node: NodeState::look()? })
    }

    /// What is there in addition to what was before, and what of the node is different.
    fn more_than(&self, before: &Self) -> Vec<String> {
        let mut more: Vec<_> = self.found.difference(&before.found).cloned().collect();
        more.extend(self.node.changes_since(&before.node));
        // One that was started again has all of its connections anew.
        if let (Some((pid, now)), Some((same, then))) = (self.containerd, before.containerd)
            && pid == same
            && now > then + CONNECTIONS
        {
            more.push(format!("{now} open connections of containerd, which had {then}"));
        }
        more
    }

    fn assert_nothing_more(&self) -> Result<()> {
        let deadline = std::time::Instant::now() + SETTLE;
        loop {
            let more = Self::find()?.more_than(self);
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
        // A process that nobody has waited for has only its name, cut to 15 bytes.
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let name = if program.is_empty() { comm.trim() } else { program.rsplit('/').next().unwrap_or_default() };
        if PROCESSES.iter().any(|prefix| name.starts_with(prefix)) {
            found.insert(format!("process {pid} {name}"));
        }
    }
    Ok(())
}

/// Descriptors of a process that lead to a file, a fifo or a namespace. Answers how many others it has.
fn descriptors(pid: u32, found: &mut BTreeSet<String>) -> usize {
    let mut others = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        match target.split_once(':') {
            Some(("socket" | "pipe" | "anon_inode", _)) => others += 1,
            _ => drop(found.insert(format!("descriptor of containerd to {target}"))),
        }
    }
    others
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
