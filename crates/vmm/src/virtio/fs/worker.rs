//! The file server's thread: waits for both queues and the stop event, and hands each message to virtiofsd.
#![allow(unsafe_code)] // reason: unshare(2), and an event's descriptor to wait for

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::{FileLock, InHeader, InterruptIn, LkIn, LkOut, Opcode, OutHeader};
use virtiofsd::passthrough::{Config, PassthroughFs};
use virtiofsd::server::Server;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::guard::{Guard, Opened};
use super::locks::{How, Locks, Watches, Wish};
use super::memory::ServerMemory;
use crate::guest_log;
use crate::virtio::ring::{Chain, Ring, RingError, Step};
use crate::virtio::{ActivateError, Activation, Interrupt, Memory};

/// Requests before the other queue and the stop event are looked at again.
const BUDGET: usize = 32;

/// sizeof(struct fuse_out_header): the least that a request with a reply must have room for.
const OUT_HEADER_LEN: usize = 16;

const HIPRIO_QUEUE: u16 = 0;
const REQUEST_QUEUE: u16 = 1;

/// Gives the calling thread a working directory and umask of its own.
pub fn own_file_system_attributes() -> Result<(), Errno> {
    // SAFETY: Of what unshare_unsafe warns about (shared descriptor tables) CLONE_FS changes nothing.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }
}

/// How the thread is told to end.
pub struct Stop {
    requested: AtomicBool,
    event: EventFd,
}

impl Stop {
    pub fn new(event: EventFd) -> Self {
        Self { requested: AtomicBool::new(false), event }
    }

    pub fn request(&self) {
        self.requested.store(true, Ordering::Release);
        // It can only fail by overflow, and then the event is readable as it is.
        let _ = self.event.write(1);
    }

    fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }
}

/// The thread's state.
pub struct Worker {
    hiprio: Ring,
    requests: Ring,
    server: Messages,
    interrupt: Arc<dyn Interrupt>,
    stop: Arc<Stop>,
}

impl Worker {
    /// To be called in the thread that will run it, whose working directory is the share.
    pub fn new(
        mut activation: Activation,
        config: Config,
        watches: Arc<Watches>,
        stop: Arc<Stop>,
    ) -> Result<Self, ActivateError> {
        let host = |action| move |source| ActivateError::Host { action, source };
        Ok(Self {
            hiprio: Ring::take(&mut activation, HIPRIO_QUEUE)?,
            requests: Ring::take(&mut activation, REQUEST_QUEUE)?,
            server: Messages::new(&activation.memory, config, watches).map_err(host("start the file server"))?,
            interrupt: activation.interrupt,
            stop,
        })
    }

    /// Serves until it is stopped, or until the driver breaks a queue.
    pub fn run(&mut self) {
        let result = self.serve();
        if let Err(error) = result
            && !self.stop.is_requested()
        {
            guest_log!("fs: {error}");
            self.interrupt.needs_reset();
        }
    }

    fn serve(&mut self) -> Result<(), RingError> {
        loop {
            let [stop, hiprio, requests, watches] = wait([
                fd(&self.stop.event),
                fd(self.hiprio.kick()),
                fd(self.requests.kick()),
                fd(self.server.locks.watches().event()),
            ]);
            if stop || self.stop.is_requested() {
                return Ok(());
            }
            if hiprio {
                self.hiprio.clear_kick();
                drain(&mut self.hiprio, &self.server, &self.stop)?;
            }
            if watches {
                self.server.locks.look_at_watches();
            }
            if hiprio || watches {
                settle(&mut self.requests, &self.server)?;
            }
            if requests {
                self.requests.clear_kick();
                drain(&mut self.requests, &self.server, &self.stop)?;
            }
        }
    }
}

#[cfg(feature = "testing")]
impl Worker {
    /// Serves both queues, whether they were kicked or not, up to the budget of each.
    pub fn serve_once(&mut self) -> Result<(), RingError> {
        drain(&mut self.hiprio, &self.server, &self.stop)?;
        settle(&mut self.requests, &self.server)?;
        drain(&mut self.requests, &self.server, &self.stop)
    }
}

fn drain(ring: &mut Ring, server: &Messages, stop: &Stop) -> Result<(), RingError> {
    ring.drain(BUDGET, |ring| {
        if stop.is_requested() {
            return Ok(Step::Stop);
        }
        let Some(chain) = ring.pop()? else { return Ok(Step::Empty) };
        let head = chain.head_index();
        let is_request = ring.index() == REQUEST_QUEUE;
        let written = server.handle(chain, is_request);
        if stop.is_requested() {
            // The driver may have taken the ring back while the request was in the host's kernel.
            return Ok(Step::Stop);
        }
        if let Some(written) = written {
            ring.push(head, written)?;
        }
        if is_request {
            settle(ring, server)?;
        }
        // A reply may be all that the guest waits for; the next request may take long.
        ring.notify()?;
        Ok(Step::Done)
    })
}

/// Answers the requests that have waited for a lock.
fn settle(ring: &mut Ring, server: &Messages) -> Result<(), RingError> {
    for (head, written) in server.settled() {
        ring.push(head, written)?;
    }
    ring.notify()
}

fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: The descriptor is open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(event)) }
}

/// poll(2): which of the descriptors are readable. It fails for signals and want of memory, which pass.
fn wait<const N: usize>(fds: [BorrowedFd<'_>; N]) -> [bool; N] {
    let mut polled = fds.each_ref().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN));
    while poll(&mut polled, None).is_err() {}
    polled.each_ref().map(|fd| !fd.revents().is_empty())
}

/// virtiofsd over guest memory, and the locks that it does not have.
struct Messages {
    memory: ServerMemory,
    server: Server<Guard<PassthroughFs, Waiting>>,
    files: Opened<PassthroughFs>,
    locks: Arc<Locks<Waiting>>,
    scratch: Scratch,
}

/// A request that waits for a lock.
struct Waiting {
    unique: u64,
    chain: Chain,
}

impl Messages {
    fn new(memory: &Memory, mut config: Config, watches: Arc<Watches>) -> io::Result<Self> {
        let memory = ServerMemory::new(memory).ok_or(io::ErrorKind::InvalidInput)?;
        let descriptors = match &config.proc_sfd_rawfd {
            Some(descriptors) => descriptors.try_clone()?,
            None => std::fs::File::open("/proc/self/fd")?,
        };
        config.proc_sfd_rawfd = Some(descriptors.try_clone()?);
        let locks = Arc::new(Locks::new(watches, OwnedFd::from(descriptors)));
        let files = Arc::new(PassthroughFs::new(config)?);
        let server = Server::new(Guard::new(Arc::clone(&files), Arc::clone(&locks)));
        Ok(Self { memory, server, files: Opened(files), locks, scratch: Scratch::new()? })
    }

    /// Serves one message; the length of the reply. One that makes no sense, or has nowhere to reply to, has none. `None` if
    /// there will be a reply later, see [`Self::settled`].
    fn handle(&self, chain: Chain, is_request: bool) -> Option<usize> {
        let memory = self.memory.get();
        let (Ok(reader), Ok(writer)) = (Reader::new(memory, chain.clone()), Writer::new(memory, chain.clone())) else {
            return Some(0);
        };
        // What the guest makes of the header from here on is virtiofsd's to see, which knows no locks.
        let mut message = reader.clone();
        if let Ok(header) = message.read_obj::<InHeader>() {
            match Opcode::try_from(header.opcode) {
                Ok(opcode @ (Opcode::Getlk | Opcode::Setlk | Opcode::Setlkw)) if is_request => {
                    return self.lock(opcode, header, message, writer, chain);
                }
                Ok(Opcode::Interrupt) => {
                    if let Ok(InterruptIn { unique }) = message.read_obj() {
                        self.locks.interrupt(unique);
                    }
                    return Some(0);
                }
                _ => {}
            }
        }
        Some(self.serve(reader, writer))
    }

    fn serve(&self, reader: Reader<'_>, writer: Writer<'_>) -> usize {
        // virtiofsd takes the header's room for granted. FORGET has no reply and brings none, but which request it is can
        // change until virtiofsd reads it, so all that bring none get some of ours.
        let room = writer.available_bytes();
        if room == 0 {
            if let Some(writer) = self.scratch.writer() {
                let _ = self.server.handle_message(reader, writer, None::<&mut ()>);
            }
            return 0;
        }
        if room < OUT_HEADER_LEN {
            return 0;
        }
        self.server.handle_message(reader, writer, None::<&mut ()>).unwrap_or(0)
    }

    /// A request about a lock.
    fn lock(
        &self,
        opcode: Opcode,
        header: InHeader,
        mut message: Reader<'_>,
        mut writer: Writer<'_>,
        chain: Chain,
    ) -> Option<usize> {
        let Ok(message) = message.read_obj::<LkIn>() else { return Some(0) };
        let unique = header.unique;
        let wish = match Wish::parse(header.nodeid, &message) {
            Ok(wish) => wish,
            Err(error) => return Some(reply(&mut writer, unique, Err(error))),
        };
        if matches!(opcode, Opcode::Getlk) {
            let found = self.locks.conflict(&self.files, &wish).map(|found| match found {
                Some((how, span, pid)) => FileLock { start: span.start, end: span.end, type_: how.number(), pid },
                None => FileLock { type_: How::Unlock.number(), ..FileLock::default() },
            });
            return Some(reply(&mut writer, unique, found.map(|lk| Some(LkOut { lk }))));
        }
        if matches!(opcode, Opcode::Setlk) || wish.how == How::Unlock {
            return Some(reply(&mut writer, unique, self.locks.set(&self.files, &wish).map(|()| None)));
        }
        let waiting = Waiting { unique, chain };
        let (_, result) = self.locks.set_waiting(&self.files, wish, unique, waiting)?;
        Some(reply(&mut writer, unique, result.map(|()| None)))
    }

    /// Heads of requests that have waited, with the lengths of their replies.
    fn settled(&self) -> Vec<(u16, usize)> {
        let answer = |(Waiting { unique, chain }, result): (Waiting, io::Result<()>)| {
            let head = chain.head_index();
            let writer = Writer::new(self.memory.get(), chain);
            (head, writer.map_or(0, |mut writer| reply(&mut writer, unique, result.map(|()| None))))
        };
        self.locks.settled(&self.files).into_iter().map(answer).collect()
    }
}

/// Writes a reply; its length, which is 0 if there is no room for it.
fn reply(writer: &mut Writer<'_>, unique: u64, result: io::Result<Option<LkOut>>) -> usize {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(error) => (-error.raw_os_error().unwrap_or(libc::EIO), None),
    };
    let len = OUT_HEADER_LEN + body.map_or(0, |_| size_of::<LkOut>());
    let header = OutHeader { len: u32::try_from(len).unwrap_or(0), error, unique };
    let written = writer.write_obj(header).and_then(|()| body.map_or(Ok(()), |body| writer.write_obj(body)));
    written.map_or(0, |()| len)
}

/// A reply buffer that nobody reads.
struct Scratch {
    memory: ServerMemory,
    chain: DescriptorChain<Memory>,
}

impl Scratch {
    fn new() -> io::Result<Self> {
        // A virtqueue with one writable buffer is the only way to a writer.
        const RINGS: [u32; 3] = [0x100, 0x200, 0x300];
        const BUFFER: u64 = 0x800;
        let broken = || io::Error::from(io::ErrorKind::InvalidData);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).map_err(|_| broken())?;
        let memory = Memory::new(memory);
        let [descriptors, avail, used] = RINGS;
        let mut descriptor = BUFFER.to_le_bytes().to_vec();
        descriptor.extend(0x800_u32.to_le_bytes()); // len
        descriptor.extend([2, 0, 0, 0]); // flags: WRITE; next
        memory.write_slice(&descriptor, GuestAddress(descriptors.into())).map_err(|_| broken())?;
        memory.write_obj(1_u16.to_le(), GuestAddress(u64::from(avail) + 2)).map_err(|_| broken())?;
        let mut queue = Queue::new(1).map_err(|_| broken())?;
        queue.set_desc_table_address(Some(descriptors), None);
        queue.set_avail_ring_address(Some(avail), None);
        queue.set_used_ring_address(Some(used), None);
        queue.set_ready(true);
        let chain = queue.iter(memory.clone()).map_err(|_| broken())?.next().ok_or_else(broken)?;
        Ok(Self { memory: ServerMemory::new(&memory).ok_or_else(broken)?, chain })
    }

    fn writer(&self) -> Option<Writer<'_>> {
        Writer::new(self.memory.get(), self.chain.clone()).ok()
    }
}
