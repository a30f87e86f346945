//! A group's accounting, from the kernel's files into the protocol's message.
//!
//! A file that does not exist (its controller is off) leaves its fields zero; a word that is not understood is left out.

use std::path::Path;

use bulkhead_protocol::agent::{CpuStats, HugeTlbStats, IoStats, MemoryStats, PidsStats, Stats};
use bulkhead_protocol::guest::MAX_STATS_ENTRIES;

use super::Cgroup;
use super::values::{flat_keyed, number};

impl Cgroup {
    /// What the group has used so far.
    pub fn stats(&self) -> Stats {
        let text = |name: &str| std::fs::read_to_string(Path::new(&self.dir).join(name)).unwrap_or_default();
        Stats {
            cpu: Some(cpu(&text("cpu.stat"))).into(),
            memory: Some(memory(&text)).into(),
            pids: Some(PidsStats {
                current: single(&text("pids.current")),
                limit: single(&text("pids.max")),
                ..Default::default()
            })
            .into(),
            io: io(&text("io.stat")),
            huge_tlb: huge_tlb(&self.dir),
            ..Default::default()
        }
    }
}

/// A file with one value; 0 if there is none.
fn single(text: &str) -> u64 {
    number(text).unwrap_or(0)
}

fn cpu(text: &str) -> CpuStats {
    let mut stats = CpuStats::new();
    for (key, value) in flat_keyed(text) {
        match key {
            "usage_usec" => stats.usage_usec = value,
            "user_usec" => stats.user_usec = value,
            "system_usec" => stats.system_usec = value,
            "nr_periods" => stats.nr_periods = value,
            "nr_throttled" => stats.nr_throttled = value,
            "throttled_usec" => stats.throttled_usec = value,
            "nr_bursts" => stats.nr_bursts = value,
            "burst_usec" => stats.burst_usec = value,
            _ => {}
        }
    }
    stats
}

fn memory(text: &impl Fn(&str) -> String) -> MemoryStats {
    // Before the usage, of which its parts are taken off: both grow meanwhile.
    let stat = flat_keyed(&text("memory.stat")).map(|(key, value)| (key.to_owned(), value)).collect();
    let mut stats = MemoryStats {
        usage: single(&text("memory.current")),
        limit: single(&text("memory.max")),
        swap_usage: single(&text("memory.swap.current")),
        swap_limit: single(&text("memory.swap.max")),
        max_usage: single(&text("memory.peak")),
        swap_max_usage: single(&text("memory.swap.peak")),
        stat,
        ..Default::default()
    };
    for (key, value) in flat_keyed(&text("memory.events")) {
        match key {
            "low" => stats.low = value,
            "high" => stats.high = value,
            "max" => stats.max = value,
            "oom" => stats.oom = value,
            "oom_kill" => stats.oom_kill = value,
            "oom_group_kill" => stats.oom_group_kill = value,
            _ => {}
        }
    }
    stats
}

/// `io.stat`, a nested keyed file: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 ..." for each device.
fn io(text: &str) -> Vec<IoStats> {
    text.lines().filter_map(io_device).take(MAX_STATS_ENTRIES).collect()
}

fn io_device(line: &str) -> Option<IoStats> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut stats = IoStats { major: number(major)?, minor: number(minor)?, ..Default::default() };
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let Some(value) = number(value) else { continue };
        match key {
            "rbytes" => stats.rbytes = value,
            "wbytes" => stats.wbytes = value,
            "rios" => stats.rios = value,
            "wios" => stats.wios = value,
            _ => {}
        }
    }
    Some(stats)
}

/// `hugetlb.<page size>.current` and its siblings, for each page size that the kernel has. A directory with such a name is a
/// group that the container has made, of which there may be any number.
fn huge_tlb(dir: &Path) -> Vec<HugeTlbStats> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let files = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()));
    let names = files.filter_map(|entry| entry.file_name().into_string().ok());
    let sizes = names.filter_map(|name| {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        (!size.contains('.')).then(|| size.to_owned())
    });
    let stats = |page_size: String| {
        let text =
            |file: &str| std::fs::read_to_string(dir.join(format!("hugetlb.{page_size}.{file}"))).unwrap_or_default();
        let (current, max) = (single(&text("current")), single(&text("max")));
        let fail_count = flat_keyed(&text("events")).find(|(key, _)| *key == "max").map_or(0, |(_, count)| count);
        HugeTlbStats { page_size, current, max, fail_count, ..Default::default() }
    };
    let mut all: Vec<_> = sizes.map(stats).collect();
    all.sort_by(|a, b| a.page_size.cmp(&b.page_size));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_stat_is_read_by_key() {
        let stats =
            cpu("usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 5\nsomething_new 9\nthrottled_usec x\n");
        assert_eq!((stats.usage_usec, stats.user_usec, stats.system_usec, stats.nr_periods), (30, 20, 10, 5));
        assert_eq!(stats.throttled_usec, 0);
    }

    #[test]
    fn no_limit_is_the_largest_number() {
        let stats = memory(&|name: &str| {
            match name {
                "memory.current" => "4096\n",
                "memory.max" => "max\n",
                "memory.stat" => "anon 1\nfile 2\n",
                "memory.events" => "low 0\noom 2\noom_kill 1\n",
                _ => "",
            }
            .to_owned()
        });
        assert_eq!((stats.usage, stats.limit, stats.swap_limit, stats.oom_kill), (4096, u64::MAX, 0, 1));
        assert_eq!(stats.stat.get("file"), Some(&2));
    }

    #[test]
    fn huge_pages_are_counted_by_size() {
        let dir = tempfile::tempdir().unwrap();
        let files =
            [("2MB.current", "4194304"), ("2MB.max", "max"), ("2MB.events", "max 3"), ("2MB.rsvd.current", "9")];
        for (name, text) in files {
            std::fs::write(dir.path().join(format!("hugetlb.{name}")), text).unwrap();
        }
        std::fs::create_dir(dir.path().join("hugetlb.made by the container.current")).unwrap();
        let stats = huge_tlb(dir.path());
        assert_eq!(stats.len(), 1);
        let HugeTlbStats { page_size, current, max, fail_count, .. } = &stats[0];
        assert_eq!((page_size.as_str(), *current, *max, *fail_count), ("2MB", 4 << 20, u64::MAX, 3));
    }

    #[test]
    fn io_stat_has_one_entry_for_each_device() {
        let stats = io("254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=7\nnonsense\n");
        assert_eq!(stats.len(), 2);
        assert_eq!((stats[0].major, stats[0].wbytes, stats[0].wios), (254, 20, 2));
        assert_eq!((stats[1].minor, stats[1].rbytes), (16, 7));
        let many: String = (0..3000).map(|minor| format!("7:{minor} rbytes=1\n")).collect();
        assert_eq!(io(&many).len(), MAX_STATS_ENTRIES);
    }
}
