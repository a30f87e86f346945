//! Threads for disks: as many as there can be disks, so that one that hangs holds up nothing but itself.
//!
//! They are started before there is a guest, because a thread that the confined main thread started would be confined as that
//! is (`jail::seccomp`). Each serves one disk at a time, and then waits for the next. A disk that is removed leaves its thread a
//! moment after its slot. If closing it hangs in the host and every other thread has a disk, a new disk is not served before
//! the removed one answers.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::jail::{self, Kind};

type Work = Box<dyn FnOnce() + Send>;

/// The threads. They end when this and all copies of it are dropped, and their work has ended.
#[derive(Clone)]
pub struct DiskThreads(Sender<Work>);

impl DiskThreads {
    /// Starts so many.
    ///
    /// # Errors
    ///
    /// Those of pthread_create(3): above all the limit of tasks.
    pub fn start(count: usize) -> io::Result<Self> {
        let (work, inbox) = channel();
        let inbox = Arc::new(Mutex::new(inbox));
        for _ in 0..count {
            let inbox = Arc::clone(&inbox);
            thread::Builder::new().name(Kind::Disks.name().into()).spawn(move || {
                jail::confine_thread(Kind::Disks);
                while let Some(work) = next(&inbox) {
                    work();
                }
            })?;
        }
        Ok(Self(work))
    }

    /// Does this on the next thread that has nothing to do.
    pub fn run(&self, work: impl FnOnce() + Send + 'static) {
        // The threads wait for it as long as there is a sender.
        let _ = self.0.send(Box::new(work));
    }
}

/// Waits for work. `None` if nobody can send any more.
fn next(inbox: &Mutex<Receiver<Work>>) -> Option<Work> {
    // One thread waits for the channel, the others wait for the lock.
    inbox.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hangs until what is returned first is dropped; the second tells the end.
    fn hang(threads: &DiskThreads) -> (Sender<()>, Receiver<()>) {
        let ((release, released), (tell, ended)) = (channel::<()>(), channel());
        threads.run(move || {
            let _ = released.recv();
            drop(tell);
        });
        (release, ended)
    }

    #[test]
    fn work_that_hangs_holds_up_no_other_and_its_thread_is_used_again() {
        let threads = DiskThreads::start(2).unwrap();
        let (first, first_ended) = hang(&threads);
        let (second, second_ended) = hang(&threads);
        let (third, third_ended) = hang(&threads);
        drop(second);
        assert!(second_ended.recv().is_err());
        drop(third);
        assert!(third_ended.recv().is_err(), "by the thread that was there again");
        drop(first);
        assert!(first_ended.recv().is_err());
    }

    #[test]
    fn work_is_done_though_who_gave_it_has_gone() {
        let threads = DiskThreads::start(1).unwrap();
        let (first, _) = hang(&threads);
        let (second, second_ended) = hang(&threads);
        drop(threads);
        drop((first, second));
        assert!(second_ended.recv().is_err());
    }
}
