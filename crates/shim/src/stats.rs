//! A container's numbers in the form that the CRI reads: `io.containerd.cgroups.v2.Metrics`
//! (containerd/cgroups: cgroup2/stats/metrics.proto).

mod host;

use std::collections::HashMap;

use bulkhead_protocol::agent::{HugeTlbStats, InterfaceStats, IoStats, MemoryStats, Stats};
use bulkhead_protocol::guest::MAX_STATS_ENTRIES;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

pub use host::of_host_cgroup;

const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Longest name of an interface (IFNAMSIZ), and more than a page size has.
const MAX_NAME: usize = 16;

/// The numbers of something in which nothing runs.
pub fn empty() -> Result<Any, StatsError> {
    encode(&Metrics::new())
}

/// Packs the agent's numbers.
pub fn pack(stats: Stats) -> Result<Any, StatsError> {
    let memory = stats.memory.unwrap_or_default();
    let cpu = stats.cpu.unwrap_or_default();
    let pids = stats.pids.unwrap_or_default();
    let metrics = Metrics {
        pids: MessageField::some(PidsStat { current: pids.current, limit: pids.limit, ..PidsStat::default() }),
        cpu: MessageField::some(CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            nr_bursts: cpu.nr_bursts,
            burst_usec: cpu.burst_usec,
            ..CPUStat::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: memory.low,
            high: memory.high,
            max: memory.max,
            oom: memory.oom,
            oom_kill: memory.oom_kill,
            oom_group_kill: memory.oom_group_kill,
            ..MemoryEvents::default()
        }),
        memory: MessageField::some(memory_stat(&memory)),
        io: MessageField::some(IOStat {
            usage: stats.io.iter().take(MAX_STATS_ENTRIES).map(io_entry).collect(),
            ..IOStat::default()
        }),
        hugetlb: stats.huge_tlb.into_iter().take(MAX_STATS_ENTRIES).map(huge_tlb_stat).collect(),
        network: stats.network.into_iter().take(MAX_STATS_ENTRIES).map(network_stat).collect(),
        ..Metrics::default()
    };
    encode(&metrics)
}

fn encode(metrics: &Metrics) -> Result<Any, StatsError> {
    let value = metrics.write_to_bytes().map_err(StatsError::Encode)?;
    Ok(Any { type_url: TYPE_URL.to_owned(), value, ..Any::default() })
}

fn memory_stat(memory: &MemoryStats) -> MemoryStat {
    let stat: &HashMap<String, u64> = &memory.stat;
    let get = |key: &str| stat.get(key).copied().unwrap_or(0);
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: get("workingset_refault_anon").saturating_add(get("workingset_refault_file")),
        workingset_activate: get("workingset_activate_anon").saturating_add(get("workingset_activate_file")),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        usage: memory.usage,
        usage_limit: memory.limit,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit,
        max_usage: memory.max_usage,
        swap_max_usage: memory.swap_max_usage,
        ..MemoryStat::default()
    }
}

fn io_entry(io: &IoStats) -> IOEntry {
    IOEntry {
        major: io.major,
        minor: io.minor,
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..IOEntry::default()
    }
}

fn huge_tlb_stat(pool: HugeTlbStats) -> HugeTlbStat {
    HugeTlbStat {
        current: pool.current,
        max: pool.max,
        pagesize: pool.page_size.chars().take(MAX_NAME).collect(),
        failcnt: pool.fail_count,
        ..HugeTlbStat::default()
    }
}

fn network_stat(interface: InterfaceStats) -> NetworkStat {
    NetworkStat {
        name: interface.name.chars().take(MAX_NAME).collect(),
        rx_bytes: interface.rx_bytes,
        rx_packets: interface.rx_packets,
        rx_errors: interface.rx_errors,
        rx_dropped: interface.rx_dropped,
        tx_bytes: interface.tx_bytes,
        tx_packets: interface.tx_packets,
        tx_errors: interface.tx_errors,
        tx_dropped: interface.tx_dropped,
        ..NetworkStat::default()
    }
}

/// Numbers cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// As `Metrics`.
    #[error("the guest's numbers cannot be encoded")]
    Encode(#[source] protobuf::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_arrive_where_the_cri_reads_them() {
        let mut stats = Stats::new();
        stats.memory = MessageField::some(MemoryStats {
            usage: 7,
            oom_kill: 1,
            stat: [("inactive_file".to_owned(), 3)].into(),
            ..MemoryStats::default()
        });
        stats.network = vec![InterfaceStats { name: "x".repeat(100), ..InterfaceStats::default() }; 100];
        let any = pack(stats).unwrap();
        assert_eq!(any.type_url, TYPE_URL);
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((metrics.memory.usage, metrics.memory.inactive_file, metrics.memory_events.oom_kill), (7, 3, 1));
        assert_eq!((metrics.network.len(), metrics.network[0].name.len()), (MAX_STATS_ENTRIES, MAX_NAME));
    }
}
