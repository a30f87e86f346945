//! Standard streams of processes (ARCHITECTURE.md, D8): the agent's ends of their pipes and terminals, and who is attached
//! to them.
//!
//! A stream waits in [`Streams`] until a connection names it; then the connection's task owns it and copies
//! ([`copy`]). What a process has written stays in its pipe meanwhile, which is also all the buffer there is: a host that
//! does not read stops the writer, as a pipe's reader would.

pub mod copy;
pub mod ends;
pub mod serve;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::stdio::Stream;
use tokio::sync::oneshot;

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
    table: Mutex<HashMap<Owner, HashMap<Stream, Slot>>>,
}

#[derive(Debug)]
enum Slot {
    /// Not attached yet.
    Waiting(OwnedFd),
    /// Attached; dropping the sender ends the copying.
    Attached { _close: oneshot::Sender<()> },
}

/// A stream in the hands of its connection.
#[derive(Debug)]
pub struct Attachment {
    /// The agent's end.
    pub end: OwnedFd,
    /// Resolves when the stream's process is deleted.
    pub closed: oneshot::Receiver<()>,
}

impl Streams {
    /// Adds the streams of a process that has been created.
    pub fn add(&self, owner: Owner, ends: impl IntoIterator<Item = (Stream, OwnedFd)>) {
        let slots = ends.into_iter().map(|(stream, end)| (stream, Slot::Waiting(end))).collect();
        self.table().insert(owner, slots);
    }

    /// Hands a stream to a connection. `None` if there is none or it is taken.
    pub fn attach(&self, owner: &Owner, stream: Stream) -> Option<Attachment> {
        let mut table = self.table();
        let slots = table.get_mut(owner)?;
        let (close, closed) = oneshot::channel();
        match slots.remove(&stream)? {
            Slot::Waiting(end) => {
                slots.insert(stream, Slot::Attached { _close: close });
                Some(Attachment { end, closed })
            }
            taken @ Slot::Attached { .. } => {
                slots.insert(stream, taken);
                None
            }
        }
    }

    /// Closes and forgets the streams of a process.
    pub fn remove(&self, owner: &Owner) {
        self.table().remove(owner);
    }

    /// Closes and forgets the streams of a container's processes.
    pub fn remove_container(&self, container_id: &str) {
        self.table().retain(|owner, _| owner.container_id != container_id);
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Owner, HashMap<Stream, Slot>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
