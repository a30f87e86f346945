//! Waiting for what a container's log is to say, by inotify(7).

use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;

/// Watches one log that need not exist yet.
pub struct LogWatch {
    log: PathBuf,
    events: OwnedFd,
}

impl LogWatch {
    /// Starts to watch `directory` for `name`; creates the directory, as the kubelet does.
    pub fn new(directory: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let events = inotify::init(flags).context("the kernel refuses an inotify descriptor")?;
        inotify::add_watch(&events, directory, inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE)
            .with_context(|| format!("cannot watch {}", directory.display()))?;
        Ok(Self { log: directory.join(name), events })
    }

    /// Returns when the log has a line.
    pub async fn first_line(self, limit: Duration) -> Result<()> {
        self.contains("\n".to_owned(), limit).await
    }

    /// Returns when the log contains a text.
    pub async fn contains(self, text: String, limit: Duration) -> Result<()> {
        let wait = move || self.wait(&text, Instant::now() + limit);
        tokio::task::spawn_blocking(wait).await.context("the watch panicked")?
    }

    fn wait(&self, text: &str, deadline: Instant) -> Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        while !fs::read(&self.log).is_ok_and(|log| String::from_utf8_lossy(&log).contains(text)) {
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
            let mut fds = [PollFd::new(&self.events, PollFlags::IN)];
            let ready = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left)))?;
            ensure!(ready > 0, "no {text:?} in {}", self.log.display());
            let mut reader = inotify::Reader::new(&self.events, &mut buffer);
            while reader.next().is_ok() {}
        }
        Ok(())
    }
}
