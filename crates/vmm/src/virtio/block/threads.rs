//! Threads for disks: one for each disk, so that one that hangs holds up nothing but itself.
//!
//! They are started before there is a guest, because a thread that the confined main thread started would be confined as that
//! is (`jail::seccomp`), and wait for a disk from then on. One that is done with its disk waits for the next. Whose disk
//! does not answer is not there for others until it does.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;

use crate::jail::{self, Kind};

type Idle = Mutex<Vec<DiskThread>>;

/// Those that have nothing to do. They end when this is dropped.
pub struct DiskThreads(Arc<Idle>);

/// A thread that waits for work. It goes back to the others when this is dropped.
pub struct DiskThread {
    jobs: Sender<Job>,
    idle: Weak<Idle>,
}

struct Job {
    work: Box<dyn FnOnce() + Send>,
    thread: DiskThread,
}

impl DiskThreads {
    /// Starts so many.
    ///
    /// # Errors
    ///
    /// Those of pthread_create(3): above all the limit of tasks.
    pub fn start(count: usize) -> io::Result<Self> {
        let idle = Arc::new(Mutex::new(Vec::with_capacity(count)));
        let threads = (0..count).map(|_| DiskThread::start(Arc::downgrade(&idle))).collect::<Result<Vec<_>, _>>()?;
        idle.lock().unwrap_or_else(PoisonError::into_inner).extend(threads);
        Ok(Self(idle))
    }

    /// One that has nothing to do.
    pub fn take(&self) -> Option<DiskThread> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

impl DiskThread {
    fn start(idle: Weak<Idle>) -> io::Result<Self> {
        let (jobs, inbox) = channel::<Job>();
        thread::Builder::new().name(Kind::Disks.name().into()).spawn(move || {
            jail::confine_thread(Kind::Disks);
            for Job { work, thread } in inbox {
                work();
                drop(thread);
            }
        })?;
        Ok(Self { jobs, idle })
    }

    /// One that belongs to nobody else and ends with its work.
    #[cfg(any(test, feature = "testing"))]
    pub fn alone() -> io::Result<Self> {
        Self::start(Weak::new())
    }

    /// Works on the thread, which others can have when the work has ended.
    pub fn run(self, work: impl FnOnce() + Send + 'static) {
        let jobs = self.jobs.clone();
        // The thread waits for it: it ends only when nobody can send any more.
        let _ = jobs.send(Job { work: Box::new(work), thread: self });
    }
}

impl Drop for DiskThread {
    fn drop(&mut self) {
        if let Some(idle) = self.idle.upgrade() {
            let again = Self { jobs: self.jobs.clone(), idle: self.idle.clone() };
            idle.lock().unwrap_or_else(PoisonError::into_inner).push(again);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver;

    use super::*;

    fn hang(threads: &DiskThreads) -> (Sender<()>, Receiver<()>) {
        let ((release, released), (tell, ended)) = (channel::<()>(), channel());
        threads.take().unwrap().run(move || {
            // Its end is the release.
            let _ = released.recv();
            drop(tell);
        });
        (release, ended)
    }

    #[test]
    fn thread_that_hangs_is_nobodys_until_it_has_come_back() {
        let threads = DiskThreads::start(2).unwrap();
        let (release, ended) = hang(&threads);
        let (other, other_ended) = hang(&threads);
        assert!(threads.take().is_none(), "both are in use");
        drop(other);
        assert!(other_ended.recv().is_err());
        drop(release);
        assert!(ended.recv().is_err());
        // A thread is back a moment after its work has ended.
        while threads.0.lock().unwrap().len() < 2 {
            thread::yield_now();
        }
    }

    #[test]
    fn threads_end_with_who_has_started_them() {
        let threads = DiskThreads::start(2).unwrap();
        let (release, ended) = hang(&threads);
        let idle = Arc::downgrade(&threads.0);
        drop(threads);
        assert!(idle.upgrade().is_none());
        drop(release);
        assert!(ended.recv().is_err());
    }
}
