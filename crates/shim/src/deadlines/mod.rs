//! How long the shim waits for anything: for the guest, the VMM, a file system of the host, containerd.
//!
//! [`table`] has one row for each operation. A call of containerd's begins a [`Deadline`] and passes it down. What is done for
//! the call takes a part of it, which is never longer than what is left of the whole. A task that goes on without the call
//! begins a deadline of its own, where it is spawned.
//!
//! The VMM is in the pod's control group, under the pod's limit of CPU. A guest that the kernel keeps from running does not
//! hang. So time in which the pod was throttled does not count, up to [`LONGEST`] ([`throttling`]); for what the host does
//! alone it does.

mod render;
mod table;
mod throttling;

use std::pin::pin;
use std::time::Duration;

use tokio::time::Instant;

pub use render::markdown;
pub use table::{Caller, Clock, Operation, Row, Scope};
pub use throttling::follow;
use throttling::throttled;

/// How long a call may take at the most, however the pod is throttled. The kubelet gives two minutes; what is missing of them
/// is for killing the VM afterwards.
pub const LONGEST: Duration = Duration::from_secs(110);

/// What an operation has of time, from when it began.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    begun: Instant,
    budget: Duration,
    clock: Clock,
    /// How long the pod had been throttled when this began; nothing if there was no pod yet.
    throttled: Option<Duration>,
    /// Not beyond this in any case.
    end: Instant,
}

impl Deadline {
    /// Begins an operation that is a part of no other.
    pub fn begin(operation: Operation) -> Self {
        let now = Instant::now();
        let Row { budget, clock, .. } = operation.row();
        Self { begun: now, budget, clock, throttled: throttled(), end: now + longest(budget, clock) }
    }

    /// One of which nothing is left.
    #[cfg(test)]
    pub fn over() -> Self {
        let now = Instant::now();
        Self { begun: now, budget: Duration::ZERO, clock: Clock::Host, throttled: None, end: now }
    }

    /// Begins a part of this operation.
    #[must_use]
    pub fn part(self, operation: Operation) -> Self {
        self.part_of(operation, operation.budget())
    }

    /// Begins a part for which not the table but the operator says how long it may take.
    #[must_use]
    pub fn part_of(self, operation: Operation, budget: Duration) -> Self {
        let (now, clock, throttled) = (Instant::now(), operation.row().clock, throttled());
        let budget = budget.min(self.left_by(|| throttled));
        let end = self.end.min(now + longest(budget, clock));
        Self { begun: now, budget, clock, throttled, end }
    }

    /// The call has turned out to be another one than it was taken for. It began as early.
    #[must_use]
    pub fn turned_into(self, operation: Operation) -> Self {
        let Row { budget, clock, .. } = operation.row();
        Self { budget, clock, end: self.begun + longest(budget, clock), ..self }
    }

    /// The same, with more time.
    #[must_use]
    pub fn longer_by(self, more: Duration) -> Self {
        Self { budget: self.budget + more, end: self.end + more, ..self }
    }

    /// What is left of it.
    pub fn left(self) -> Duration {
        self.left_by(throttled)
    }

    /// The same, for a pod that `throttled` says the throttled time of.
    fn left_by(self, throttled: impl Fn() -> Option<Duration>) -> Duration {
        let elapsed = self.begun.elapsed();
        let lost = match (self.clock, self.throttled) {
            // The kernel counts for each CPU.
            (Clock::Pod, Some(before)) => throttled().unwrap_or(before).saturating_sub(before).min(elapsed),
            _ => Duration::ZERO,
        };
        let left = self.budget.saturating_add(lost).saturating_sub(elapsed);
        left.min(self.end.saturating_duration_since(Instant::now()))
    }

    /// Waits for an answer as long as there is time left. An error is how long that was.
    pub async fn timeout<T>(self, answer: impl Future<Output = T>) -> Result<T, Duration> {
        self.timeout_by(throttled, answer).await
    }

    async fn timeout_by<T>(
        self,
        throttled: impl Fn() -> Option<Duration>,
        answer: impl Future<Output = T>,
    ) -> Result<T, Duration> {
        let asked = Instant::now();
        let mut answer = pin!(answer);
        loop {
            let left = self.left_by(&throttled);
            if let Ok(answer) = tokio::time::timeout(left, &mut answer).await {
                return Ok(answer);
            }
            if left.is_zero() {
                let waited = asked.elapsed();
                // For people to read.
                let seconds = Duration::from_secs(waited.as_secs());
                return Err(if seconds.is_zero() { waited } else { seconds });
            }
        }
    }
}

/// What an operation may take in a pod that is throttled.
fn longest(budget: Duration, clock: Clock) -> Duration {
    match clock {
        Clock::Pod => budget.max(LONGEST),
        Clock::Host => budget,
    }
}

#[cfg(test)]
mod tests;
