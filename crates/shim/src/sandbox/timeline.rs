//! Where the time of a sandbox's boot went: `boot.json` in the pod's directory, an array of step and milliseconds.

use std::path::Path;
use std::time::{Duration, Instant};

use super::process;

/// The steps so far.
pub struct Timeline {
    last: Instant,
    steps: Vec<(&'static str, f64)>,
}

impl Timeline {
    /// Begins with what this process has done until now, as the kernel counts it.
    pub fn begin() -> Self {
        let mut timeline = Self { last: Instant::now(), steps: Vec::new() };
        if let Some(age) = process_age() {
            timeline.add("shim start", age);
        }
        timeline
    }

    /// A step that ended at `end`.
    pub fn until(&mut self, step: &'static str, end: Instant) {
        self.add(step, end.saturating_duration_since(self.last));
        self.last = end;
    }

    /// A step that ends now.
    pub fn done(&mut self, step: &'static str) {
        self.until(step, Instant::now());
    }

    /// Tells how much of the step before was spent in the guest's kernel, by the guest's own word.
    pub fn split(&mut self, kernel: Duration) {
        if let Some((_, whole)) = self.steps.pop() {
            let kernel = (kernel.as_secs_f64() * 1000.0).min(whole);
            self.steps.push(("kernel", kernel));
            self.steps.push(("agent ready", whole - kernel));
        }
    }

    fn add(&mut self, step: &'static str, time: Duration) {
        self.steps.push((step, time.as_secs_f64() * 1000.0));
    }

    /// Writes the file. For measuring only: a failure is logged and forgotten.
    pub fn write(&self, path: &Path) {
        let text = serde_json::to_vec(&self.steps).unwrap_or_default();
        if let Err(error) = std::fs::write(path, text) {
            tracing::warn!(%error, "cannot write {}", path.display());
        }
    }
}

/// How long this process has lived.
fn process_age() -> Option<Duration> {
    let ticks = process::start_time(std::process::id())?;
    let started = Duration::from_millis(ticks.checked_mul(1000)?.checked_div(rustix::param::clock_ticks_per_second())?);
    let now = Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Boottime)).ok()?;
    now.checked_sub(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_word_never_makes_a_step_longer_than_it_was() {
        let mut timeline = Timeline { last: Instant::now(), steps: vec![("guest", 100.0)] };
        timeline.split(Duration::from_secs(1000));
        assert_eq!(timeline.steps, [("kernel", 100.0), ("agent ready", 0.0)]);
    }

    #[test]
    fn this_process_has_an_age() {
        assert!(process_age().is_some_and(|age| age < Duration::from_secs(3600)));
    }
}
