//! The host's end of a stream: a fifo, or a file that containerd names by URI (containerd: pkg/cio/io.go).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use super::IoError;

/// Where output goes.
#[derive(Debug)]
pub enum Output {
    /// A fifo, held open for reading as well: the last reader going away (containerd's restart) is not an error.
    Fifo(pipe::Sender),
    /// A file that is appended to: one that a URI names, or that is there at a plain path.
    File(Arc<File>),
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
                make_parent(path).and_then(|()| append().create(true).open(path)).map(Self::of_file).map_err(failed)
            }
            "" if !is_fifo() => append().open(path).map(Self::of_file).map_err(failed),
            "" | "fifo" => pipe::OpenOptions::new().read_write(true).open_sender(path).map(Self::Fifo).map_err(failed),
            other => Err(IoError::Scheme(other.to_owned())),
        }
    }

    fn of_file(file: File) -> Self {
        Self::File(Arc::new(file))
    }

    /// Writes all of it. What goes to files of the host is written by the few threads of the runtime's pool, which has no other
    /// work: a disk that hangs stops output to files, and nothing else.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => fifo.write_all(bytes).await,
            Self::File(file) => {
                let (file, bytes) = (file.clone(), bytes.to_vec());
                let written = tokio::task::spawn_blocking(move || (&*file).write_all(&bytes)).await;
                written.unwrap_or_else(|error| Err(io::Error::other(error)))
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
