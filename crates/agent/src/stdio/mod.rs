//! Standard streams of processes (ARCHITECTURE.md, D8): the agent's ends of their pipes and terminals, and who is attached
//! to them.
//!
//! A stream waits in [`Streams`] until a connection names it; then the connection's task owns it and copies
//! ([`copy`]). What a process has written stays in its pipe meanwhile, which is also all the buffer there is: a host that
//! does not read stops the writer, as a pipe's reader would.

pub mod copy;
pub mod ends;
pub mod output;
pub mod serve;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::stdio::Stream;
use tokio::sync::oneshot;

use output::{Meter, Output};

/// A process: its container and its exec id, which is empty for init.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Owner {
    /// The container.
    pub container_id: String,
    /// The exec; empty for init.
    pub exec_id: String,
}

/// The streams of every process.
#[derive(Debug, Default)]
pub struct Streams {
    table: Mutex<HashMap<Owner, HashMap<Stream, Entry>>>,
}

#[derive(Debug)]
struct Entry {
    slot: Slot,
    meter: Option<Meter>,
}

#[derive(Debug)]
enum Slot {
    /// Not attached yet.
    Waiting(End),
    /// Attached; dropping the sender ends the copying.
    Attached { _close: oneshot::Sender<()> },
}

/// The agent's end of a stream.
#[derive(Debug)]
pub enum End {
    /// Of standard input.
    Input(OwnedFd),
    /// Of the others.
    Output(Output),
}

/// A stream in the hands of its connection.
#[derive(Debug)]
pub struct Attachment {
    /// The agent's end.
    pub end: End,
    /// Resolves when the stream's process is deleted.
    pub closed: oneshot::Receiver<()>,
}

impl Streams {
    /// Adds the streams of a process that has been created.
    pub fn add(&self, owner: Owner, ends: impl IntoIterator<Item = (Stream, OwnedFd)>) {
        let entries = ends.into_iter().map(|(stream, end)| (stream, Entry::new(stream, end))).collect();
        self.table().insert(owner, entries);
    }

    /// Hands a stream to a connection. `None` if there is none or it is taken.
    pub fn attach(&self, owner: &Owner, stream: Stream) -> Option<Attachment> {
        let mut table = self.table();
        let entry = table.get_mut(owner)?.get_mut(&stream)?;
        if matches!(entry.slot, Slot::Attached { .. }) {
            return None;
        }
        let (close, closed) = oneshot::channel();
        match std::mem::replace(&mut entry.slot, Slot::Attached { _close: close }) {
            Slot::Waiting(end) => Some(Attachment { end, closed }),
            Slot::Attached { .. } => None,
        }
    }

    /// How much has been written to a process's pipe so far. `None` for a terminal, and what the process does not have.
    pub fn written(&self, owner: &Owner, stream: Stream) -> Option<u64> {
        let table = self.table();
        table.get(owner)?.get(&stream)?.meter.as_ref().map(Meter::written)
    }

    /// Closes and forgets the streams of a process.
    pub fn remove(&self, owner: &Owner) {
        self.table().remove(owner);
    }

    /// Closes and forgets the streams of a container's processes.
    pub fn remove_container(&self, container_id: &str) {
        self.table().retain(|owner, _| owner.container_id != container_id);
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Owner, HashMap<Stream, Entry>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn new(stream: Stream, end: OwnedFd) -> Self {
        if stream == Stream::Stdin {
            return Self { slot: Slot::Waiting(End::Input(end)), meter: None };
        }
        let output = Output::new(end);
        Self { meter: Meter::of(&output), slot: Slot::Waiting(End::Output(output)) }
    }
}

#[cfg(test)]
mod tests;
