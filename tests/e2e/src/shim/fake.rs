//! A socket that answers one question as containerd's gRPC server does: which version it is.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context, Result};

/// Answers until the process ends: a thread that waits for connections.
pub struct FakeContainerd(String);

impl FakeContainerd {
    /// Listens at a path.
    pub fn listen(path: &Path, version: &str) -> Result<Self> {
        let listener = UnixListener::bind(path).context("cannot listen as containerd")?;
        let answer = answer(version);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                // The question is smaller than what a socket holds, and what it says is known.
                let mut question = [0; 4096];
                let _ = stream.read(&mut question).and_then(|_| stream.write_all(&answer));
            }
        });
        Ok(Self(path.display().to_string()))
    }

    /// Its path.
    pub fn path(&self) -> &str {
        &self.0
    }
}

/// Settings, headers with status 200, a message with the version, and trailers, as frames of HTTP/2 (RFC 9113).
fn answer(version: &str) -> Vec<u8> {
    let length = |bytes: &[u8]| u8::try_from(bytes.len()).unwrap_or(0);
    let mut message = vec![0, 0, 0, 0, length(version.as_bytes()) + 2, 0x0a, length(version.as_bytes())];
    message.extend_from_slice(version.as_bytes());
    let mut bytes = Vec::new();
    for (kind, flags, stream, payload) in
        [(4, 0, 0, &[][..]), (1, 4, 1, &[0x88]), (0, 0, 1, &message), (1, 5, 1, &[0x88])]
    {
        bytes.extend([0, 0, length(payload), kind, flags, 0, 0, 0, stream]);
        bytes.extend_from_slice(payload);
    }
    bytes
}
