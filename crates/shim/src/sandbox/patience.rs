//! How long one call of containerd's may wait for the guest and the VMM in all.
//!
//! Whatever they are asked for has a deadline of its own, but a call asks for several things, and the kubelet waits two minutes
//! for all of them. Beyond that nobody learns what the call came to.
//!
//! The VMM is in the pod's control group, under the pod's limit of CPU. A guest that the kernel keeps from running does not
//! hang: time in which the pod was throttled does not count (cgroup-v2.rst, cpu.stat), up to what the kubelet waits.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::OnceLock;
use std::time::Duration;

use tokio::time::Instant;

use super::cgroup::ROOT;

/// How long a call may wait at the most, however the pod is throttled. The kubelet gives two minutes.
const MOST: Duration = Duration::from_secs(110);

/// The control group of the pod, of which a daemon has one.
static POD: OnceLock<PathBuf> = OnceLock::new();

tokio::task_local! {
    /// What the call that this task works on has.
    static CALL: Budget;
}

/// Time that runs only while the pod may.
#[derive(Clone, Copy, Debug)]
struct Budget {
    begun: Instant,
    whole: Duration,
    /// How long the pod had been throttled when this began.
    throttled: Duration,
    /// Not beyond this in any case.
    most: Duration,
}

impl Budget {
    fn begin(whole: Duration, most: Duration, throttled: Duration) -> Self {
        Self { begun: Instant::now(), whole, throttled, most }
    }

    /// What is left of it, for a pod that has been throttled so long by now.
    fn left(&self, throttled: Duration) -> Duration {
        let elapsed = self.begun.elapsed();
        // The kernel counts for each CPU.
        let lost = throttled.saturating_sub(self.throttled).min(elapsed);
        let whole = self.whole.saturating_add(lost).min(self.most.max(self.whole));
        whole.saturating_sub(elapsed)
    }
}

/// From now on time in which this control group, or one above it, is throttled does not count.
pub fn follow(cgroup: &Path) {
    let _ = POD.set(cgroup.to_path_buf());
}

fn throttled() -> Duration {
    POD.get().map(|cgroup| throttled_in(cgroup)).unwrap_or_default()
}

/// How long a control group has been throttled, by its own limit and those above it. One that cannot be read was not.
fn throttled_in(cgroup: &Path) -> Duration {
    let read = |dir: &Path| std::fs::read_to_string(dir.join("cpu.stat")).unwrap_or_default();
    let groups = cgroup.ancestors().take_while(|dir| dir.starts_with(ROOT) || *dir == cgroup);
    let of =
        |text: String| text.lines().find_map(|line| line.strip_prefix("throttled_usec ")?.trim().parse::<u64>().ok());
    Duration::from_micros(groups.map(read).filter_map(of).fold(0, u64::saturating_add))
}

/// Runs a call, or a part of one, whose questions wait no longer than that taken together. Tasks that it spawns are not part of it.
pub async fn within<T>(whole: Duration, call: impl Future<Output = T>) -> T {
    let throttled = throttled();
    let outer = CALL.try_with(|outer| (outer.left(throttled), outer.most.saturating_sub(outer.begun.elapsed())));
    let (left, most) = outer.unwrap_or((whole, MOST));
    CALL.scope(Budget::begin(whole.min(left), most, throttled), call).await
}

/// What is left of the call's patience, at most `deadline`.
pub fn left(deadline: Duration) -> Duration {
    CALL.try_with(|call| call.left(throttled())).map_or(deadline, |left| left.min(deadline))
}

/// Waits for an answer of the guest's or the VMM's: for `deadline` at most, and not longer than the call has. An error is how
/// long that was.
pub async fn timeout<T>(deadline: Duration, answer: impl Future<Output = T>) -> Result<T, Duration> {
    timeout_by(throttled, deadline, answer).await
}

async fn timeout_by<T>(
    throttled: impl Fn() -> Duration,
    deadline: Duration,
    answer: impl Future<Output = T>,
) -> Result<T, Duration> {
    let own = Budget::begin(deadline, MOST, throttled());
    let mut answer = pin!(answer);
    loop {
        let now = throttled();
        let of_call = CALL.try_with(|call| call.left(now)).unwrap_or(Duration::MAX);
        let left = own.left(now).min(of_call);
        if let Ok(answer) = tokio::time::timeout(left, &mut answer).await {
            return Ok(answer);
        }
        if left.is_zero() {
            let waited = own.begun.elapsed();
            // For people to read.
            let seconds = Duration::from_secs(waited.as_secs());
            return Err(if seconds.is_zero() { waited } else { seconds });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn questions_share_the_patience_of_their_call() {
        assert_eq!(left(60 * SECOND), 60 * SECOND, "outside of a call");
        within(90 * SECOND, async {
            assert_eq!(left(60 * SECOND), 60 * SECOND);
            tokio::time::sleep(50 * SECOND).await;
            assert_eq!(left(60 * SECOND), 40 * SECOND);
            within(60 * SECOND, async { assert_eq!(left(60 * SECOND), 40 * SECOND, "a part has no more") }).await;
            within(10 * SECOND, async { assert_eq!(left(60 * SECOND), 10 * SECOND) }).await;
            tokio::time::sleep(50 * SECOND).await;
            assert_eq!(left(60 * SECOND), Duration::ZERO);
            tokio::spawn(async { assert_eq!(left(60 * SECOND), 60 * SECOND) }).await.unwrap();
        })
        .await;
    }

    /// A pod that may run for a tenth of the time.
    #[tokio::test(start_paused = true)]
    async fn time_in_which_the_pod_was_throttled_does_not_count_up_to_what_the_kubelet_waits() {
        let begun = Instant::now();
        let throttled = || begun.elapsed() * 9 / 10;
        let slow = timeout_by(throttled, 5 * SECOND, tokio::time::sleep(45 * SECOND)).await;
        assert!(slow.is_ok(), "it had 4.5 s: {slow:?}");
        let hung = timeout_by(throttled, 5 * SECOND, std::future::pending::<()>()).await.unwrap_err();
        assert!((49 * SECOND..=51 * SECOND).contains(&hung), "{hung:?}");
        let long = timeout_by(throttled, 60 * SECOND, std::future::pending::<()>()).await;
        assert_eq!(long, Err(MOST));
        let free = timeout_by(|| Duration::ZERO, 5 * SECOND, std::future::pending::<()>()).await;
        assert_eq!(free, Err(5 * SECOND));
    }

    #[test]
    fn throttling_is_read_where_there_is_any() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(throttled_in(dir.path()), Duration::ZERO);
        let text = "usage_usec 9\nnr_throttled 3\nthrottled_usec 2500000\nnr_bursts 0\n";
        std::fs::write(dir.path().join("cpu.stat"), text).unwrap();
        assert_eq!(throttled_in(dir.path()), Duration::from_millis(2500));
    }
}
