//! The pod's network namespace: the guest's own, or that of the pod's user namespace.
//!
//! setns(2) moves the calling thread alone, so what is to be done in the other one runs on a thread of its own.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where the pod's network is. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Netns {
    /// A process in it; none for the guest's own.
    holder: Arc<OnceLock<u32>>,
}

impl Netns {
    /// It is that of this process from now on.
    pub fn set(&self, holder: u32) {
        let _ = self.holder.set(holder);
    }

    /// The process whose namespace it is, unless it is the guest's own.
    pub fn holder(&self) -> Option<u32> {
        self.holder.get().copied()
    }

    /// Runs something in it: sockets belong to the namespace in which they are made.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let Some(holder) = self.holder() else { return Ok(work()) };
        let (tell, told) = tokio::sync::oneshot::channel();
        std::thread::Builder::new().name("netns".to_owned()).spawn(move || {
            let _ = tell.send(enter(holder).map(|()| work()));
        })?;
        told.await.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?
    }

    /// Counters of its interfaces (proc(5)).
    pub fn counters(&self) -> io::Result<String> {
        let process = self.holder().map_or_else(|| "self".to_owned(), |holder| holder.to_string());
        std::fs::read_to_string(format!("/proc/{process}/net/dev"))
    }
}

fn enter(holder: u32) -> io::Result<()> {
    let path = format!("/proc/{holder}/ns/net");
    let namespace = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}
