//! Moments of a pod's life, recognized from outside: by what the shim writes as it goes, and by a request that waits
//! in the socket of a VMM that was stopped before. Nothing here is a matter of speed: a moment that has come stays
//! until the caller goes on.

use std::collections::HashSet;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::processes::recorded;
use crate::{PATIENCE, node_command};

/// Runs what waits in a thread of its own, so that the call whose moment is awaited goes on.
async fn beside<T: Send + 'static>(wait: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(wait).await.context("what waits has panicked")?
}

/// Waits until `fd` is ready, to a deadline.
fn ready(fd: &impl AsFd, flags: PollFlags, deadline: Instant) -> Result<bool> {
    let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
    let mut fds = [PollFd::new(fd, flags)];
    Ok(rustix::io::retry_on_intr(|| poll(&mut fds, Some(&left)))? > 0)
}

/// Watches a path by inotify(7); made before what it is to see.
pub struct Watch {
    events: OwnedFd,
    path: PathBuf,
}

impl Watch {
    /// Files that come and are closed in a directory.
    pub fn directory(path: &Path) -> Result<Self> {
        fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        Self::new(path, inotify::WatchFlags::CREATE | inotify::WatchFlags::CLOSE_WRITE | inotify::WatchFlags::MOVED_TO)
    }

    /// Someone who opens a file.
    pub fn opening(path: &Path) -> Result<Self> {
        Self::new(path, inotify::WatchFlags::OPEN)
    }

    fn new(path: &Path, flags: inotify::WatchFlags) -> Result<Self> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&events, path, flags).with_context(|| format!("cannot watch {}", path.display()))?;
        Ok(Self { events, path: path.to_owned() })
    }

    /// Returns what `look` finds, which is asked now and after each event.
    async fn until<T: Send + 'static>(self, look: impl Fn(&Path) -> Option<T> + Send + 'static) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        beside(move || {
            let mut buffer = [MaybeUninit::uninit(); 4096];
            loop {
                if let Some(found) = look(&self.path) {
                    return Ok(found);
                }
                ensure!(ready(&self.events, PollFlags::IN, deadline)?, "nothing comes in {}", self.path.display());
                let mut reader = inotify::Reader::new(&self.events, &mut buffer);
                while reader.next().is_ok() {}
            }
        })
        .await
    }

    /// What is watched.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first entry of a directory.
    pub async fn first_entry(self) -> Result<PathBuf> {
        self.until(|path| fs::read_dir(path).ok()?.flatten().next().map(|entry| entry.path())).await
    }

    /// The pid in a file of a directory that holds a process's record.
    pub async fn recorded(self, name: &'static str) -> Result<u32> {
        self.until(move |path| recorded(&path.join(name)).ok()).await
    }

    /// Returns when someone has opened the file.
    pub async fn opened(self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let message = format!("nobody opens {}", self.path.display());
        beside(move || {
            ensure!(ready(&self.events, PollFlags::IN, deadline)?, message);
            Ok(())
        })
        .await
    }
}

/// Returns when a process is gone.
pub async fn gone(pid: u32, limit: Duration) -> Result<()> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(()) };
    // Reaped already.
    let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty()) else { return Ok(()) };
    let deadline = Instant::now() + limit;
    beside(move || {
        ensure!(ready(&pidfd, PollFlags::IN, deadline)?, "process {pid} is still there after {limit:?}");
        Ok(())
    })
    .await
}

/// Returns when something waits in a socket of a process that is stopped.
pub async fn request_waits(pid: u32) -> Result<()> {
    let begin = Instant::now();
    while !queues(pid)? {
        ensure!(begin.elapsed() < PATIENCE, "nobody has sent process {pid} anything");
        // Nobody but the process itself is told of what comes in its sockets.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Whether any Unix socket of a process has bytes that it has not read (ss(8): a stream's Recv-Q).
fn queues(pid: u32) -> Result<bool> {
    let links = fs::read_dir(format!("/proc/{pid}/fd")).context("a process that was stopped is gone")?.flatten();
    let inode = |link: PathBuf| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned());
    let own: HashSet<String> = links.filter_map(|link| inode(fs::read_link(link.path()).ok()?)).collect();
    let table = node_command("ss", &["-xaHn"])?;
    Ok(table.lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        matches!(words[..], [_, _, received, _, _, local, ..] if received != "0" && own.contains(local))
    }))
}
