//! How much memory the host has for a pod that wants more: what is free on the node, and in the pod's cgroup and those above
//! it. A guest that has no more than that ends in an out-of-memory kill of its own, and not in one of the host's.

use std::path::Path;

use super::Cgroup;

/// What stays free in a cgroup, in MiB: for the shim, for what the VMM needs beside its guest's memory, and for what the kernel
/// does for both.
const IN_CGROUP: u64 = 64;

/// The part of the node's memory that stays free: a kubelet evicts pods before there is nothing left.
const OF_NODE: u64 = 16;

/// MiB that a pod's guest may have in all: what is the host's already, and as much more as there is.
pub fn most_mib(cgroup: Option<&Cgroup>, vmm: u32) -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let statm = std::fs::read_to_string(format!("/proc/{vmm}/statm")).unwrap_or_default();
    let groups = cgroup.into_iter().flat_map(Cgroup::with_those_above);
    let rooms = groups.filter_map(in_group).chain(on_node(&meminfo));
    rooms.min().map_or(0, |room| resident_mib(&statm).saturating_add(room))
}

/// What a process has in memory (proc_pid_statm(5)).
fn resident_mib(statm: &str) -> u64 {
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(0);
    pages.saturating_mul(page) >> 20
}

/// What the node can give without swapping (proc_meminfo(5)).
fn on_node(meminfo: &str) -> Option<u64> {
    let field = |name| {
        meminfo.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
    };
    Some((field("MemAvailable:")?.saturating_sub(field("MemTotal:")? / OF_NODE)) >> 10)
}

/// What a group can have beside what it has and cannot give back; `None` without a limit.
fn in_group(group: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    let most = number("memory.max")?;
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let of_files = stat.lines().filter_map(|line| {
        let (key, bytes) = line.split_once(' ')?;
        if ["active_file", "inactive_file"].contains(&key) { bytes.parse::<u64>().ok() } else { None }
    });
    let used = number("memory.current")?.saturating_sub(of_files.sum());
    Some((most.saturating_sub(used) >> 20).saturating_sub(IN_CGROUP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_keeps_a_part_for_itself() {
        let meminfo =
            |available: u64| format!("MemTotal: {} kB\nMemFree: 1 kB\nMemAvailable: {available} kB\n", 8 << 20);
        assert_eq!(on_node(&meminfo(2 << 20)), Some(2048 - 512));
        assert_eq!(on_node(&meminfo(1)), Some(0));
        assert_eq!(on_node(""), None);
    }

    #[test]
    fn group_has_room_for_what_it_can_still_have_and_for_files_that_it_can_drop() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(in_group(dir.path()), None);
        write("memory.max", "max\n");
        write("memory.current", &format!("{}\n", 300 << 20));
        assert_eq!(in_group(dir.path()), None);
        write("memory.max", &format!("{}\n", 1 << 30));
        assert_eq!(in_group(dir.path()), Some(1024 - 300 - 64));
        write("memory.stat", &format!("anon 5\nfile 7\ninactive_file {}\nactive_file {}\n", 60 << 20, 40 << 20));
        assert_eq!(in_group(dir.path()), Some(1024 - 200 - 64));
        write("memory.max", "4096\n");
        assert_eq!(in_group(dir.path()), Some(0));
    }

    #[test]
    fn resident_pages_are_the_second_number() {
        assert_eq!(resident_mib("1000000 25600 300 1 0 9 0\n"), 100);
        assert_eq!(resident_mib(""), 0);
    }
}
