//! The guest that is played: what runs in it, and the lies that its script names.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use bulkhead_protocol::control::{self as socket, Reply};

/// Container and exec id.
pub(super) type Key = (String, String);

/// The machine and what runs in it.
pub(super) struct Guest {
    pub(super) control: OwnedFd,
    /// What is struck where.
    pub(super) script: Vec<(String, String)>,
    pub(super) cmdline: String,
    pub(super) console: Option<OwnedFd>,
    /// Processes, with the exit codes of those that have ended.
    pub(super) processes: Mutex<HashMap<Key, Option<u32>>>,
    pub(super) changed: Condvar,
}

impl Guest {
    /// The lies for a place.
    pub(super) fn lies(&self, place: &str) -> impl Iterator<Item = &str> {
        self.script.iter().filter(move |(at, _)| at == place).map(|(_, what)| what.as_str())
    }

    pub(super) fn processes(&self) -> MutexGuard<'_, HashMap<Key, Option<u32>>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of a process; `None` for one that is not known.
    pub(super) fn wait(&self, key: &Key) -> Option<u32> {
        let mut processes = self.processes();
        loop {
            match processes.get(key) {
                Some(None) => processes = self.changed.wait(processes).unwrap_or_else(PoisonError::into_inner),
                Some(Some(code)) => return Some(*code),
                None => return None,
            }
        }
    }

    pub(super) fn reply(&self, reply: &Reply) -> Result<()> {
        Ok(socket::send(&self.control, reply, &[])?)
    }
}

/// Keeps the thread, and what it holds, until the process ends.
pub(super) fn forever() -> ! {
    loop {
        std::thread::park();
    }
}
