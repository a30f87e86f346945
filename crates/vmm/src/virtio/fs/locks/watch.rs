//! Threads that wait for locks that others on the host have.
//!
//! The kernel tells nobody that a lock has become free but who waits for it, and that is a thread each. So there are a few,
//! from the start, since later nothing in the process may start one. Each waits for a lock on an open file of its own, and
//! gives it back at once: then who wanted it tries again. Everyone that wants the same lock shares one.
//!
//! A wait that nobody wants any more ends at once, wherever its thread is. One that waits is woken by a signal; one that is
//! about to would not notice it, so its descriptor is made one of a file without locks before that.
#![allow(unsafe_code)] // reason: pthread_kill(3), and dup3(2) to a descriptor that a thread may be using

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::fs::{Mode, OFlags, openat};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

use super::host;
use super::request::Wish;
use crate::jail::seccomp::lock_signal;
use crate::jail::{self, Kind};
use crate::virtio::ring::event_fd;

/// A thread does nothing but call and wait.
const STACK_SIZE: usize = 64 * 1024;

/// The threads.
pub struct Watches {
    slots: Mutex<Slots>,
    /// Readable when a wait has ended.
    event: Arc<EventFd>,
    /// A file of which the kernel says EBADF to who wants a lock (open(2), O_PATH).
    lockless: OwnedFd,
}

struct Slots {
    threads: Vec<Slot>,
    results: Receiver<Ended>,
}

struct Slot {
    orders: SyncSender<(Arc<File>, Wish)>,
    thread: JoinHandle<()>,
    wait: Option<Wait>,
}

/// From the order to when its end was seen.
struct Wait {
    wish: Wish,
    /// Has the lock when the wait has ended well. Who tries next closes it first, and has little competition then.
    file: Arc<File>,
    /// Nobody wanted it any more, and the thread was told.
    cancelled: bool,
}

/// A wait that is over.
struct Ended {
    slot: usize,
    result: io::Result<()>,
}

impl Watches {
    /// Starts so many threads. `directory` is any, of which a descriptor without locks is made.
    pub fn start(count: usize, directory: impl AsFd) -> io::Result<Self> {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(lock_signal(), nothing).map_err(io::Error::from)?;
        let event = Arc::new(event_fd()?);
        let (ended, results) = channel();
        let threads = (0..count).map(|slot| Slot::start(slot, ended.clone(), Arc::clone(&event)));
        let threads = threads.collect::<io::Result<_>>()?;
        let lockless = openat(directory, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { slots: Mutex::new(Slots { threads, results }), event, lockless })
    }

    /// To be waited for; [`Self::ended`] clears it.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Waits for a lock, or joins who waits for the same. The file is opened only if there is a thread for it.
    pub fn watch(&self, wish: &Wish, open: impl FnOnce() -> io::Result<File>) -> io::Result<()> {
        let mut slots = self.slots();
        // One that was cancelled ends at once, and then the lock is tried again, too.
        if slots.threads.iter().any(|slot| slot.wait.as_ref().is_some_and(|wait| wait.wish.is_like(wish))) {
            return Ok(());
        }
        let none = || io::Error::from_raw_os_error(libc::ENOLCK);
        let free = slots.threads.iter_mut().find(|slot| slot.wait.is_none()).ok_or_else(none)?;
        let file = Arc::new(open()?);
        free.orders.try_send((Arc::clone(&file), *wish)).map_err(|_| none())?;
        free.wait = Some(Wait { wish: *wish, file, cancelled: false });
        Ok(())
    }

    /// Ends the waits for what nobody wants.
    pub fn keep(&self, wanted: impl Fn(&Wish) -> bool) {
        for Slot { thread, wait, .. } in &mut self.slots().threads {
            if let Some(wait) = wait
                && !wait.cancelled
                && !wanted(&wait.wish)
            {
                wait.cancelled = true;
                self.end(wait, thread);
            }
        }
    }

    /// Ends a wait: a call that comes later finds no lock, and one that has found the file ends by the signal.
    fn end(&self, wait: &Wait, thread: &JoinHandle<()>) {
        // SAFETY: both are open; the number stays the `Wait`'s own, and a call under way keeps the file that it has found.
        unsafe { libc::dup3(self.lockless.as_raw_fd(), wait.file.as_raw_fd(), libc::O_CLOEXEC) };
        // SAFETY: the thread has not been joined, so its handle is valid; the signal has a handler that does nothing.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), lock_signal()) };
    }

    /// What was waited for, with the outcome; a file that has the lock is closed by this.
    pub fn ended(&self) -> Vec<(Wish, io::Result<()>)> {
        // It fails if nothing has ended.
        let _ = self.event.read();
        let mut slots = self.slots();
        let ended: Vec<_> = slots.results.try_iter().collect();
        let wishes = ended.into_iter().filter_map(|Ended { slot, result }| {
            let Wait { wish, cancelled, .. } = slots.threads.get_mut(slot)?.wait.take()?;
            Some((wish, if cancelled { Ok(()) } else { result }))
        });
        wishes.collect()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slot {
    fn start(slot: usize, ended: Sender<Ended>, event: Arc<EventFd>) -> io::Result<Self> {
        let (orders, queue) = sync_channel(1);
        let builder = thread::Builder::new().name(Kind::Locks.name().into()).stack_size(STACK_SIZE);
        let thread = builder.spawn(move || wait_for_each(slot, &queue, &ended, &event))?;
        Ok(Self { orders, thread, wait: None })
    }
}

/// A thread: one wait after the other, to the end of the device.
fn wait_for_each(slot: usize, orders: &Receiver<(Arc<File>, Wish)>, ended: &Sender<Ended>, event: &EventFd) {
    jail::confine_thread(Kind::Locks);
    for (file, wish) in orders {
        let result = host::wait(&file, &wish);
        drop(file);
        if ended.send(Ended { slot, result }).is_err() {
            return;
        }
        // It can only fail by overflow, and then the event is readable as it is.
        let _ = event.write(1);
    }
}
