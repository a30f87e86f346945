//! A pid on the host for a process in a guest (ARCHITECTURE.md, D10): a parked thread, whose id is in /proc as long as it
//! lives.
//!
//! containerd builds `/proc/<pid>/ns/...` paths from the pids that a shim reports, and tells containers apart by them.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread::Builder;

use crate::network::netns;

/// The smallest stack that a thread may have (pthread_attr_setstacksize(3)); the thread only waits.
const STACK: usize = 16 << 10;

/// A thread that exists until this is dropped.
#[derive(Debug)]
pub struct HostPid {
    pid: u32,
    /// Dropping it wakes the thread, which ends.
    _alive: Sender<()>,
}

impl HostPid {
    /// Starts the thread, in a network namespace if there is one: `/proc/<pid>/ns/net` is the pod's.
    pub fn new(netns: Option<&Path>) -> std::io::Result<Self> {
        let (alive, parked) = channel::<()>();
        let (tell, told) = channel();
        let netns = netns.map(PathBuf::from);
        Builder::new().name("bulkhead-task".to_owned()).stack_size(STACK).spawn(move || {
            // Moves this thread alone.
            let entered = netns.as_deref().map_or(Ok(()), netns::enter);
            let _ = tell.send(entered.map(|()| rustix::thread::gettid()));
            let _ = parked.recv();
        })?;
        let pid = told.recv().map_err(std::io::Error::other)??;
        Ok(Self { pid: pid.as_raw_nonzero().get().unsigned_abs(), _alive: alive })
    }

    /// The thread's id.
    pub fn get(&self) -> u32 {
        self.pid
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pid_is_in_proc_while_it_is_held() {
        let pid = HostPid::new(None).unwrap();
        assert!(std::path::Path::new(&format!("/proc/{}/ns/pid", pid.get())).exists());
        assert_ne!(pid.get(), HostPid::new(None).unwrap().get());
    }
}
