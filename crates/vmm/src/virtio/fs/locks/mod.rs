//! Locks on files of the share, which are the host's: two pods that share a volume exclude each other, and the host's own
//! processes too. virtiofsd has none, so its guest would grant them by itself.
//!
//! What a guest calls an owner is an open file of the host's here, since a lock on the host belongs to one: flock(2) is
//! called on the guest's own open file, and for byte ranges each owner of a file has an open file of its own, for as long as
//! it has locks there. So a lock never outlives this process, whatever becomes of the guest.
//!
//! A lock that a guest waits for keeps its request. If another owner of the same guest has it, it is tried again when that
//! one lets go; if it is anybody else's, a thread waits ([`watch`]). Nothing is waited for here, and everything is bounded:
//! a guest that asks for more is told ENOLCK, as it is where a file system of the host has no locks.

mod host;
mod request;
mod spans;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use request::{How, Span, Wish};
use spans::Spans;
pub use watch::Watches;

/// Threads that wait for others on the host. One serves all who want the same lock.
pub const WATCHES: usize = 8;

/// Most owners of byte ranges, each of which takes a descriptor of the reserve ([`super::RESERVED_FDS`]).
const MAX_OWNERS: usize = 1024;

/// Most byte ranges that are locked. The host's kernel keeps some 200 bytes for each, and the pod pays for them.
const MAX_SPANS: usize = 8192;

/// Most requests that wait. Each has a slot of the queue, half of which stays for others: who holds the locks must be able to
/// let go.
const MAX_WAITING: usize = 512;

/// Interrupts that came before what they interrupt: they have a queue of their own.
const MAX_EARLY: usize = 64;

/// Open files of the guest.
pub trait OpenFiles {
    /// Does something with one.
    fn with(&self, node: u64, handle: u64, act: &mut dyn FnMut(&File) -> io::Result<()>) -> io::Result<()>;
}

/// All locks of a guest. `Reply` is how a request that waited is answered.
pub struct Locks<Reply> {
    state: Mutex<State<Reply>>,
    watches: Arc<Watches>,
    /// The directory /proc/self/fd.
    descriptors: OwnedFd,
}

struct State<Reply> {
    /// Byte ranges, by file and owner.
    owners: BTreeMap<(u64, u64), Owner>,
    spans: usize,
    /// Whole files, by file and open file.
    whole: BTreeMap<(u64, u64), How>,
    /// In the order in which they came.
    waiting: VecDeque<Waiting<Reply>>,
    early: VecDeque<u64>,
    /// Files of which something was unlocked.
    unlocked: BTreeSet<u64>,
    settled: Vec<(Reply, io::Result<()>)>,
}

struct Owner {
    file: File,
    writable: bool,
    spans: Spans,
    /// The open file of the guest that was used last.
    handle: u64,
    pid: u32,
}

struct Waiting<Reply> {
    wish: Wish,
    unique: u64,
    reply: Reply,
}

impl<Reply> Default for State<Reply> {
    fn default() -> Self {
        Self {
            owners: BTreeMap::new(),
            spans: 0,
            whole: BTreeMap::new(),
            waiting: VecDeque::new(),
            early: VecDeque::new(),
            unlocked: BTreeSet::new(),
            settled: Vec::new(),
        }
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// The host's word for "not now".
fn is_conflict(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAGAIN)
}

/// A file system without locks has several words for it, and one of them would make the guest's kernel take the request for
/// one that this server does not know.
fn no_locks(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY) => errno(libc::ENOLCK),
        _ => error,
    }
}

/// All second halves of the keys that begin with a file.
fn all_of(node: u64) -> RangeInclusive<(u64, u64)> {
    (node, 0)..=(node, u64::MAX)
}

impl<Reply> Locks<Reply> {
    /// No locks. `descriptors` is the directory `/proc/self/fd`.
    pub fn new(watches: Arc<Watches>, descriptors: OwnedFd) -> Self {
        Self { state: Mutex::default(), watches, descriptors }
    }

    /// The threads whose event says that [`Self::look_at_watches`] has something to do.
    pub fn watches(&self) -> &Watches {
        &self.watches
    }

    /// Sets or unsets a lock, at once or not at all.
    pub fn set(&self, files: &impl OpenFiles, wish: &Wish) -> io::Result<()> {
        self.state().attempt(files, &self.descriptors, wish).map_err(no_locks)
    }

    /// Sets a lock. `None` if it is waited for: then [`Self::settled`] gives the reply back.
    pub fn set_waiting(
        &self,
        files: &impl OpenFiles,
        wish: Wish,
        unique: u64,
        reply: Reply,
    ) -> Option<(Reply, io::Result<()>)> {
        let mut state = self.state();
        match state.attempt(files, &self.descriptors, &wish) {
            Err(error) if is_conflict(&error) => {}
            other => return Some((reply, other.map_err(no_locks))),
        }
        if let Some(at) = state.early.iter().position(|early| *early == unique) {
            state.early.remove(at);
            return Some((reply, Err(errno(libc::EINTR))));
        }
        let waits = if state.waiting.len() < MAX_WAITING {
            self.wait_for(&state, files, &wish)
        } else {
            Err(errno(libc::ENOLCK))
        };
        match waits {
            Ok(()) => state.waiting.push_back(Waiting { wish, unique, reply }),
            Err(error) => return Some((reply, Err(error))),
        }
        None
    }

    /// The lock that is in the way of one, and the process that has it if that is the guest's.
    pub fn conflict(&self, files: &impl OpenFiles, wish: &Wish) -> io::Result<Option<(How, Span, u32)>> {
        let state = self.state();
        let mut found = None;
        let mut look = |file: &File| {
            found = host::conflict(file, wish.how, wish.span)?;
            Ok(())
        };
        // Its own locks are in nobody's way.
        match state.owners.get(&(wish.node, wish.owner)) {
            Some(owner) => look(&owner.file),
            None => files.with(wish.node, wish.handle, &mut look),
        }
        .map_err(no_locks)?;
        Ok(found.map(|(how, span)| {
            let others = state.owners.range(all_of(wish.node)).filter(|((_, owner), _)| *owner != wish.owner);
            let holder = others.map(|(_, owner)| owner).find(|owner| owner.spans.overlap(span));
            (how, span, holder.map_or(0, |owner| owner.pid))
        }))
    }

    /// A signal has come for the process that waits for a reply.
    pub fn interrupt(&self, unique: u64) {
        let mut state = self.state();
        let Some(at) = state.waiting.iter().position(|waiting| waiting.unique == unique) else {
            // It overtook its request, or comes too late, or is made up.
            if state.early.len() >= MAX_EARLY {
                state.early.pop_front();
            }
            return state.early.push_back(unique);
        };
        if let Some(Waiting { reply, .. }) = state.waiting.remove(at) {
            state.settled.push((reply, Err(errno(libc::EINTR))));
        }
    }

    /// An owner has closed a file, and with that lost its locks there (fcntl_locking(2)).
    pub fn closed_by(&self, node: u64, owner: u64) {
        self.state().drop_owner((node, owner));
    }

    /// Nobody has the guest's open file any more, which was closed here before.
    pub fn closed(&self, node: u64, handle: u64) {
        let mut state = self.state();
        if state.whole.remove(&(node, handle)).is_some() {
            state.unlocked.insert(node);
        }
        let by_it = state.owners.range(all_of(node)).filter(|(_, owner)| owner.handle == handle);
        for key in by_it.map(|(key, _)| *key).collect::<Vec<_>>() {
            state.drop_owner(key);
        }
    }

    /// The guest begins anew.
    pub fn clear(&self) {
        let mut state = self.state();
        let mut settled = std::mem::take(&mut state.settled);
        settled.extend(state.waiting.drain(..).map(|waiting| (waiting.reply, Err(errno(libc::EINTR)))));
        *state = State { settled, ..State::default() };
        drop(state);
        self.watches.keep(|_| false);
    }

    /// The threads' event is readable: what they waited for is to be tried again.
    pub fn look_at_watches(&self) {
        let mut state = self.state();
        for (wish, result) in self.watches.ended() {
            state.unlocked.insert(wish.node);
            if let Err(error) = result
                && error.raw_os_error() != Some(libc::EINTR)
            {
                state.refuse(&wish, error.raw_os_error().unwrap_or(libc::EIO));
            }
        }
    }

    /// Answers to those that have waited. To be called after each request, most of which change nothing here.
    pub fn settled(&self, files: &impl OpenFiles) -> Vec<(Reply, io::Result<()>)> {
        let mut state = self.state();
        if state.unlocked.is_empty() && state.settled.is_empty() {
            return Vec::new();
        }
        // What is tried can unlock something itself, but it does not go on for ever: it waits for less then.
        while let Some(node) = state.unlocked.pop_first() {
            self.try_again(&mut state, files, node);
        }
        self.watches.keep(|wish| state.waiting.iter().any(|waiting| waiting.wish.is_like(wish)));
        std::mem::take(&mut state.settled)
    }

    /// Tries what waits for a lock on a file, in the order in which it came.
    fn try_again(&self, state: &mut State<Reply>, files: &impl OpenFiles, node: u64) {
        for _ in 0..state.waiting.len() {
            let Some(waiting) = state.waiting.pop_front() else { return };
            if waiting.wish.node != node || state.has_rival(&waiting.wish) {
                state.waiting.push_back(waiting);
                continue;
            }
            let result = match state.attempt(files, &self.descriptors, &waiting.wish) {
                Err(error) if is_conflict(&error) => match self.wait_for(state, files, &waiting.wish) {
                    Ok(()) => {
                        state.waiting.push_back(waiting);
                        continue;
                    }
                    error => error,
                },
                other => other,
            };
            state.settled.push((waiting.reply, result.map_err(no_locks)));
        }
    }

    /// Sees to it that a lock is tried again when it can be had.
    fn wait_for(&self, state: &State<Reply>, files: &impl OpenFiles, wish: &Wish) -> io::Result<()> {
        if state.has_rival(wish) {
            return Ok(());
        }
        // Who waits is another open file than the owner's, and would wait for the owner too. Two that have a lock and both
        // want more of it wait for ever anyway, which is what the error means.
        let own = state.owners.get(&(wish.node, wish.owner));
        if !wish.whole && own.is_some_and(|owner| owner.spans.overlap(wish.span)) {
            return Err(errno(libc::EDEADLK));
        }
        self.watches.watch(wish, || self.reopen(files, wish))
    }

    fn reopen(&self, files: &impl OpenFiles, wish: &Wish) -> io::Result<File> {
        reopen(files, &self.descriptors, wish)
    }

    fn state(&self) -> MutexGuard<'_, State<Reply>> {
        // What is in it is true whoever panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<Reply> Drop for Locks<Reply> {
    fn drop(&mut self) {
        self.watches.keep(|_| false);
    }
}

fn reopen(files: &impl OpenFiles, descriptors: &OwnedFd, wish: &Wish) -> io::Result<File> {
    let mut opened = None;
    files.with(wish.node, wish.handle, &mut |file| {
        opened = Some(host::reopen(descriptors, file).map_err(|_| errno(libc::ENOLCK))?);
        Ok(())
    })?;
    opened.ok_or_else(|| errno(libc::EBADF))
}

impl<Reply> State<Reply> {
    /// Whether another owner of this guest has a lock that is in the way.
    fn has_rival(&self, wish: &Wish) -> bool {
        if wish.whole {
            let mut others = self.whole.range(all_of(wish.node)).filter(|((_, handle), _)| *handle != wish.handle);
            return others.any(|(_, how)| how.excludes(wish.how));
        }
        let mut others = self.owners.range(all_of(wish.node)).filter(|((_, owner), _)| *owner != wish.owner);
        others.any(|(_, owner)| owner.spans.excludes(wish.how, wish.span))
    }

    fn attempt(&mut self, files: &impl OpenFiles, descriptors: &OwnedFd, wish: &Wish) -> io::Result<()> {
        match (wish.whole, wish.how) {
            (true, _) => self.attempt_whole(files, wish),
            (false, How::Unlock) => self.unlock(wish),
            (false, _) => self.lock(files, descriptors, wish),
        }
    }

    fn attempt_whole(&mut self, files: &impl OpenFiles, wish: &Wish) -> io::Result<()> {
        let result = files.with(wish.node, wish.handle, &mut |file| host::set_whole(file, wish.how));
        let key = (wish.node, wish.handle);
        // One that cannot become another is lost.
        let had = match (&result, wish.how) {
            (Ok(()), How::Read | How::Write) => self.whole.insert(key, wish.how),
            (Err(error), _) if !is_conflict(error) => None,
            _ => self.whole.remove(&key),
        };
        if had.is_some() {
            self.unlocked.insert(wish.node);
        }
        result
    }

    fn unlock(&mut self, wish: &Wish) -> io::Result<()> {
        let key = (wish.node, wish.owner);
        let Some(owner) = self.owners.get_mut(&key) else { return Ok(()) };
        host::set(&owner.file, How::Unlock, wish.span)?;
        self.spans -= owner.spans.len();
        owner.spans.set(How::Unlock, wish.span);
        self.spans += owner.spans.len();
        self.unlocked.insert(wish.node);
        if owner.spans.is_empty() {
            self.drop_owner(key);
        }
        Ok(())
    }

    fn lock(&mut self, files: &impl OpenFiles, descriptors: &OwnedFd, wish: &Wish) -> io::Result<()> {
        let key = (wish.node, wish.owner);
        if self.spans >= MAX_SPANS || (!self.owners.contains_key(&key) && self.owners.len() >= MAX_OWNERS) {
            return Err(errno(libc::ENOLCK));
        }
        if self.owners.get(&key).is_none_or(|owner| wish.how == How::Write && !owner.writable) {
            self.open(files, descriptors, wish)?;
        }
        let Some(owner) = self.owners.get_mut(&key) else { return Err(errno(libc::EBADF)) };
        let result = host::set(&owner.file, wish.how, wish.span);
        if result.is_ok() {
            if owner.spans.overlap(wish.span) {
                self.unlocked.insert(wish.node); // Less than before, perhaps.
            }
            self.spans -= owner.spans.len();
            owner.spans.set(wish.how, wish.span);
            self.spans += owner.spans.len();
            (owner.handle, owner.pid) = (wish.handle, wish.pid);
        } else if owner.spans.is_empty() {
            self.owners.remove(&key);
        }
        result
    }

    /// Gives an owner an open file, or one that can be written instead of one that cannot. What it holds by that are read
    /// locks, which the new one can have beside it before the old one is closed.
    fn open(&mut self, files: &impl OpenFiles, descriptors: &OwnedFd, wish: &Wish) -> io::Result<()> {
        let file = reopen(files, descriptors, wish)?;
        let writable = host::is_writable(&file);
        if wish.how == How::Write && !writable {
            return Err(errno(libc::EBADF));
        }
        let key = (wish.node, wish.owner);
        let Some(owner) = self.owners.get_mut(&key) else {
            let owner = Owner { file, writable, spans: Spans::default(), handle: wish.handle, pid: wish.pid };
            self.owners.insert(key, owner);
            return Ok(());
        };
        owner.spans.iter().try_for_each(|(how, span)| host::set(&file, how, span))?;
        (owner.file, owner.writable) = (file, writable);
        Ok(())
    }

    /// Closes an owner's file, which unlocks all.
    fn drop_owner(&mut self, key: (u64, u64)) {
        if let Some(owner) = self.owners.remove(&key) {
            self.spans -= owner.spans.len();
            self.unlocked.insert(key.0);
        }
    }

    /// Those who want a lock that cannot be waited for are told so.
    fn refuse(&mut self, wish: &Wish, error: i32) {
        for _ in 0..self.waiting.len() {
            match self.waiting.pop_front() {
                Some(waiting) if waiting.wish.is_like(wish) => {
                    self.settled.push((waiting.reply, Err(no_locks(errno(error)))));
                }
                Some(waiting) => self.waiting.push_back(waiting),
                None => return,
            }
        }
    }
}
