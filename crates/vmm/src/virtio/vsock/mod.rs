//! virtio-vsock (section 5.10), stream sockets only, in which the host starts every connection (ARCHITECTURE.md, D2).
//!
//! The host asks for a connection by handing over one end of a stream socketpair; what the guest starts is reset. So no
//! socket of the host listens, and the number of connections is the host's choice. [`packet`] and [`connection`] are the
//! protocol and know no descriptors; [`links`] ties connections to their streams; [`worker`] runs both in the device loop.

mod connect;
pub mod connection;
mod links;
pub mod packet;
mod worker;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::eventfd::EventFd;

use self::connect::{ANSWER_TIMEOUT, Connect};
pub use self::connect::{ConnectError, Done};
use self::links::Links;
use self::worker::{Command, Queues, Worker};
use super::ring::event_fd;
use super::{ActivateError, Activation, VirtioDevice, read_config};
use crate::event_loop::{EventLoop, EventLoopError, WorkerGuard};

/// rx, tx and event. 128 is what Linux fills its receive queue with; more buys nothing.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// The device.
pub struct Vsock {
    cid: u64,
    handle: VsockHandle,
    /// The worker lives as long as the device: it also keeps connections that wait for the driver.
    _worker: WorkerGuard,
}

/// A way to ask for connections, from any thread.
#[derive(Clone)]
pub struct VsockHandle {
    commands: Sender<Command>,
    bell: Arc<EventFd>,
}

impl Vsock {
    /// A device for the guest with address `cid`. `on_ready` is called, in the device loop, when the guest first tries to
    /// connect to [`READY_PORT`](bulkhead_protocol::guest::READY_PORT) after its driver started; it must not block.
    pub fn new(
        cid: u64,
        event_loop: EventLoop,
        on_ready: Box<dyn FnMut() + Send>,
    ) -> Result<(Self, VsockHandle), VsockError> {
        Self::with_timeout(cid, event_loop, on_ready, ANSWER_TIMEOUT)
    }

    fn with_timeout(
        cid: u64,
        event_loop: EventLoop,
        on_ready: Box<dyn FnMut() + Send>,
        timeout: Duration,
    ) -> Result<(Self, VsockHandle), VsockError> {
        let (commands, inbox) = channel();
        let bell = Arc::new(event_fd().map_err(VsockError::Resource)?);
        let links = Links::new(cid, timeout);
        let worker = Worker::new(links, inbox, Arc::clone(&bell), on_ready).map_err(VsockError::Resource)?;
        let worker = event_loop.add(Box::new(worker))?;
        let handle = VsockHandle { commands, bell };
        Ok((Self { cid, handle: handle.clone(), _worker: worker }, handle))
    }
}

impl VsockHandle {
    /// Connects `stream`, one end of a stream socketpair, to a port of the guest.
    ///
    /// `done` is called once, usually in the device loop, so it must not block: with `Ok` when the guest has accepted,
    /// otherwise with the reason, and then `stream` is closed. Before the driver has started the request waits for it.
    pub fn connect(&self, port: u32, stream: OwnedFd, done: Done) {
        self.send(Command::Connect(Connect::new(port, stream, done)));
    }

    fn send(&self, command: Command) {
        // If the worker is gone the command is dropped here, which answers it.
        if self.commands.send(command).is_ok() {
            // It can only fail by overflow, and then the bell rings as it is.
            let _ = self.bell.write(1);
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // Not VIRTIO_VSOCK_F_SEQPACKET; without any bit the device is one for streams.
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.handle.send(Command::Start(Box::new(Queues::new(activation)?)));
        Ok(())
    }

    fn reset(&mut self) {
        let (stopped, wait) = sync_channel(1);
        self.handle.send(Command::Stop(stopped));
        // The loop's workers bound what they do for an event, so this ends soon; an error means that the worker is gone.
        let _ = wait.recv();
    }
}

/// A device that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// eventfd(2) or timerfd_create(2).
    #[error("no event or timer descriptor for the vsock device; is the limit of open files too low?")]
    Resource(#[source] io::Error),
    /// The device loop would not take the worker.
    #[error("device loop refused the vsock device")]
    EventLoop(#[from] EventLoopError),
}
