//! The host's end of a stream: a fifo, or a file that containerd names by URI (containerd: pkg/cio/io.go).

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use super::IoError;

/// Where output goes.
#[derive(Debug)]
pub enum Output {
    /// A fifo, held open for reading as well: the last reader going away (containerd's restart) is not an error.
    Fifo(pipe::Sender),
    /// A file that is appended to: one that a URI names, or that is there at a plain path.
    File(File),
}

impl Output {
    /// Opens a path or URI. Blocks as long as the file system does. Only a URI's file is made if it is not there: containerd
    /// removes the fifos of a process that it has given up, and a file in a fifo's place would take all that the guest sends into
    /// the node's memory.
    pub fn open(target: &str) -> Result<Self, IoError> {
        let (scheme, path) = split(target);
        let failed = |source| IoError::Open { path: target.to_owned(), source };
        let is_fifo = || std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
        match scheme {
            "file" => {
                let file = make_parent(path).and_then(|()| append().create(true).open(path)).map_err(failed)?;
                Ok(Self::File(File::from_std(file)))
            }
            "" if !is_fifo() => Ok(Self::File(File::from_std(append().open(path).map_err(failed)?))),
            "" | "fifo" => pipe::OpenOptions::new().read_write(true).open_sender(path).map(Self::Fifo).map_err(failed),
            other => Err(IoError::Scheme(other.to_owned())),
        }
    }

    /// Writes all of it. What goes to files of the host is written by the few threads of the runtime's pool, which has no other
    /// work: a disk that hangs stops output to files, and nothing else.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => fifo.write_all(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                // Until then the pool may have it still to write.
                file.flush().await
            }
        }
    }
}

fn make_parent(path: &str) -> std::io::Result<()> {
    Path::new(path).parent().map_or(Ok(()), std::fs::create_dir_all)
}

fn append() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.append(true).mode(0o640);
    options
}

/// Where stdin comes from.
#[derive(Debug)]
pub struct Input {
    /// Its reading end.
    pub reader: pipe::Receiver,
    /// Held until containerd says that stdin is closed, so that a restart of containerd does not end it.
    pub keep_open: Option<pipe::Sender>,
}

impl Input {
    /// Opens a fifo. Blocks as long as its file system does.
    pub fn open(target: &str) -> Result<Self, IoError> {
        let (scheme, path) = split(target);
        if !matches!(scheme, "" | "fifo") {
            return Err(IoError::Scheme(scheme.to_owned()));
        }
        let failed = |source| IoError::Open { path: target.to_owned(), source };
        let reader = pipe::OpenOptions::new().open_receiver(path).map_err(failed)?;
        let keep_open = pipe::OpenOptions::new().open_sender(path).map_err(failed)?;
        Ok(Self { reader, keep_open: Some(keep_open) })
    }
}

fn split(target: &str) -> (&str, &str) {
    let (scheme, rest) = target.split_once("://").unwrap_or(("", target));
    // A query names options of other schemes; a path of ours has none.
    (scheme, if scheme.is_empty() { rest } else { rest.split('?').next().unwrap_or(rest) })
}
