//! A pid on the host for a process in a guest (DESIGN D10): a parked thread, whose id is in /proc as long as it lives.
//!
//! containerd builds `/proc/<pid>/ns/...` paths from the pids that a shim reports, and tells containers apart by them.

use std::sync::mpsc::{Sender, channel};
use std::thread::Builder;

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
    /// Starts the thread.
    pub fn new() -> std::io::Result<Self> {
        let (alive, parked) = channel::<()>();
        let (tell, told) = channel();
        Builder::new().name("bulkhead-task".to_owned()).stack_size(STACK).spawn(move || {
            let _ = tell.send(rustix::thread::gettid());
            let _ = parked.recv();
        })?;
        let pid = told.recv().map_err(std::io::Error::other)?;
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
        let pid = HostPid::new().unwrap();
        assert!(std::path::Path::new(&format!("/proc/{}/ns/pid", pid.get())).exists());
        assert_ne!(pid.get(), HostPid::new().unwrap().get());
    }
}
