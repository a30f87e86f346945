//! Service mode: the shim's commands come over the control socket, see [`bulkhead_protocol::control`].
//!
//! The main thread waits for the socket and for the guest's end; everything else happens in other threads. Replies are
//! sent by whoever has them: a message to a SEQPACKET socket is one piece.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use bulkhead_protocol::control::{self, Command, ControlError, ExitReason, Reply, Request};
use bulkhead_protocol::error::chain;
use bulkhead_protocol::vmspec::{DeviceSpec, Image, VmSpec};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::descriptors::Descriptors;
use crate::devices::BuildResult;
use crate::jail::{self, Kind};
use crate::machine::{Machine, MachineError};

/// The answer to a command that came too early.
const NO_MACHINE: &str = "there is no machine yet; send Boot first";

/// How a service ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest did.
    Guest(ExitReason),
    /// The shim closed its end of the socket.
    Closed,
}

/// Serves the shim until it or the guest ends.
pub fn serve(socket: OwnedFd) -> Result<End, ServiceError> {
    let mut service = Service { socket: Arc::new(socket), machine: None, built: Built::new()? };
    loop {
        let ready = service.wait()?;
        if let Some(reason) = service.machine.as_ref().and_then(|machine| machine.exit().reason()) {
            // Before the machine is taken apart, which waits for the vCPUs' threads: whoever asks after the pod must not.
            service.reply(&Reply::GuestExited { reason });
            // What the guest wrote last is in the devices' threads; nothing is waited for but the vCPUs.
            drop(service.machine.take());
            return Ok(End::Guest(reason));
        }
        while let Some((id, device)) = service.built.next() {
            service.add_built(id, device);
        }
        if ready {
            match control::receive::<Request>(&service.socket)? {
                Some((request, fds)) => service.handle(request, fds)?,
                None => return Ok(End::Closed),
            }
        }
    }
}

struct Service {
    socket: Arc<OwnedFd>,
    machine: Option<Machine>,
    built: Built,
}

/// A device that is to be added, and by which request.
type BuiltDevice = (u64, BuildResult);

/// Devices that were built in another thread, because it takes long.
struct Built {
    sender: Sender<BuiltDevice>,
    receiver: Receiver<BuiltDevice>,
    /// Readable when there may be one.
    event: Arc<OwnedFd>,
}

impl Built {
    fn new() -> Result<Self, ServiceError> {
        let (sender, receiver) = channel();
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(ServiceError::Wait)?;
        Ok(Self { sender, receiver, event: Arc::new(event) })
    }

    fn next(&self) -> Option<BuiltDevice> {
        // Before the look: what comes after it makes it readable again. Nothing to read (EAGAIN) is as good.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        self.receiver.try_recv().ok()
    }
}

impl Service {
    /// Waits for a message, the socket's end, the guest's, or a device that was built; true if the socket has something to say.
    fn wait(&self) -> Result<bool, ServiceError> {
        let socket = PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN);
        let built = PollFd::from_borrowed_fd(self.built.event.as_fd(), PollFlags::IN);
        let exit: Option<BorrowedFd<'_>> = self.machine.as_ref().map(|machine| machine.exit().as_fd());
        let mut fds: Vec<_> = [Some(socket), Some(built), exit.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))]
            .into_iter()
            .flatten()
            .collect();
        rustix::io::retry_on_intr(|| poll(&mut fds, None)).map_err(ServiceError::Wait)?;
        Ok(fds.first().is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<(), ServiceError> {
        let id = request.id;
        match request.command {
            Command::Boot(_) if self.machine.is_some() => self.fail(id, "the machine has been built already".into()),
            Command::Boot(spec) => match self.boot(&spec, fds) {
                Ok(()) => self.reply(&Reply::Done { id }),
                Err(error) => {
                    self.fail(id, chain(&error));
                    return Err(ServiceError::Boot(error));
                }
            },
            Command::ConnectVsock { port } => self.connect(id, port, fds),
            Command::AddDevice(DeviceSpec::Pmem { images }) => self.build_pmem(id, &images, fds),
            Command::AddDevice(device) => self.add_device(id, &device, fds),
            Command::RemoveDevice { slot } => self.remove_device(id, slot),
            Command::ResizeMemory { mib } => self.resize_memory(id, mib),
            Command::Counters => match &self.machine {
                Some(machine) => self.reply(&Reply::Counters { id, devices: machine.counters() }),
                None => self.fail(id, NO_MACHINE.into()),
            },
        }
        Ok(())
    }

    fn boot(&mut self, spec: &VmSpec, fds: Vec<OwnedFd>) -> Result<(), MachineError> {
        // The shim is told once, however often the guest says so.
        let mut socket = Some(self.socket.clone());
        let on_ready = Box::new(move || {
            if let Some(socket) = socket.take() {
                send(&socket, &Reply::GuestReady);
            }
        });
        let mut fds = Descriptors::new(fds);
        lock_in(spec, &mut fds)?;
        let machine = self.machine.insert(Machine::build(spec, fds, on_ready)?);
        machine.start()?;
        // From here on this thread lives beside a guest.
        jail::confine_thread(Kind::Main);
        Ok(())
    }

    fn connect(&self, id: u64, port: u32, fds: Vec<OwnedFd>) {
        let Some(vsock) = self.machine.as_ref().and_then(Machine::vsock) else {
            return self.fail(id, "the machine has no vsock device; send Boot with one first".into());
        };
        let Ok([stream]) = <[OwnedFd; 1]>::try_from(fds) else {
            return self.fail(id, "ConnectVsock takes exactly one descriptor".into());
        };
        let socket = self.socket.clone();
        let done = Box::new(move |result| match result {
            Ok(()) => send(&socket, &Reply::Done { id }),
            Err(error) => send(&socket, &Reply::Failed { id, message: chain(&error) }),
        });
        vsock.connect(port, stream, done);
    }

    fn add_device(&mut self, id: u64, device: &DeviceSpec, fds: Vec<OwnedFd>) {
        let Some(machine) = &mut self.machine else { return self.fail(id, NO_MACHINE.into()) };
        match machine.add_device(device, Descriptors::new(fds)) {
            Ok(slot) => self.reply(&Reply::Added { id, slot }),
            Err(error) => self.fail(id, chain(&error)),
        }
    }

    /// Has a device over images built. Its request is answered when it is there.
    fn build_pmem(&self, id: u64, images: &[Image], fds: Vec<OwnedFd>) {
        let Some(machine) = &self.machine else { return self.fail(id, NO_MACHINE.into()) };
        let (sender, event) = (self.built.sender.clone(), Arc::clone(&self.built.event));
        let done = Box::new(move |device| {
            // Nobody listens only when the service has ended.
            let _ = sender.send((id, device));
            let _ = rustix::io::write(&event, &1_u64.to_ne_bytes());
        });
        if let Err(error) = machine.build_pmem(images, Descriptors::new(fds), done) {
            self.fail(id, chain(&error));
        }
    }

    fn add_built(&mut self, id: u64, device: BuildResult) {
        let Some(machine) = &mut self.machine else { return self.fail(id, NO_MACHINE.into()) };
        match device.map_err(MachineError::from).and_then(|device| machine.add_built(device)) {
            Ok(slot) => self.reply(&Reply::Added { id, slot }),
            Err(error) => self.fail(id, chain(&error)),
        }
    }

    fn remove_device(&mut self, id: u64, slot: u8) {
        match self.machine.as_mut().map(|machine| machine.remove_device(slot)) {
            Some(Ok(())) => self.reply(&Reply::Done { id }),
            Some(Err(error)) => self.fail(id, chain(&error)),
            None => self.fail(id, NO_MACHINE.into()),
        }
    }

    fn resize_memory(&self, id: u64, mib: u64) {
        let Some(memory) = self.machine.as_ref().and_then(Machine::memory) else {
            return self.fail(id, "the machine has no virtio-mem device; send Boot with one first".into());
        };
        let socket = self.socket.clone();
        let done = Box::new(move |mib| send(&socket, &Reply::Resized { id, mib }));
        if let Err(error) = memory.resize(mib, done) {
            self.fail(id, chain(&error));
        }
    }

    fn fail(&self, id: u64, message: String) {
        self.reply(&Reply::Failed { id, message });
    }

    fn reply(&self, reply: &Reply) {
        send(&self.socket, reply);
    }
}

/// Enters the jail, which is the share of the spec's virtio-fs device; the device gets the share as it is from inside.
fn lock_in(spec: &VmSpec, fds: &mut Descriptors) -> Result<(), MachineError> {
    let share = spec.devices.iter().find_map(|device| match device {
        DeviceSpec::Fs { root, .. } => Some(*root),
        _ => None,
    });
    let outside = share.map(|index| fds.take(index, "share")).transpose()?;
    let inside = jail::enter(outside)?;
    if let (Some(index), Some(fd)) = (share, inside) {
        fds.put_back(index, fd);
    }
    Ok(())
}

/// Sends a reply. If the shim is gone, the main thread learns it from the socket.
fn send(socket: &OwnedFd, reply: &Reply) {
    if let Err(error) = control::send(socket, reply, &[]) {
        crate::vmm_log!("cannot reply to the shim: {}", chain(&error));
    }
}

/// A service that could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// poll(2).
    #[error("cannot wait for the control socket")]
    Wait(#[source] rustix::io::Errno),
    /// The machine.
    #[error(transparent)]
    Boot(MachineError),
}
