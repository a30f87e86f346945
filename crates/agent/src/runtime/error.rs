//! Why a process could not be created.

use std::io;
use std::path::PathBuf;

use bulkhead_protocol::control::ControlError;

/// A process could not be created or started.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The guest's own tmpfs.
    #[error("cannot write or remove {path}")]
    Files { path: PathBuf, source: io::Error },
    /// The helper could not be run.
    #[error("cannot run the helper that creates containers")]
    Spawn(#[source] io::Error),
    /// The socket pair to the helper.
    #[error("cannot talk to the helper that creates containers")]
    Talk(#[source] ControlError),
    /// It crashed or was killed.
    #[error(
        "the helper that creates containers ended without an answer (exit status {code:?}); the guest may be out of memory, and its console in the shim's log may say why"
    )]
    HelperEnded { code: Option<u32> },
    /// It is stuck, or what it creates is.
    #[error(
        "the helper that creates containers does not answer within 45 s; a process of the container may have stopped it (SIGSTOP, ptrace), or the file system of a volume does not answer"
    )]
    Slow,
    /// libcontainer's own words.
    #[error("{0}")]
    Refused(String),
    /// Init does not wait any more.
    #[error("cannot start the container, its init does not answer on {path}; it may have been killed")]
    Start { path: PathBuf, source: io::Error },
}
