//! Time limits in the time that the guest runs. The host keeps a guest whose pod has little CPU from running, for most of the
//! time: that time is stolen from the guest (proc(5), /proc/stat) and does not count.

use std::pin::pin;
use std::time::{Duration, Instant};

/// Most time that does not count. The host waits for less than two minutes in all.
const MAX_STOLEN: Duration = Duration::from_secs(55);

/// Ticks of the times in /proc/stat in a second, on every architecture that has KVM (USER_HZ).
const USER_HZ: u64 = 100;

/// Waits for an answer, until the guest has run for so long. `None` if it does not come.
pub async fn timeout<T>(limit: Duration, answer: impl Future<Output = T>) -> Option<T> {
    timeout_by(stolen, limit, answer).await
}

async fn timeout_by<T>(stolen: impl Fn() -> Duration, limit: Duration, answer: impl Future<Output = T>) -> Option<T> {
    let (begun, before) = (Instant::now(), stolen());
    let mut answer = pin!(answer);
    let mut allowed = limit;
    loop {
        let left = allowed.saturating_sub(begun.elapsed());
        if let Ok(answer) = tokio::time::timeout(left, &mut answer).await {
            return Some(answer);
        }
        // The kernel counts for each CPU.
        let lost = stolen().saturating_sub(before).min(begun.elapsed()).min(MAX_STOLEN);
        if limit + lost <= begun.elapsed() {
            return None;
        }
        allowed = limit + lost;
    }
}

/// What has been stolen from all CPUs together.
fn stolen() -> Duration {
    std::fs::read_to_string("/proc/stat").map(|text| stolen_by(&text)).unwrap_or_default()
}

/// The eighth number of the line of all CPUs: after user, nice, system, idle, iowait, irq and softirq.
fn stolen_by(stat: &str) -> Duration {
    let line = stat.lines().next().and_then(|line| line.strip_prefix("cpu "));
    let ticks = line.and_then(|line| line.split_whitespace().nth(7)?.parse::<u64>().ok()).unwrap_or(0);
    Duration::from_millis(ticks.saturating_mul(1000 / USER_HZ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn what_is_stolen_does_not_count_and_what_is_not_does() {
        let begun = Instant::now();
        assert_eq!(timeout_by(|| Duration::ZERO, SHORT, std::future::pending::<()>()).await, None);
        let slow = tokio::time::sleep(SHORT * 5);
        assert_eq!(timeout_by(|| begun.elapsed() * 9 / 10, SHORT, slow).await, Some(()));
        assert_eq!(timeout_by(|| begun.elapsed() / 2, SHORT, std::future::pending::<()>()).await, None);
    }

    #[test]
    fn stolen_time_is_that_of_all_cpus() {
        let stat = "cpu  10 0 20 3000 5 0 1 250 0 0\ncpu0 10 0 20 3000 5 0 1 99 0 0\n";
        assert_eq!(stolen_by(stat), Duration::from_millis(2500));
        assert_eq!((stolen_by(""), stolen_by("cpu  1 2")), (Duration::ZERO, Duration::ZERO));
    }
}
