//! Threads that wait for locks that others on the host have.
//!
//! The kernel tells nobody that a lock has become free but who waits for it, and that is a thread each. So there are a few,
//! from the start, since later nothing in the process may start one. Each waits for a lock on an open file of its own, and
//! gives it back at once: then who wanted it tries again. Everyone that wants the same lock shares one.
#![allow(unsafe_code)] // reason: pthread_kill(3)

use std::fs::File;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

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
}

struct Slots {
    threads: Vec<Slot>,
    results: Receiver<Ended>,
}

struct Slot {
    orders: SyncSender<(File, Wish)>,
    thread: JoinHandle<()>,
    waits_for: Option<Wish>,
    /// Nobody wants it any more, and the thread has been told.
    cancelled: bool,
}

/// A wait that is over.
pub struct Ended {
    slot: usize,
    /// Has the lock if there is no error. Who tries next closes it first, and has little competition then.
    file: File,
    result: io::Result<()>,
}

impl Watches {
    /// Starts so many threads.
    pub fn start(count: usize) -> io::Result<Self> {
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(lock_signal(), nothing).map_err(io::Error::from)?;
        let event = Arc::new(event_fd()?);
        let (ended, results) = channel();
        let threads = (0..count).map(|slot| Slot::start(slot, ended.clone(), Arc::clone(&event)));
        let threads = threads.collect::<io::Result<_>>()?;
        Ok(Self { slots: Mutex::new(Slots { threads, results }), event })
    }

    /// To be waited for; [`Self::ended`] clears it.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Waits for a lock, or joins who waits for the same. The file is opened only if there is a thread for it.
    pub fn watch(&self, wish: &Wish, open: impl FnOnce() -> io::Result<File>) -> io::Result<()> {
        let mut slots = self.slots();
        let alike = |slot: &&mut Slot| slot.waits_for.as_ref().is_some_and(|other| other.is_like(wish));
        if let Some(slot) = slots.threads.iter_mut().find(alike) {
            slot.cancelled = false;
            return Ok(());
        }
        let none = || io::Error::from_raw_os_error(libc::ENOLCK);
        let free = slots.threads.iter_mut().find(|slot| slot.waits_for.is_none()).ok_or_else(none)?;
        free.orders.try_send((open()?, *wish)).map_err(|_| none())?;
        free.waits_for = Some(*wish);
        free.cancelled = false;
        Ok(())
    }

    /// Ends the waits for what nobody wants. A signal that comes just before the thread waits is lost; such a wait ends with
    /// the lock, which the thread gives back.
    pub fn keep(&self, wanted: impl Fn(&Wish) -> bool) {
        for slot in &mut self.slots().threads {
            if !slot.cancelled && slot.waits_for.as_ref().is_some_and(|wish| !wanted(wish)) {
                slot.cancelled = true;
                // SAFETY: the thread has not been joined, so its handle is valid; the signal has a handler that does nothing.
                unsafe { libc::pthread_kill(slot.thread.as_pthread_t(), lock_signal()) };
            }
        }
    }

    /// What was waited for, with the outcome; a file that has the lock is closed by this.
    pub fn ended(&self) -> Vec<(Wish, io::Result<()>)> {
        // It fails if nothing has ended.
        let _ = self.event.read();
        let mut slots = self.slots();
        let ended: Vec<_> = slots.results.try_iter().collect();
        let wishes = ended.into_iter().filter_map(|Ended { slot, file, result }| {
            drop(file);
            Some((slots.threads.get_mut(slot)?.waits_for.take()?, result))
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
        Ok(Self { orders, thread, waits_for: None, cancelled: false })
    }
}

/// A thread: one wait after the other, to the end of the device.
fn wait_for_each(slot: usize, orders: &Receiver<(File, Wish)>, ended: &Sender<Ended>, event: &EventFd) {
    jail::confine_thread(Kind::Locks);
    for (file, wish) in orders {
        let result = host::wait(&file, &wish);
        if ended.send(Ended { slot, file, result }).is_err() {
            return;
        }
        // It can only fail by overflow, and then the event is readable as it is.
        let _ = event.write(1);
    }
}
