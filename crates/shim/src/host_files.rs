//! Work on file systems and disks of the host. Any of them may never answer, so the reactor's thread touches none: a call that
//! hangs there would hang the whole pod. The work is done on threads of its own, of which there is a bounded number, and nobody
//! waits for it without end.
//!
//! /proc, /sys and the pod's own directory in /run are in memory, and need none of this.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::deadlines::{Deadline, Operation};
use crate::own_thread;

/// For what belongs to a container's creation or to the pod's boot. A kubelet tries again and again to create a container that
/// hangs, and is told at once if as many hang already.
pub static CONTAINERS: Lane = Lane::new(16, WhenFull::Refuse);

/// For standard streams. The kubelet probes all containers of a pod at once, and each probe has some.
pub static STREAMS: Lane = Lane::new(16, WhenFull::Wait);

/// For programs of OCI hooks.
pub static HOOKS: Lane = Lane::new(16, WhenFull::Wait);

/// What becomes of work for which there is no thread.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum WhenFull {
    Refuse,
    /// It waits for one, as long as it has time.
    Wait,
}

/// A number of threads for work of one kind: what hangs in one lane does not hold up another.
#[derive(Debug)]
pub struct Lane {
    threads: Semaphore,
    most: usize,
    when_full: WhenFull,
}

impl Lane {
    const fn new(most: usize, when_full: WhenFull) -> Self {
        Self { threads: Semaphore::const_new(most), most, when_full }
    }

    /// Does work on a thread. It may register descriptors with the reactor.
    pub async fn run<T: Send + 'static>(
        &'static self,
        deadline: Deadline,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, HostFilesError> {
        self.run_or_undo(deadline, work, || ()).await
    }

    /// The same. If nobody waits any more when it is done, `undo` follows on the thread.
    pub async fn run_or_undo<T: Send + 'static>(
        &'static self,
        deadline: Deadline,
        work: impl FnOnce() -> T + Send + 'static,
        undo: impl FnOnce() + Send + 'static,
    ) -> Result<T, HostFilesError> {
        let deadline = deadline.part(Operation::HostFiles);
        let thread = match self.when_full {
            WhenFull::Refuse => self.threads.try_acquire().ok(),
            WhenFull::Wait => deadline.timeout(self.threads.acquire()).await.ok().and_then(Result::ok),
        };
        let thread = thread.ok_or(HostFilesError::Stuck(self.most))?;
        let runtime = Handle::current();
        let work = move || {
            let _context = runtime.enter();
            let done = work();
            drop(thread);
            done
        };
        let done = deadline.timeout(own_thread::run_or_undo("bulkhead-host", work, undo)).await;
        done.map_err(HostFilesError::Hung)?.map_err(HostFilesError::Thread)
    }
}

/// Threads of which there is one for each key at a time.
#[derive(Debug)]
pub struct OneEach<K>(Arc<Mutex<HashMap<K, Running>>>);

/// The work that a key has.
#[derive(Clone, Debug)]
struct Running {
    begun: Instant,
    deadline: Deadline,
    /// Closed at its end.
    ended: watch::Receiver<()>,
}

/// Ends what a key has, when this is dropped.
struct Ending<K: Eq + Hash> {
    running: Arc<Mutex<HashMap<K, Running>>>,
    key: K,
    _ended: watch::Sender<()>,
}

impl<K: Eq + Hash> Drop for Ending<K> {
    fn drop(&mut self) {
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

impl<K> Default for OneEach<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Clone + Eq + Hash + Send + 'static> OneEach<K> {
    /// Does work for a key on a thread, after what others do for it. Whoever comes while that hangs, beyond its own time, is told
    /// so at once.
    pub async fn run<T: Send + 'static>(
        &self,
        key: K,
        deadline: Deadline,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, HostFilesError> {
        let ending = loop {
            let mut other = match self.begin(&key, deadline) {
                Ok(ending) => break ending,
                Err(other) => other,
            };
            let ended = other.deadline.timeout(other.ended.changed());
            // An error of the channel's is the end.
            if deadline.timeout(ended).await.map_err(HostFilesError::Hung)?.is_err() {
                return Err(HostFilesError::Hung(Duration::from_secs(other.begun.elapsed().as_secs())));
            }
        };
        let work = move || {
            let done = work();
            drop(ending);
            done
        };
        let done = deadline.timeout(own_thread::run("bulkhead-host", work)).await;
        done.map_err(HostFilesError::Hung)?.map_err(HostFilesError::Thread)
    }

    /// Takes a key, or says who has it.
    fn begin(&self, key: &K, deadline: Deadline) -> Result<Ending<K>, Running> {
        let (tell, ended) = watch::channel(());
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(key.clone()) {
            Entry::Occupied(other) => Err(other.get().clone()),
            Entry::Vacant(place) => {
                place.insert(Running { begun: Instant::now(), deadline, ended });
                Ok(Ending { running: self.0.clone(), key: key.clone(), _ended: tell })
            }
        }
    }
}

/// A file system or disk of the host does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum HostFilesError {
    /// It does not answer.
    #[error("a file system of the host has not answered within {0:?}; does a volume's server or disk answer?")]
    Hung(Duration),
    /// So many threads wait already for one that does not answer.
    #[error(
        "{0} threads wait for a file system of the host for this pod already; does a volume's server or disk answer?"
    )]
    Stuck(usize),
    /// No thread.
    #[error("cannot start a thread for files of the host; is the node out of threads?")]
    Thread(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    fn deadline() -> Deadline {
        Deadline::begin(Operation::CreateContainer)
    }

    /// Work that hangs until the other end is dropped.
    fn hanging() -> (Sender<()>, impl FnOnce() + Send + 'static) {
        let (answer, hung) = channel::<()>();
        (answer, move || _ = hung.recv())
    }

    #[tokio::test(start_paused = true)]
    async fn work_that_hangs_is_not_waited_for_and_undone_when_it_comes_back() {
        static LANE: Lane = Lane::new(1, WhenFull::Refuse);
        let (answer, work) = hanging();
        let (undone, told) = channel();
        let outcome = LANE.run_or_undo(deadline(), work, move || undone.send(()).unwrap()).await;
        let expected = Operation::HostFiles.budget();
        assert!(matches!(outcome, Err(HostFilesError::Hung(waited)) if waited == expected), "{outcome:?}");
        assert!(told.try_recv().is_err());
        let other = LANE.run(deadline(), || ()).await;
        assert!(matches!(other, Err(HostFilesError::Stuck(1))), "its thread is still there: {other:?}");
        drop(answer);
        told.recv_timeout(Duration::from_secs(10)).unwrap();
        tokio::time::resume();
        LANE.run_or_undo(deadline(), || (), || panic!("somebody has waited")).await.unwrap();
    }

    #[tokio::test]
    async fn work_of_a_lane_that_waits_has_its_turn() {
        static LANE: Lane = Lane::new(1, WhenFull::Wait);
        let (answer, work) = hanging();
        let first = tokio::spawn(LANE.run(deadline(), work));
        tokio::task::yield_now().await;
        let second = tokio::spawn(LANE.run(deadline(), || 2));
        tokio::task::yield_now().await;
        assert!(!first.is_finished() && !second.is_finished());
        drop(answer);
        first.await.unwrap().unwrap();
        assert_eq!(second.await.unwrap().unwrap(), 2);
    }

    #[tokio::test]
    async fn key_whose_work_hangs_has_no_second_thread_and_who_asks_is_told_at_once() {
        let threads = OneEach::<u32>::default();
        let (answer, work) = hanging();
        tokio::time::pause();
        let first = threads.run(1, deadline(), work).await;
        assert!(matches!(first, Err(HostFilesError::Hung(_))), "{first:?}");
        let begun = Instant::now();
        for _ in 0..3 {
            let again = threads.run(1, deadline(), || panic!("a second thread")).await;
            let all = Operation::CreateContainer.budget();
            assert!(matches!(again, Err(HostFilesError::Hung(waited)) if waited == all), "{again:?}");
        }
        assert_eq!(begun.elapsed().as_secs(), 0);
        tokio::time::resume();
        assert_eq!(threads.run(2, deadline(), || 2).await.unwrap(), 2, "another key");
        let mut ended = threads.0.lock().unwrap().get(&1).unwrap().ended.clone();
        drop(answer);
        assert!(ended.changed().await.is_err());
        assert_eq!(threads.run(1, deadline(), || 1).await.unwrap(), 1, "it has answered");
    }

    #[tokio::test]
    async fn who_comes_while_a_key_has_work_comes_after_it() {
        let threads = Arc::new(OneEach::<u32>::default());
        let (answer, work) = hanging();
        let first = tokio::spawn({
            let threads = threads.clone();
            async move { threads.run(1, deadline(), work).await }
        });
        tokio::task::yield_now().await;
        let second = tokio::spawn({
            let threads = threads.clone();
            async move { threads.run(1, deadline(), || 2).await }
        });
        tokio::task::yield_now().await;
        assert!(!first.is_finished() && !second.is_finished());
        drop(answer);
        first.await.unwrap().unwrap();
        assert_eq!(second.await.unwrap().unwrap(), 2);
        assert!(threads.0.lock().unwrap().is_empty());
    }
}
