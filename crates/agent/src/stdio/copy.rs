//! Copying between a stream's end and its connection, one direction each. Only the agent's end is made non-blocking: the two
//! ends of a pipe or terminal are open files of their own.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};

use super::output::Output;
use crate::sys;

/// Bytes copied at once: a default pipe's half, so that reader and writer overlap.
const CHUNK: usize = 32 * 1024;

/// From a process to the host, until every writer has closed; then the host is told so.
pub async fn output(output: Output, mut connection: impl AsyncWrite + Unpin) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&output.end, true)?;
    let end = sys::watch_shared(Arc::clone(&output.end), Interest::READABLE)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = end.async_io(Interest::READABLE, |_| output.read(&mut chunk)).await?;
        let Some(bytes @ [_, ..]) = chunk.get(..read) else { break };
        connection.write_all(bytes).await?;
    }
    connection.shutdown().await
}

/// From the host to a process, until the host closes its direction; then the process reads an end of file.
pub async fn input(mut connection: impl AsyncRead + Unpin, end: OwnedFd) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&end, true)?;
    let end = sys::watch(end, Interest::WRITABLE)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = connection.read(&mut chunk).await?;
        let Some(mut bytes @ [_, ..]) = chunk.get(..read) else { return Ok(()) };
        while !bytes.is_empty() {
            let write = end.async_io(Interest::WRITABLE, |end| rustix::io::write(end, bytes).map_err(Into::into));
            bytes = bytes.get(write.await?..).unwrap_or_default();
        }
    }
}
