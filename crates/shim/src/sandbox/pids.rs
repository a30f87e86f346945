//! The pod's limit of tasks: shim and VMM are in its cgroup with all of their threads, and KVM makes one more for each VM
//! (Linux 6.14 and later). Where there is no room for that one, the VM ends; so whoever runs the node is told before.

use std::path::{Path, PathBuf};

use super::Cgroup;

/// The cgroup that leaves the least room.
#[derive(Debug, PartialEq, Eq)]
struct Tightest {
    dir: PathBuf,
    limit: u64,
    room: u64,
}

/// Warns if the limit of the pod's cgroup, or of one above it, leaves no room for one more task.
pub fn warn_without_room(cgroup: Option<&Cgroup>, vmm: u32) {
    let groups = cgroup.into_iter().flat_map(Cgroup::with_those_above);
    let Some(Tightest { dir, limit, room: 0 }) = tightest(groups) else { return };
    let status = std::fs::read_to_string(format!("/proc/{vmm}/status")).unwrap_or_default();
    tracing::warn!(
        cgroup = %dir.display(),
        "the pod's limit of tasks leaves no room: pids.max is {limit}, the VMM has {} threads, and KVM (Linux 6.14 and later) \
         and the shim need more at times; raise the kubelet's podPidsLimit",
        threads(&status)
    );
}

/// Of the groups that have a limit (cgroup-v2.rst, pids.max and pids.current).
fn tightest<'a>(groups: impl Iterator<Item = &'a Path>) -> Option<Tightest> {
    let number = |dir: &Path, name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    let of_group = |dir: &Path| {
        let limit = number(dir, "pids.max")?;
        // Processes that are moved in are not stopped by the limit, so that there may be more than it allows.
        let room = limit.saturating_sub(number(dir, "pids.current")?);
        Some(Tightest { dir: dir.to_path_buf(), limit, room })
    };
    groups.filter_map(of_group).min_by_key(|group| group.room)
}

/// Threads of a process (proc_pid_status(5)).
fn threads(status: &str) -> u64 {
    status.lines().find_map(|line| line.strip_prefix("Threads:")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_with_the_least_room_is_found_whether_it_is_the_pods_or_one_above() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        std::fs::create_dir(&pod).unwrap();
        let write = |dir: &Path, max: &str, current: &str| {
            std::fs::write(dir.join("pids.max"), max).unwrap();
            std::fs::write(dir.join("pids.current"), current).unwrap();
        };
        let found = || tightest(pod.ancestors().take(2));
        assert_eq!(found(), None);
        write(&pod, "max\n", "40\n");
        assert_eq!(found(), None, "no limit");
        write(dir.path(), "100\n", "60\n");
        assert_eq!(found(), Some(Tightest { dir: dir.path().into(), limit: 100, room: 40 }));
        write(&pod, "30\n", "40\n");
        assert_eq!(found(), Some(Tightest { dir: pod.clone(), limit: 30, room: 0 }));
    }

    #[test]
    fn threads_are_those_of_the_status() {
        assert_eq!(threads("Name:\tbulkhead-vmm\nThreads:\t27\nSigQ:\t0/1\n"), 27);
        assert_eq!(threads(""), 0);
    }
}
