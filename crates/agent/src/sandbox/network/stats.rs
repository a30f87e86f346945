//! /proc/net/dev.

use bulkhead_protocol::agent::InterfaceStats;
use bulkhead_protocol::guest::MAX_STATS_ENTRIES;

/// The table of /proc/net/dev: two lines of headings, then name and sixteen counters. The kernel goes by age, so the pod's own
/// interfaces are before those that containers make.
pub(super) fn interfaces(table: &str) -> Vec<InterfaceStats> {
    let stats = table.lines().skip(2).filter_map(interface);
    stats.filter(|stats| stats.name != "lo").take(MAX_STATS_ENTRIES).collect()
}

fn interface(line: &str) -> Option<InterfaceStats> {
    let (name, counters) = line.rsplit_once(':')?;
    let counters: Vec<u64> = counters.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let counter = |column: usize| counters.get(column).copied();
    Some(InterfaceStats {
        name: name.trim().into(),
        rx_bytes: counter(0)?,
        rx_packets: counter(1)?,
        rx_errors: counter(2)?,
        rx_dropped: counter(3)?,
        tx_bytes: counter(8)?,
        tx_packets: counter(9)?,
        tx_errors: counter(10)?,
        tx_dropped: counter(11)?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_column() {
        let table = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  \
                     eth0: 100 2 3 4 0 0 0 0 500 6 7 8 0 0 0 0\n broken: 1 2\n";
        let stats = interfaces(table);
        assert_eq!(stats.len(), 1);
        assert_eq!((stats[0].name.as_str(), stats[0].rx_bytes, stats[0].rx_dropped), ("eth0", 100, 4));
        assert_eq!((stats[0].tx_bytes, stats[0].tx_errors, stats[0].tx_dropped), (500, 7, 8));
    }

    #[test]
    fn interfaces_that_a_container_makes_without_end_are_left_out() {
        let line = |name: String| format!("{name}: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n");
        let made = (0..3000).map(|n| line(format!("d{n}")));
        let table: String = ["\n\n".into(), line("eth0".into())].into_iter().chain(made).collect();
        let stats = interfaces(&table);
        assert_eq!((stats.len(), stats[0].name.as_str()), (MAX_STATS_ENTRIES, "eth0"));
    }
}
