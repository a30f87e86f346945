//! The copies themselves. A small buffer each: what the guest sends beyond it waits in the guest.

use std::io::Write;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::target::{Input, Output};

const BUFFER: usize = 16 << 10;

/// How long a guest may send nothing after the process has ended, before its stream is taken for ended. What was written
/// is in the guest's buffers and comes at once, however slowly it is read here; a guest that keeps the stream open must not
/// keep containerd waiting.
const SILENCE: Duration = Duration::from_secs(5);

/// Copies output until the guest ends it, or its process has ended and nothing comes any more.
pub async fn from_guest(mut connection: UnixStream, mut output: Output, mut ended: watch::Receiver<bool>) {
    let mut buffer = vec![0; BUFFER];
    while let Some(count) = next(&mut connection, &mut buffer, &mut ended).await {
        let bytes = buffer.get(..count).unwrap_or_default();
        let written = match &mut output {
            Output::Fifo(fifo) => fifo.write_all(bytes).await,
            // A regular file does not block for long, and has no readiness to wait for.
            Output::File(file) => file.write_all(bytes),
        };
        if let Err(error) = written {
            tracing::warn!(%error, "cannot write a process's output");
            return;
        }
    }
}

/// Reads some bytes; `None` at the end.
async fn next(connection: &mut UnixStream, buffer: &mut [u8], ended: &mut watch::Receiver<bool>) -> Option<usize> {
    let silent = async {
        is_set(ended).await;
        tokio::time::sleep(SILENCE).await;
    };
    tokio::select! {
        // Bytes before the silence: a shim that did not run for a while finds both.
        biased;
        count = connection.read(buffer) => count.ok().filter(|count| *count > 0),
        () = silent => None,
    }
}

/// Returns when the flag is set, or its process forgotten.
async fn is_set(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|set| *set).await;
}

/// Copies stdin until its last writer is gone, which is after `closed` says so, and ends the guest's side.
pub async fn to_guest(mut input: Input, mut connection: UnixStream, mut closed: watch::Receiver<bool>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        tokio::select! {
            () = is_set(&mut closed), if input.keep_open.is_some() => input.keep_open = None,
            count = input.reader.read(&mut buffer) => match count {
                Ok(count @ 1..) => {
                    if connection.write_all(buffer.get(..count).unwrap_or_default()).await.is_err() {
                        return;
                    }
                }
                Ok(0) | Err(_) => break,
            },
        }
    }
    // Half-close: the process reads an end of file, and its output goes on.
    let _ = connection.shutdown().await;
}
