//! From a device's spec to the device: the one place that knows them all.

use std::os::fd::OwnedFd;

use bulkhead_protocol::guest::GUEST_CID;
use bulkhead_protocol::vmspec::{DeviceSpec, Image};

use crate::descriptors::{DescriptorError, Descriptors};
use crate::event_loop::{EventLoop, EventLoopError};
use crate::jail::Kind;
use crate::kvm::{HotplugMemory, ImageError, ImageSpace};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, BlockError, DiskThreads};
use crate::virtio::console::Console;
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::mem::{Mem, MemError, MemHandle};
use crate::virtio::net::{Net, NetError};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError, VsockHandle};

/// Called when the guest says that its agent listens.
pub type OnReady = Box<dyn FnMut() + Send>;

/// A device, if it could be built.
pub type BuildResult = Result<Box<dyn VirtioDevice>, DeviceError>;

/// Called with a device that took its time.
pub type OnBuilt = Box<dyn FnOnce(BuildResult) + Send>;

/// Builds devices.
pub struct DeviceBuilder {
    event_loop: EventLoop,
    /// Disks may keep their thread waiting for ever, so each has one of its own.
    disk_threads: DiskThreads,
    /// Giving memory back waits for KVM, so it has a thread of its own.
    memory_loop: EventLoop,
    hotplug: Option<HotplugMemory>,
    images: Option<ImageSpace>,
    memory: Option<MemHandle>,
    on_ready: Option<OnReady>,
    vsock: Option<VsockHandle>,
}

impl DeviceBuilder {
    /// A builder for a machine's devices, of which so many may be disks at a time; without a place for images, none can be over
    /// such. Starts the threads of all of them, those that may come later included: a thread that is started once the starting
    /// one is confined would be confined as it is.
    pub fn new(
        hotplug: Option<HotplugMemory>,
        images: Option<ImageSpace>,
        on_ready: OnReady,
        disks: usize,
    ) -> Result<Self, DeviceError> {
        Ok(Self {
            event_loop: EventLoop::spawn_for(Kind::Devices)?,
            disk_threads: DiskThreads::start(disks).map_err(DeviceError::DiskThreads)?,
            memory_loop: EventLoop::spawn_for(Kind::Memory)?,
            hotplug,
            images,
            memory: None,
            on_ready: Some(on_ready),
            vsock: None,
        })
    }

    /// Builds a device over images, which waits for the host, and for vCPUs that do: in the thread for such things, for which
    /// nobody waits.
    pub fn build_pmem(&self, images: &[Image], fds: &mut Descriptors, done: OnBuilt) -> Result<(), DeviceError> {
        let build = self.pmem(images, fds)?;
        self.memory_loop.run(move || done(build()));
        Ok(())
    }

    /// What is left to do for a device over images when its descriptors are there.
    fn pmem(
        &self,
        images: &[Image],
        fds: &mut Descriptors,
    ) -> Result<impl FnOnce() -> BuildResult + Send + use<>, DeviceError> {
        let space = self.images.clone().ok_or(DeviceError::NoImages)?;
        let take =
            |image: &Image| -> Result<(OwnedFd, u64), DeviceError> { Ok((fds.take(image.file, "image")?, image.size)) };
        let files = images.iter().map(take).collect::<Result<Vec<_>, _>>()?;
        let (event_loop, memory_loop) = (self.event_loop.clone(), self.memory_loop.clone());
        Ok(move || {
            let memory = space.map(&files)?;
            let device: Box<dyn VirtioDevice> = Box::new(Pmem::new(Box::new(memory), event_loop, memory_loop));
            Ok(device)
        })
    }

    /// Builds one device, which takes what it needs from `fds`. One over images is built here only as long as there is no guest,
    /// see [`Self::build_pmem`].
    pub fn build(&mut self, spec: &DeviceSpec, fds: &mut Descriptors) -> BuildResult {
        let event_loop = self.event_loop.clone();
        Ok(match spec {
            DeviceSpec::Balloon => Box::new(Balloon::new(self.memory_loop.clone())),
            DeviceSpec::Block { file, read_only, serial } => {
                let file = fds.take(*file, "disk")?;
                Box::new(Block::new(file, *read_only, serial, &self.disk_threads)?)
            }
            DeviceSpec::Console { output } => {
                let output = fds.take(*output, "console")?;
                Box::new(Console::new(output, event_loop).map_err(DeviceError::Console)?)
            }
            DeviceSpec::Fs { tag, root, ids, private_roots } => {
                Box::new(Fs::new(tag, fds.take(*root, "share")?, ids, *private_roots)?)
            }
            DeviceSpec::Memory { requested_mib } => {
                let memory_loop = self.memory_loop.clone();
                let backing = Box::new(self.hotplug.take().ok_or(DeviceError::NoHotplug)?);
                let (mem, handle) = Mem::new(backing, requested_mib.saturating_mul(1 << 20), memory_loop)?;
                self.memory = Some(handle);
                Box::new(mem)
            }
            DeviceSpec::Net { tap, mac, mtu } => Box::new(Net::new(fds.take(*tap, "tap")?, *mac, *mtu, event_loop)?),
            DeviceSpec::Pmem { images } => self.pmem(images, fds)?()?,
            DeviceSpec::Rng => Box::new(Rng::new(event_loop)),
            DeviceSpec::Vsock => {
                let on_ready = self.on_ready.take().ok_or(DeviceError::SecondVsock)?;
                let (vsock, handle) = Vsock::new(GUEST_CID, event_loop, on_ready)?;
                self.vsock = Some(handle);
                Box::new(vsock)
            }
        })
    }

    /// Where the devices that never block work, for the network's stand-in: a real tap takes privileges.
    #[cfg(test)]
    pub(crate) fn event_loop(&self) -> EventLoop {
        self.event_loop.clone()
    }

    /// The way to the virtio-mem device, if one was built.
    pub fn memory(&self) -> Option<&MemHandle> {
        self.memory.as_ref()
    }

    /// The way to the vsock device, if one was built.
    pub fn vsock(&self) -> Option<&VsockHandle> {
        self.vsock.as_ref()
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
    /// No threads for disks.
    #[error("cannot start the threads for disks; does the pod's limit of tasks (pids.max) leave room for them?")]
    DiskThreads(#[source] std::io::Error),
    /// The disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The console's output.
    #[error("cannot use the console's output descriptor")]
    Console(#[source] rustix::io::Errno),
    /// The size that is asked for.
    #[error(transparent)]
    Mem(#[from] MemError),
    /// Nothing to plug, or a second device for it.
    #[error("a machine has at most one virtio-mem device, and only with hotplug_mib in its spec")]
    NoHotplug,
    /// No place for images.
    #[error("this machine was built without a place for images of file systems")]
    NoImages,
    /// The images.
    #[error(transparent)]
    Image(#[from] ImageError),
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
