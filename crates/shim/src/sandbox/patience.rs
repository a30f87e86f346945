//! How long one call of containerd's may wait for the guest and the VMM in all.
//!
//! Whatever they are asked for has a deadline of its own, but a call asks for several things, and the kubelet waits two minutes
//! for all of them. Beyond that nobody learns what the call came to.

use std::time::Duration;

use tokio::time::Instant;

tokio::task_local! {
    /// When the patience of the call that this task works on is at its end.
    static END: Instant;
}

/// Runs a call, or a part of one, whose questions wait no longer than that taken together. Tasks that it spawns are not part of it.
pub async fn within<T>(whole: Duration, call: impl Future<Output = T>) -> T {
    let end = Instant::now() + left(whole);
    END.scope(end, call).await
}

/// What is left of the call's patience, at most `deadline`.
pub fn left(deadline: Duration) -> Duration {
    let whole = END.try_with(|end| end.saturating_duration_since(Instant::now()));
    whole.map_or(deadline, |left| left.min(deadline))
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
}
