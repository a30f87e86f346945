//! When to try again what has failed.

use std::time::Duration;

/// How long after the first failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// How long after the later ones at most: whoever refuses something for ever must not keep the node busy.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The time from a failure to the next attempt, which doubles with each failure in a row.
#[derive(Debug, Default)]
pub struct GrowingPause(Option<Duration>);

impl GrowingPause {
    /// Something has failed: how long to wait now.
    pub fn failed(&mut self) -> Duration {
        let pause = self.0.map_or(FIRST_PAUSE, |pause| (pause * 2).min(LONGEST_PAUSE));
        *self.0.insert(pause)
    }

    /// It has worked.
    pub fn worked(&mut self) {
        self.0 = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_doubles_up_to_its_longest_and_begins_anew_after_a_success() {
        let mut pause = GrowingPause::default();
        let seconds = |pause: &mut GrowingPause| pause.failed().as_secs();
        let pauses: Vec<_> = (0..8).map(|_| seconds(&mut pause)).collect();
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
        pause.worked();
        assert_eq!(seconds(&mut pause), 1);
    }
}
