//! The device loop: one thread, one epoll set, every device worker but those that may wait for the host (`virtio::serving`).
//!
//! A worker is an [`event_manager::MutEventSubscriber`]: it names its descriptors in `init` and gets their events in
//! `process`. It moves into the loop when its device is activated and is dropped there when the device is reset, so its
//! state has one owner and no lock. A worker must bound what it does for one event, since all share the thread,
//! and a vCPU's thread waits for it when it starts or stops another one.

use std::thread;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps};

use crate::jail::{self, Kind};

/// What the loop runs.
pub type Worker = Box<dyn MutEventSubscriber + Send>;

/// A way into the loop from other threads.
#[derive(Clone)]
pub struct EventLoop {
    endpoint: RemoteEndpoint<Worker>,
}

impl EventLoop {
    /// Starts the loop of the devices that never block.
    pub fn spawn() -> Result<Self, EventLoopError> {
        Self::spawn_for(Kind::Devices)
    }

    /// Starts a loop's thread for workers of a kind. It ends with the process.
    pub fn spawn_for(kind: Kind) -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Worker>::new().map_err(EventLoopError::Epoll)?;
        let endpoint = manager.remote_endpoint();
        thread::Builder::new()
            .name(kind.name().into())
            .spawn(move || {
                jail::confine_thread(kind);
                loop {
                    if let Err(error) = manager.run() {
                        // Without its devices the machine is worth nothing, and nobody would notice.
                        crate::vmm_log!("device loop failed: {error}");
                        std::process::abort();
                    }
                }
            })
            .map_err(EventLoopError::Thread)?;
        Ok(Self { endpoint })
    }

    /// Moves a worker into the loop; returns when the loop has called its `init`. That is soon, because no worker in a loop
    /// waits for the host.
    pub fn add(&self, worker: Worker) -> Result<WorkerGuard, EventLoopError> {
        let id = self
            .endpoint
            .call_blocking(move |ops| Ok::<_, event_manager::Error>(ops.add_subscriber(worker)))
            .map_err(EventLoopError::Epoll)?;
        Ok(WorkerGuard { endpoint: self.endpoint.clone(), id })
    }

    /// Has the loop's thread do something, after what it was told before. Does not wait for it. If the loop has ended, `work` is
    /// dropped instead.
    pub fn run(&self, work: impl FnOnce() + Send + 'static) {
        let _ = self.endpoint.fire(move |_| work());
    }
}

/// A worker in the loop. Dropping it takes the worker out and drops it, before `drop` returns; so it must not happen in
/// the loop's own thread.
pub struct WorkerGuard {
    endpoint: RemoteEndpoint<Worker>,
    id: SubscriberId,
}

impl Drop for WorkerGuard {
    fn drop(&mut self) {
        let id = self.id;
        // It fails only if the loop has ended, which has dropped the worker.
        let _ = self
            .endpoint
            .call_blocking(move |ops: &mut dyn SubscriberOps<Subscriber = Worker>| ops.remove_subscriber(id).map(drop));
    }
}

/// The device loop cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// epoll(7) or the loop's event descriptor failed, or the loop has ended.
    #[error("device loop failed: {0}")]
    Epoll(event_manager::Error),
    /// No thread for the loop.
    #[error("cannot start the device loop's thread")]
    Thread(#[source] std::io::Error),
}
