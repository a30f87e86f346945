//! A connection that the host asks for.

use std::os::fd::OwnedFd;
use std::time::Duration;

/// How long the guest may take to answer a REQUEST, or a SHUTDOWN of both directions. Far beyond what its kernel needs
/// on a busy host, and short enough for a caller that has promised its own caller an answer. A REQUEST that waits for the
/// driver has the same time; whoever starts a guest waits for its ready sign first.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Most connections. A pod has three for each process with attached streams and a few for RPCs.
pub const MAX_CONNECTIONS: usize = 1024;

/// Who waits for a connection.
pub type Done = Box<dyn FnOnce(Result<(), ConnectError>) + Send>;

/// A wish for a connection. It is answered exactly once, by being dropped if nothing else happens.
pub struct Connect {
    pub port: u32,
    pub stream: Option<OwnedFd>,
    done: Option<Done>,
}

impl Connect {
    pub fn new(port: u32, stream: OwnedFd, done: Done) -> Self {
        Self { port, stream: Some(stream), done: Some(done) }
    }

    pub fn succeed(mut self) {
        self.answer(Ok(()));
    }

    pub fn fail(mut self, error: ConnectError) {
        self.answer(Err(error));
    }

    fn answer(&mut self, result: Result<(), ConnectError>) {
        if let Some(done) = self.done.take() {
            done(result);
        }
    }
}

impl Drop for Connect {
    fn drop(&mut self) {
        self.answer(Err(ConnectError::Stopped));
    }
}

/// A connection that did not come about.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ConnectError {
    /// The guest answered with a reset.
    #[error("nothing in the guest listens on port {0}")]
    Refused(u32),
    /// The guest did not answer, or its driver did not start.
    #[error("the guest did not answer within {} s", ANSWER_TIMEOUT.as_secs())]
    TimedOut,
    /// Beyond the limit of connections.
    #[error("all {} vsock connections of the guest are in use", MAX_CONNECTIONS)]
    TooMany,
    /// The asking side closed its end of the stream.
    #[error("the stream was closed before the guest accepted")]
    Abandoned,
    /// The guest reset or broke its device, or the machine ends.
    #[error("the guest's vsock device was stopped")]
    Stopped,
    /// epoll_ctl(2) would not take the stream.
    #[error("the stream cannot be watched; is it a socket?")]
    Stream,
}
