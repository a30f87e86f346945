//! Reaping, the duty of PID 1.
//!
//! Every process of the guest that loses its parent becomes the agent's child, and containers' processes are its children
//! from the start (libcontainer clones them as siblings of the helper). One task peeks at whatever child has ended
//! (waitid(2) with WNOWAIT), tells the owner, and only then reaps it: until then the pid cannot be given to another
//! process. A child without an owner is an orphan and just reaped. Nobody else in the agent may wait for children.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::signal::unix;
use tokio::sync::watch;

use crate::sys;

/// How a process ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Exit {
    /// Exit status, or 128 + signal.
    pub code: u32,
}

/// Tells when a process has ended. Any number of clones may wait.
#[derive(Clone, Debug)]
pub struct ExitWatch(watch::Receiver<Option<Exit>>);

impl ExitWatch {
    /// Waits for the end.
    pub async fn wait(&mut self) -> Exit {
        match self.0.wait_for(Option::is_some).await.map(|exit| *exit) {
            Ok(Some(exit)) => exit,
            // The reaper is gone, which means that the agent is.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Whether the process has ended.
    pub fn ended(&self) -> bool {
        self.0.borrow().is_some()
    }
}

/// Knows which pid belongs to whom.
#[derive(Debug, Default)]
pub struct Reaper {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    owners: HashMap<u32, watch::Sender<Option<Exit>>>,
    /// Processes being created, whose pids are not known yet.
    births: usize,
    /// Number of the latest birth.
    latest: u64,
    /// Ends of pids without an owner, kept while there are births: one of them may turn out to be the child. With the
    /// number of the latest birth by then: who began later has another child, which got the pid again.
    unclaimed: HashMap<u32, (Exit, u64)>,
}

/// A process is about to be created; see [`Reaper::expect`].
#[derive(Debug)]
pub struct Birth {
    reaper: Arc<Reaper>,
    number: u64,
}

impl Reaper {
    /// To be called before a process is created, and held until its pid is claimed: it may end before that.
    pub fn expect(self: &Arc<Self>) -> Birth {
        let mut table = self.table();
        table.births += 1;
        table.latest += 1;
        Birth { reaper: Arc::clone(self), number: table.latest }
    }

    /// Sends a signal to a process that has an owner. `false` if it has ended: its pid may be another's by now.
    pub fn kill(&self, pid: u32, signal: u32) -> std::io::Result<bool> {
        let table = self.table();
        if !table.owners.contains_key(&pid) {
            return Ok(false);
        }
        sys::kill(pid, signal).map(|()| true)
    }

    /// Kills a process that has an owner, and the rest of the process group that it leads.
    pub fn kill_group(&self, pid: u32) -> std::io::Result<()> {
        let table = self.table();
        let leader = i32::try_from(pid).ok().and_then(Pid::from_raw);
        // Until it is reaped its group's number is no other's.
        match leader.filter(|_| table.owners.contains_key(&pid)) {
            Some(leader) => Ok(kill_process_group(leader, Signal::KILL)?),
            None => Ok(()),
        }
    }

    /// Reaps until the agent ends, at once and then whenever SIGCHLD comes.
    pub async fn run(self: Arc<Self>, mut children: unix::Signal) {
        loop {
            while self.reap_one() {}
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    /// Reaps one ended child, if there is one.
    fn reap_one(&self) -> bool {
        let Some(child) = sys::peek_ended_child() else { return false };
        let Ok(pid) = u32::try_from(child.pid) else { return false };
        let exit = Exit { code: child.code };
        let mut table = self.table();
        let owner = table.owners.remove(&pid);
        if owner.is_none() && table.births > 0 {
            table.keep(pid, exit);
        }
        // Under the lock, so that `kill` never meets a pid that is free again.
        let reaped = sys::reap(child);
        drop(table);
        if let Some(owner) = owner {
            owner.send_replace(Some(exit));
        }
        reaped.is_ok()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Keeps an end that nobody owns.
    fn keep(&mut self, pid: u32, exit: Exit) {
        let latest = self.latest;
        self.unclaimed.insert(pid, (exit, latest));
    }
}

impl Birth {
    /// Makes the caller the owner of a pid.
    pub fn claim(&self, pid: u32) -> ExitWatch {
        let (sender, receiver) = watch::channel(None);
        let mut table = self.reaper.table();
        match table.unclaimed.get(&pid) {
            Some((exit, latest)) if *latest >= self.number => {
                sender.send_replace(Some(*exit));
                table.unclaimed.remove(&pid);
            }
            _ => drop(table.owners.insert(pid, sender)),
        }
        ExitWatch(receiver)
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        let mut table = self.reaper.table();
        table.births -= 1;
        if table.births == 0 {
            table.unclaimed.clear();
        }
    }
}

#[cfg(test)]
mod tests;
