//! Why a standard stream cannot be connected.

use bulkhead_protocol::stdio::{HeaderError, Stream};

use crate::host_files::HostFilesError;
use crate::sandbox::agent::AgentError;

/// A standard stream cannot be connected.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The host's end.
    #[error("cannot open {path} for a standard stream; has containerd removed it, or is its disk full?")]
    Open {
        /// As containerd gave it.
        path: String,
        /// open(2).
        #[source]
        source: std::io::Error,
    },
    /// A scheme that we do not have.
    #[error("a standard stream has the unknown scheme {0:?}; fifos and file:// are supported")]
    Scheme(String),
    /// The ids are too long.
    #[error(transparent)]
    Header(HeaderError),
    /// The guest does not have it.
    #[error("the guest refused the connection of the standard stream {0:?}; the process may have ended")]
    Refused(Stream),
    /// The connection broke.
    #[error("the guest did not accept the connection of a standard stream; it may be short of CPU, or hang")]
    Handshake(#[source] std::io::Error),
    /// Its file system.
    #[error(transparent)]
    HostFiles(#[from] HostFilesError),
    /// No connection.
    #[error(transparent)]
    Agent(#[from] AgentError),
}
