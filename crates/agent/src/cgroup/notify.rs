//! Waiting for changes of a kernfs file (`cgroup.events`, `memory.events`): the kernel signals them as priority events on
//! an open descriptor, poll(2)'s POLLPRI, since the descriptor's last read.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::Path;

use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

use crate::sys;

/// An open file of kernfs.
#[derive(Debug)]
pub struct KernfsFile {
    file: File,
    /// A duplicate of the same descriptor: what it has read counts for both.
    watch: AsyncFd<OwnedFd>,
}

impl KernfsFile {
    /// Opens a file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let watch = sys::watch(file.try_clone()?.into(), Interest::PRIORITY)?;
        Ok(Self { file, watch })
    }

    /// The whole content.
    pub fn read(&mut self) -> io::Result<String> {
        let mut text = String::new();
        self.file.rewind()?;
        self.file.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Waits until the content has changed since it was last read. May return without a change.
    pub async fn changed(&self) -> io::Result<()> {
        let mut ready = self.watch.ready(Interest::PRIORITY).await?;
        ready.clear_ready_matching(Ready::ALL);
        Ok(())
    }
}
