//! A connection that the host asks for.

use std::os::fd::OwnedFd;

use super::ConnectError;

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
