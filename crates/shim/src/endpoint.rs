//! Where a pod's daemon is reached: its socket, and beside it a record of its process, for the `delete` that has to end a
//! daemon which nobody asks to end. The pod's own directory is no place for that: there is none before its VM and after.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// A daemon's socket and record.
#[derive(Debug)]
pub struct Endpoint {
    socket: PathBuf,
    withdrawn: AtomicBool,
}

impl Endpoint {
    /// Names them; nothing is made.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, withdrawn: AtomicBool::new(false) }
    }

    /// The socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The record, see [`crate::sandbox::record`].
    pub fn record(&self) -> PathBuf {
        self.socket.with_extension("pid")
    }

    /// The daemon has been asked to end, and will. containerd runs `delete` upon the end of its connection: that must not
    /// kill a daemon which still has members of the pod to tell of, or its last events to send.
    pub fn ends_by_itself(&self) {
        if !self.withdrawn.load(Ordering::Relaxed) {
            let _ = std::fs::remove_file(self.record());
        }
    }

    /// Removes both, once: what is there later is of the next daemon with the same id. To be called while the socket is
    /// still listened on, for a `start` that finds it listening leaves it alone.
    pub fn withdraw(&self) {
        if !self.withdrawn.swap(true, Ordering::Relaxed) {
            let _ = std::fs::remove_file(self.record());
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_daemons_socket_and_record_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::new(dir.path().join("socket"));
        let make = || {
            std::fs::write(endpoint.socket(), "").unwrap();
            std::fs::write(endpoint.record(), "").unwrap();
        };
        let exist = || (endpoint.socket().exists(), endpoint.record().exists());
        make();
        endpoint.ends_by_itself();
        assert_eq!(exist(), (true, false));
        endpoint.withdraw();
        assert_eq!(exist(), (false, false));
        make();
        endpoint.withdraw();
        endpoint.ends_by_itself();
        assert_eq!(exist(), (true, true));
    }
}
