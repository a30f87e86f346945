//! Waiting for a container's first log line, by inotify(7).

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

/// Watches one log that need not exist yet.
pub struct LogWatch {
    log: PathBuf,
    events: AsyncFd<OwnedFd>,
}

impl LogWatch {
    /// Starts to watch `directory` for `name`; creates the directory, as the kubelet does.
    pub fn new(directory: &Path, name: &str) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .context("the kernel refuses an inotify descriptor")?;
        inotify::add_watch(&events, directory, inotify::WatchFlags::MODIFY | inotify::WatchFlags::CREATE)
            .with_context(|| format!("cannot watch {}", directory.display()))?;
        Ok(Self { log: directory.join(name), events: AsyncFd::register(events).context("cannot wait for inotify")? })
    }

    /// Returns when the log has a line.
    pub async fn first_line(&self, limit: Duration) -> Result<()> {
        let line = async {
            let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
            while !fs::read(&self.log).is_ok_and(|log| log.contains(&b'\n')) {
                let mut ready = self.events.readable().await.context("cannot wait for inotify")?;
                let mut reader = inotify::Reader::new(self.events.get_ref(), &mut buffer);
                while reader.next().is_ok() {}
                ready.clear_ready();
            }
            Ok(())
        };
        tokio::time::timeout(limit, line)
            .await
            .with_context(|| format!("no line in {} within {limit:?}", self.log.display()))?
    }
}
