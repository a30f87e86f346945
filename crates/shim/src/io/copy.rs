//! The copies themselves. A small buffer each: what the guest sends beyond it waits in the guest.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::target::{Input, Output};
use crate::deadlines::Operation;

const BUFFER: usize = 16 << 10;

/// How far a stream has been copied.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Bytes that are where containerd reads them.
    pub bytes: u64,
    /// Nothing has come for a while since the process has ended.
    pub silent: bool,
}

/// Copies output until the guest ends it, and tells how far it is. Who follows that learns of the end by its closing.
pub async fn from_guest(
    mut connection: UnixStream,
    mut output: Output,
    mut ended: watch::Receiver<bool>,
    progress: watch::Sender<Progress>,
) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let silent = async {
            is_set(&mut ended).await;
            tokio::time::sleep(Operation::SilentOutput.budget()).await;
        };
        let bytes = tokio::select! {
            // Bytes before the silence: a shim that did not run for a while finds both.
            biased;
            count = connection.read(&mut buffer) => match count {
                Ok(count @ 1..) => buffer.get(..count).unwrap_or_default(),
                Ok(0) | Err(_) => return,
            },
            () = silent, if !progress.borrow().silent => {
                progress.send_modify(|progress| progress.silent = true);
                continue;
            }
        };
        if let Err(error) = output.write_all(bytes).await {
            tracing::warn!(%error, "cannot write a process's output to its fifo or file; the rest of it is lost");
            return;
        }
        let count = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        progress.send_modify(|progress| progress.bytes = progress.bytes.saturating_add(count));
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
