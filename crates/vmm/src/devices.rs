//! From a device's spec to the device: the one place that knows them all.

use bulkhead_protocol::guest::GUEST_CID;
use bulkhead_protocol::vmspec::DeviceSpec;

use crate::descriptors::{DescriptorError, Descriptors};
use crate::event_loop::{EventLoop, EventLoopError};
use crate::virtio::VirtioDevice;
use crate::virtio::block::{Block, BlockError};
use crate::virtio::console::Console;
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::net::{Net, NetError};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError, VsockHandle};

/// Called when the guest says that its agent listens.
pub type OnReady = Box<dyn FnMut() + Send>;

/// Builds devices.
pub struct DeviceBuilder<'a> {
    fds: &'a mut Descriptors,
    event_loop: EventLoop,
    /// Disks block their thread, so they have one of their own; started for the first.
    disk_loop: Option<EventLoop>,
    on_ready: Option<OnReady>,
    vsock: Option<VsockHandle>,
}

impl<'a> DeviceBuilder<'a> {
    /// A builder that takes what the devices need from `fds`.
    pub fn new(fds: &'a mut Descriptors, on_ready: OnReady) -> Result<Self, EventLoopError> {
        let event_loop = EventLoop::spawn()?;
        Ok(Self { fds, event_loop, disk_loop: None, on_ready: Some(on_ready), vsock: None })
    }

    /// Builds one device.
    pub fn build(&mut self, spec: &DeviceSpec) -> Result<Box<dyn VirtioDevice>, DeviceError> {
        let event_loop = self.event_loop.clone();
        Ok(match spec {
            DeviceSpec::Block { file, read_only, serial } => {
                let file = self.fds.take(*file, "disk")?;
                Box::new(Block::new(file, *read_only, serial, self.disk_loop()?)?)
            }
            DeviceSpec::Console { output } => {
                let output = self.fds.take(*output, "console")?;
                Box::new(Console::new(output, event_loop).map_err(DeviceError::Console)?)
            }
            DeviceSpec::Fs { tag, root } => Box::new(Fs::new(tag, self.fds.take(*root, "share")?)?),
            DeviceSpec::Net { tap, mac, mtu } => {
                Box::new(Net::new(self.fds.take(*tap, "tap")?, *mac, *mtu, event_loop)?)
            }
            DeviceSpec::Rng => Box::new(Rng::new(event_loop)),
            DeviceSpec::Vsock => {
                let on_ready = self.on_ready.take().ok_or(DeviceError::SecondVsock)?;
                let (vsock, handle) = Vsock::new(GUEST_CID, event_loop, on_ready)?;
                self.vsock = Some(handle);
                Box::new(vsock)
            }
        })
    }

    fn disk_loop(&mut self) -> Result<EventLoop, EventLoopError> {
        match &self.disk_loop {
            Some(event_loop) => Ok(event_loop.clone()),
            None => Ok(self.disk_loop.insert(EventLoop::spawn()?).clone()),
        }
    }

    /// The way to the vsock device, if one was built.
    pub fn into_vsock(self) -> Option<VsockHandle> {
        self.vsock
    }
}

/// A device that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Its descriptor.
    #[error(transparent)]
    Descriptors(#[from] DescriptorError),
    /// No thread.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// The disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The console's output.
    #[error("cannot use the console's output descriptor")]
    Console(#[source] rustix::io::Errno),
    /// The share.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The tap.
    #[error(transparent)]
    Net(#[from] NetError),
    /// The vsock device.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// There is one guest address.
    #[error("a machine has at most one vsock device")]
    SecondVsock,
}
