//! What a pod uses of the node, by the cgroup that its VM is in (Linux: Documentation/admin-guide/cgroup-v2.rst).

use std::collections::HashMap;
use std::path::Path;

use bulkhead_protocol::agent::{CpuStats, MemoryStats, PidsStats, Stats};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use super::{StatsError, empty, pack};
use crate::sandbox::Cgroup;

/// The numbers of the cgroup that is noted in `note`; none where the pod has no cgroup.
pub fn of_host_cgroup(note: &Path) -> Result<Any, StatsError> {
    match Cgroup::noted(note) {
        Some(cgroup) => pack(read(cgroup.path())),
        None => empty(),
    }
}

/// Reads a cgroup. A file that is absent belongs to a controller that the node does not use, and counts nothing.
fn read(dir: &Path) -> Stats {
    let text = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap_or_default();
    let number = |name: &str| match text(name).trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    };
    let cpu = table(&text("cpu.stat"));
    let of_cpu = |key: &str| cpu.get(key).copied().unwrap_or(0);
    let mut stats = Stats::new();
    stats.cpu = MessageField::some(CpuStats {
        usage_usec: of_cpu("usage_usec"),
        user_usec: of_cpu("user_usec"),
        system_usec: of_cpu("system_usec"),
        nr_periods: of_cpu("nr_periods"),
        nr_throttled: of_cpu("nr_throttled"),
        throttled_usec: of_cpu("throttled_usec"),
        ..CpuStats::default()
    });
    stats.memory = MessageField::some(MemoryStats {
        usage: number("memory.current"),
        limit: number("memory.max"),
        max_usage: number("memory.peak"),
        stat: table(&text("memory.stat")),
        ..MemoryStats::default()
    });
    stats.pids = MessageField::some(PidsStats {
        current: number("pids.current"),
        limit: number("pids.max"),
        ..PidsStats::default()
    });
    stats
}

/// Lines of a key and a number.
fn table(text: &str) -> HashMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_is_read_and_what_is_missing_counts_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("cpu.stat"), "usage_usec 70\nuser_usec 40\nsystem_usec 30\n").unwrap();
        std::fs::write(dir.path().join("memory.current"), "4096\n").unwrap();
        std::fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        std::fs::write(dir.path().join("memory.stat"), "anon 12\ninactive_file 5\n").unwrap();
        let stats = read(dir.path());
        assert_eq!((stats.cpu.usage_usec, stats.cpu.system_usec), (70, 30));
        assert_eq!((stats.memory.usage, stats.memory.limit, stats.memory.stat["inactive_file"]), (4096, u64::MAX, 5));
        assert_eq!(stats.pids.current, 0);
    }
}
