//! PID 1 of the pid namespace that the pod's containers share (Kubernetes' shareProcessNamespace): holds the namespace
//! open and reaps its orphans, as the pause process does elsewhere.

use nix::sys::signal::{SigSet, Signal};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::sys;

/// First argument of the process, by which the agent's program knows what it is.
pub const ARGUMENT: &str = "pid-namespace";

/// Reaps until it is killed. Signals from inside the namespace cannot end it, see pid_namespaces(7).
pub fn main() -> i32 {
    // Nothing of this process is for the containers that can see it.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let sigchld = SigSet::from(Signal::SIGCHLD);
    // Blocked, it stays pending until it is waited for, so no end goes unseen.
    if sigchld.thread_block().is_err() {
        return 1;
    }
    loop {
        while let Some(child) = sys::peek_ended_child() {
            let _ = sys::reap(child);
        }
        let _ = sigchld.wait();
    }
}
