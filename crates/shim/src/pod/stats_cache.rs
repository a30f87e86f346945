//! A container's numbers, which a guest may be slow to tell, or never tell.
//!
//! containerd asks all containers of a node for theirs, one after another, and the kubelet waits two minutes for the whole; so one
//! pod's guest must not hold up the others' numbers. A guest that is slow has its last ones told, and is not asked again
//! before it has answered.

use protobuf::well_known_types::any::Any;
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::TaskError;
use crate::deadlines::{Deadline, Operation};
use crate::sandbox::agent::AgentError;

/// What is known of one container's numbers.
#[derive(Debug, Default)]
pub struct StatsCache(watch::Sender<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Packed, which is bounded.
    last: Option<Any>,
    /// When the guest was asked, if it has not answered yet.
    asked: Option<Instant>,
}

impl StatsCache {
    /// The numbers: those that `ask` answers with, or the last ones if that takes long. `ask` goes on for as long as it takes,
    /// unless it is dropped because one goes on already.
    pub async fn get<A>(&self, deadline: Deadline, ask: A) -> Result<Any, TaskError>
    where
        A: Future<Output = Result<Any, TaskError>> + Send + 'static,
    {
        let mut known = self.0.subscribe();
        let mut answer = None;
        self.0.send_if_modified(|known| {
            if known.asked.is_none() {
                known.asked = Some(Instant::now());
                answer = Some(tokio::spawn(keep(self.0.clone(), ask)));
            }
            answer.is_some()
        });
        if let Some(answer) = answer {
            if let Ok(Ok(answer)) = deadline.timeout(answer).await {
                return answer;
            }
        } else if known.borrow().last.is_none() {
            // The first numbers are under way: whoever asks for them waits no longer than the first who did.
            let asked = known.borrow().asked.unwrap_or_else(Instant::now);
            let until = asked + Operation::Stats.budget();
            let _ = tokio::time::timeout_at(until, known.wait_for(|known| known.asked.is_none())).await;
        }
        let last = self.0.borrow().last.clone();
        last.ok_or(TaskError::Agent(AgentError::Silent(Operation::Stats.budget())))
    }
}

/// Asks, and keeps the answer.
async fn keep<A>(numbers: watch::Sender<Known>, ask: A) -> Result<Any, TaskError>
where
    A: Future<Output = Result<Any, TaskError>>,
{
    let answer = ask.await;
    numbers.send_modify(|known| {
        known.asked = None;
        if let Ok(answer) = &answer {
            known.last = Some(answer.clone());
        }
    });
    answer
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::{pending, ready};
    use tokio::sync::oneshot;

    fn numbers(value: u8) -> Any {
        Any { value: vec![value], ..Any::default() }
    }

    const LIMIT: std::time::Duration = Operation::Stats.budget();

    async fn get<A>(known: &StatsCache, ask: A) -> Result<Any, TaskError>
    where
        A: Future<Output = Result<Any, TaskError>> + Send + 'static,
    {
        known.get(Deadline::begin(Operation::Stats), ask).await
    }

    async fn never() -> Result<Any, TaskError> {
        pending().await
    }

    fn is_silent(answer: &Result<Any, TaskError>) -> bool {
        matches!(answer, Err(TaskError::Agent(AgentError::Silent(_))))
    }

    #[tokio::test(start_paused = true)]
    async fn hostile_21_guest_that_never_answers_is_waited_for_once() {
        let known = StatsCache::default();
        let begin = Instant::now();
        for _ in 0..100 {
            assert!(is_silent(&get(&known, never()).await));
        }
        assert_eq!(begin.elapsed().as_secs(), LIMIT.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn hostile_21_slow_guest_has_its_last_numbers_told_and_its_answer_kept() {
        let known = StatsCache::default();
        assert_eq!(get(&known, ready(Ok(numbers(1)))).await.unwrap(), numbers(1));
        let (tell, told) = oneshot::channel();
        let slow = async { Ok(told.await.unwrap()) };
        let begin = Instant::now();
        assert_eq!(get(&known, slow).await.unwrap(), numbers(1));
        assert_eq!(begin.elapsed().as_secs(), LIMIT.as_secs());
        // Not asked again, and not waited for.
        assert_eq!(get(&known, ready(Ok(numbers(9)))).await.unwrap(), numbers(1));
        assert_eq!(begin.elapsed().as_secs(), LIMIT.as_secs());
        tell.send(numbers(2)).unwrap();
        known.0.subscribe().wait_for(|known| known.asked.is_none()).await.unwrap();
        assert!(get(&known, never()).await.is_ok_and(|last| last == numbers(2)));
    }

    #[tokio::test(start_paused = true)]
    async fn refusal_is_an_error_and_does_not_silence_the_guest() {
        let known = StatsCache::default();
        assert!(matches!(get(&known, ready(Err(TaskError::Finished))).await, Err(TaskError::Finished)));
        assert_eq!(get(&known, ready(Ok(numbers(1)))).await.unwrap(), numbers(1));
    }

    #[tokio::test(start_paused = true)]
    async fn two_that_ask_for_the_first_numbers_have_the_same() {
        let known = StatsCache::default();
        let soon = async {
            tokio::time::sleep(LIMIT / 2).await;
            Ok(numbers(1))
        };
        let (one, two) = tokio::join!(get(&known, soon), get(&known, never()));
        assert_eq!((one.unwrap(), two.unwrap()), (numbers(1), numbers(1)));
    }
}
