//! How long the kernel has kept the pod from running (cgroup-v2.rst, cpu.stat).

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// The pod's control group and those above it. A daemon has one pod.
static GROUPS: OnceLock<Vec<PathBuf>> = OnceLock::new();

/// From now on time in which one of these control groups is throttled is not the pod's.
pub fn follow(groups: Vec<PathBuf>) {
    let _ = GROUPS.set(groups);
}

/// How long the pod has been throttled so far, by the limits of all its groups together; nothing if there is no pod. Groups above
/// the pod's were there before it, so this is no little number at first.
pub(super) fn throttled() -> Option<Duration> {
    GROUPS.get().map(|groups| throttled_in(groups))
}

/// A group that cannot be read was not throttled.
fn throttled_in(groups: &[PathBuf]) -> Duration {
    let read = |dir: &PathBuf| std::fs::read_to_string(dir.join("cpu.stat")).unwrap_or_default();
    let of =
        |text: String| text.lines().find_map(|line| line.strip_prefix("throttled_usec ")?.trim().parse::<u64>().ok());
    Duration::from_micros(groups.iter().map(read).filter_map(of).fold(0, u64::saturating_add))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throttling_is_read_where_there_is_any() {
        let (pod, above) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let groups = [pod.path().to_path_buf(), above.path().to_path_buf()];
        assert_eq!(throttled_in(&groups), Duration::ZERO);
        let text = |usec| format!("usage_usec 9\nnr_throttled 3\nthrottled_usec {usec}\nnr_bursts 0\n");
        std::fs::write(pod.path().join("cpu.stat"), text(2_500_000)).unwrap();
        assert_eq!(throttled_in(&groups), Duration::from_millis(2500));
        std::fs::write(above.path().join("cpu.stat"), text(500_000)).unwrap();
        assert_eq!(throttled_in(&groups), Duration::from_secs(3));
    }
}
