//! The file server's thread: waits for both queues and the stop event, and hands each message to virtiofsd.
#![allow(unsafe_code)] // reason: unshare(2)

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::fuse::{FileLock, InHeader, InterruptIn, LkIn, LkOut, Opcode, OutHeader};
use virtiofsd::passthrough::{Config, PassthroughFs};
use virtiofsd::server::Server;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guard::{Guard, Opened};
use super::locks::{How, Locks, Watches, Wish};
use super::memory::ServerMemory;
use crate::memory::Memory;
use crate::virtio::counts::Counts;
use crate::virtio::ring::{Chain, Ring, RingError, Step, is_too_long};
use crate::virtio::stop::{Held, Stop};
use crate::virtio::wait::{fd, wait};
use crate::virtio::{ActivateError, Activation};

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

/// What the driver has given the device.
pub struct Queues {
    /// The guest's memory.
    pub memory: Memory,
    hiprio: Ring,
    requests: Ring,
}

impl Queues {
    /// Takes them out of an activation.
    pub fn take(activation: &mut Activation) -> Result<Self, ActivateError> {
        Ok(Self {
            hiprio: Ring::take(activation, HIPRIO_QUEUE)?,
            requests: Ring::take(activation, REQUEST_QUEUE)?,
            memory: Arc::clone(&activation.memory),
        })
    }
}

/// Serves until it is stopped, or until the driver breaks a queue.
pub fn serve(server: &Messages, queues: &mut Queues, stop: &Stop) -> Result<(), RingError> {
    let Queues { hiprio, requests, .. } = queues;
    loop {
        let [stopped, hiprio_kicked, requests_kicked, watches] =
            wait([fd(stop.event()), fd(hiprio.kick()), fd(requests.kick()), fd(server.locks.watches().event())]);
        if stopped {
            return Ok(());
        }
        if hiprio_kicked {
            hiprio.clear_kick();
            drain_hiprio(hiprio, server, stop)?;
        }
        if watches {
            server.locks.look_at_watches();
        }
        if hiprio_kicked || watches {
            settle(requests, server, stop)?;
        }
        if requests_kicked {
            requests.clear_kick();
            drain_requests(requests, hiprio, server, stop)?;
        }
    }
}

/// Serves both queues, whether they were kicked or not, up to the budget of each.
#[cfg(feature = "testing")]
pub fn serve_once(server: &Messages, queues: &mut Queues, stop: &Stop) -> Result<(), RingError> {
    drain_hiprio(&mut queues.hiprio, server, stop)?;
    settle(&mut queues.requests, server, stop)?;
    drain_requests(&mut queues.requests, &mut queues.hiprio, server, stop)
}

/// Serves what has no reply.
fn drain_hiprio(hiprio: &mut Ring, server: &Messages, stop: &Stop) -> Result<(), RingError> {
    let Some(mut held) = stop.hold() else { return Ok(()) };
    hiprio.drain(BUDGET, |hiprio| take_hiprio(hiprio, server, &mut held))
}

/// Serves one message that has no reply.
fn take_hiprio(hiprio: &mut Ring, server: &Messages, held: &mut Held<'_>) -> Result<Step, RingError> {
    let Some(chain) = hiprio.pop()? else { return Ok(Step::Empty) };
    let head = chain.head_index();
    let Some(written) = held.during(|| server.handle(chain, false, hiprio.counts())) else { return Ok(Step::Over) };
    if let Some(written) = written {
        hiprio.push(head, written)?;
    }
    Ok(Step::Done)
}

/// Serves requests. What the other queue has goes before each: the driver does not kick it for a FORGET as long as there are
/// requests, and how much space is free depends on it.
fn drain_requests(ring: &mut Ring, hiprio: &mut Ring, server: &Messages, stop: &Stop) -> Result<(), RingError> {
    let Some(mut held) = stop.hold() else { return Ok(()) };
    let end = ring.drain_quietly(BUDGET, |ring| {
        if hiprio.drain_quietly(BUDGET, |hiprio| take_hiprio(hiprio, server, &mut held))? == Step::Over {
            return Ok(Step::Over);
        }
        let Some(chain) = ring.pop()? else { return Ok(Step::Empty) };
        let head = chain.head_index();
        let served = held.during(|| (server.handle(chain, true, ring.counts()), server.settled()));
        let Some((written, settled)) = served else { return Ok(Step::Over) };
        if let Some(written) = written {
            ring.push(head, written)?;
        }
        for (head, written) in settled {
            ring.push(head, written)?;
        }
        // A reply may be all that the guest waits for; the next request may take long.
        ring.notify_both(hiprio)?;
        Ok(Step::Done)
    })?;
    if end == Step::Over { Ok(()) } else { ring.notify_both(hiprio) }
}

/// Answers the requests that have waited for a lock.
fn settle(ring: &mut Ring, server: &Messages, stop: &Stop) -> Result<(), RingError> {
    let Some(mut held) = stop.hold() else { return Ok(()) };
    let Some(settled) = held.during(|| server.settled()) else { return Ok(()) };
    for (head, written) in settled {
        ring.push(head, written)?;
    }
    ring.notify()
}

/// virtiofsd over guest memory, and the locks that it does not have.
pub struct Messages {
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
    /// To be called in the thread that will serve, whose working directory is the share.
    pub fn new(memory: &Memory, mut config: Config, private_roots: bool, watches: Arc<Watches>) -> io::Result<Self> {
        let memory = ServerMemory::new(memory).ok_or(io::ErrorKind::InvalidInput)?;
        let descriptors = match &config.proc_sfd_rawfd {
            Some(descriptors) => descriptors.try_clone()?,
            None => std::fs::File::open("/proc/self/fd")?,
        };
        config.proc_sfd_rawfd = Some(descriptors.try_clone()?);
        let locks = Arc::new(Locks::new(watches, OwnedFd::from(descriptors)));
        let files = Arc::new(PassthroughFs::new(config)?);
        let server = Server::new(Guard::new(Arc::clone(&files), Arc::clone(&locks), private_roots));
        Ok(Self { memory, server, files: Opened(files), locks, scratch: Scratch::new()? })
    }

    /// Serves one message; the length of the reply. One that makes no sense, or has nowhere to reply to, has none. `None` if
    /// there will be a reply later, see [`Self::settled`].
    fn handle(&self, chain: Chain, is_request: bool, counts: &Counts) -> Option<usize> {
        // virtiofsd would look at every one of the 65535 that an indirect table can hold.
        if is_too_long(&chain) {
            return Some(0);
        }
        let memory = self.memory.get();
        let (Ok(reader), Ok(writer)) = (Reader::new(memory, chain.clone()), Writer::new(memory, chain.clone())) else {
            return Some(0);
        };
        // What the guest makes of the header from here on is virtiofsd's to see, which knows no locks.
        let mut message = reader.clone();
        let (mut kind, received) = (0, reader.available_bytes());
        if let Ok(header) = message.read_obj::<InHeader>() {
            kind = header.opcode;
            match Opcode::try_from(header.opcode) {
                Ok(opcode @ (Opcode::Getlk | Opcode::Setlk | Opcode::Setlkw)) if is_request => {
                    counts.request(kind, received, 0);
                    return self.lock(opcode, header, message, writer, chain);
                }
                Ok(Opcode::Interrupt) => {
                    counts.request(kind, received, 0);
                    if let Ok(InterruptIn { unique }) = message.read_obj() {
                        self.locks.interrupt(unique);
                    }
                    return Some(0);
                }
                _ => {}
            }
        }
        let replied = self.serve(reader, writer);
        counts.request(kind, received, replied);
        Some(replied)
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
