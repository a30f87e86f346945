//! Copying between a stream's end and its connection, one direction each.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};

use crate::sys;

/// Bytes copied at once: a default pipe's half, so that reader and writer overlap.
const CHUNK: usize = 32 * 1024;

/// From a process to the host, until every writer has closed; then the host is told so.
pub async fn output(end: OwnedFd, mut connection: impl AsyncWrite + Unpin) -> io::Result<()> {
    let end = nonblocking(end, Interest::READABLE)?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = end.async_io(Interest::READABLE, |end| match rustix::io::read(end, &mut chunk) {
            // A terminal whose last user has closed it: a hangup.
            Err(Errno::IO) => Ok(0),
            other => other.map_err(Into::into),
        });
        let read = read.await?;
        let Some(bytes @ [_, ..]) = chunk.get(..read) else { break };
        connection.write_all(bytes).await?;
    }
    connection.shutdown().await
}

/// From the host to a process, until the host closes its direction; then the process reads an end of file.
pub async fn input(mut connection: impl AsyncRead + Unpin, end: OwnedFd) -> io::Result<()> {
    let end = nonblocking(end, Interest::WRITABLE)?;
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

/// Only the agent's end is made so: the two ends of a pipe or terminal are open files of their own.
fn nonblocking(end: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&end, true)?;
    sys::watch(end, interest)
}
