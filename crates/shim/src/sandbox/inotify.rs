//! What a pod has of inotify(7): one instance, because a node has few of them, made when the first file is watched. Nobody is told
//! what has changed, only that something has.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A pod's instance. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Inotify(Arc<Mutex<Option<Arc<Instance>>>>);

#[derive(Debug)]
struct Instance {
    /// Not a pipe, but what it takes to read a descriptor once it is readable.
    events: Arc<pipe::Receiver>,
    changes: watch::Receiver<()>,
    reader: JoinHandle<()>,
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Inotify {
    /// Watches a file or directory. Answers with the name by which [`Self::remove`] knows it; it has one name, however often it is
    /// watched. Waits for its file system.
    pub fn add(&self, path: &Path, what: WatchFlags) -> io::Result<i32> {
        // Not locked meanwhile.
        let instance = self.instance()?;
        Ok(inotify::add_watch(&instance.events, path, what)?)
    }

    /// Watches it no longer.
    pub fn remove(&self, watched: i32) {
        if let Ok(instance) = self.instance() {
            // The kernel has removed it already if the file is gone.
            let _ = inotify::remove_watch(&instance.events, watched);
        }
    }

    /// Tells of changes, as long as this has an instance.
    pub fn changes(&self) -> io::Result<watch::Receiver<()>> {
        Ok(self.instance()?.changes.clone())
    }

    fn instance(&self) -> io::Result<Arc<Instance>> {
        let mut instance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(instance) = &*instance {
            return Ok(instance.clone());
        }
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let events = Arc::new(pipe::Receiver::from_owned_fd_unchecked(events)?);
        let (tell, changes) = watch::channel(());
        let reader = tokio::spawn(read(events.clone(), tell));
        Ok(instance.insert(Arc::new(Instance { events, changes, reader })).clone())
    }
}

/// Takes events, until there can be none.
async fn read(events: Arc<pipe::Receiver>, tell: watch::Sender<()>) {
    while events.readable().await.is_ok() {
        match events.try_read(&mut [0; 4096]) {
            Ok(1..) => tell.send_replace(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}
