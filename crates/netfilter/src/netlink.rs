//! A socket of NETLINK_NETFILTER (netlink(7); Linux: include/uapi/linux/netfilter/nfnetlink.h).
//!
//! The kernel answers within the call that asks, so nothing here waits: an answer that is not there does not come.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::sockopt::{set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with};

use crate::attributes::aligned;
use crate::sockopt;

/// `struct nlmsghdr`.
pub const HEADER: usize = 16;

/// `struct nfgenmsg`, which comes first in every message of nfnetlink.
pub const NFGENMSG: usize = 4;

/// Flags of linux/netlink.h.
pub const REQUEST: u16 = 0x001;
const MULTI: u16 = 0x002;
const DUMP_INTERRUPTED: u16 = 0x010;
const DUMP: u16 = 0x300;
pub const ACK: u16 = 0x004;
pub const EXCLUSIVE: u16 = 0x200;
pub const CREATE: u16 = 0x400;
pub const APPEND: u16 = 0x800;

const ERROR: u16 = 2;
const DONE: u16 = 3;

/// Set on an acknowledgement without the request's payload, and on one with attributes after it.
const CAPPED: u16 = 0x100;
const ACK_TLVS: u16 = 0x200;

/// `NLMSGERR_ATTR_OFFS`: where in the request the attribute is that the kernel objects to.
const ATTR_OFFSET: u16 = 2;

const SOL_NETLINK: i32 = 270;
const NETLINK_CAP_ACK: i32 = 10;
const NETLINK_EXT_ACK: i32 = 11;

/// The kernel's buffers for the socket: a batch goes out at once, and its errors come back at once.
const BUFFER: usize = 16 << 20;

/// One datagram of a dump is at most this long.
const CHUNK: usize = 64 << 10;

/// A message without its header.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Message {
    /// Subsystem and type.
    pub kind: u16,
    /// The request's.
    pub sequence: u32,
    flags: u16,
    /// `struct nfgenmsg` and attributes, or an error.
    payload: Vec<u8>,
}

impl Message {
    /// The protocol family of `struct nfgenmsg`.
    pub fn family(&self) -> u8 {
        self.payload.first().copied().unwrap_or(0)
    }

    /// The attributes behind it.
    pub fn attributes(&self) -> &[u8] {
        self.payload.get(NFGENMSG..).unwrap_or(&[])
    }
}

/// What the kernel objects to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Objection {
    /// The request.
    pub sequence: u32,
    /// errno(3).
    pub errno: i32,
    /// Where in the request, its header included; 0 if the kernel does not say.
    pub offset: u32,
}

/// The socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens one in the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(NETFILTER))?;
        bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK] {
            sockopt::set(&fd, SOL_NETLINK, option, &1_i32.to_ne_bytes())?;
        }
        // Beyond the node's limits with CAP_NET_ADMIN in the first user namespace; else what there is has to do.
        let _ = set_socket_send_buffer_size_force(&fd, BUFFER);
        let _ = set_socket_recv_buffer_size_force(&fd, BUFFER);
        Ok(Self { fd, sequence: 0 })
    }

    /// Asks for one thing, and answers with its attributes: none if it was to be done and only acknowledged.
    pub fn ask(&mut self, kind: u16, family: u8, flags: u16, attributes: &[u8]) -> io::Result<Vec<u8>> {
        self.request(kind, family, flags, attributes)?;
        let answer = self.receive()?.into_iter().next().ok_or(io::ErrorKind::UnexpectedEof)?;
        match objection(&answer) {
            Some(objection) => Err(io::Error::from_raw_os_error(objection.errno)),
            None if answer.kind == ERROR => Ok(Vec::new()),
            None => Ok(answer.attributes().to_vec()),
        }
    }

    /// Asks for all of a kind. `None` if something has changed meanwhile, so that not all of them may be told.
    pub fn dump(&mut self, kind: u16, family: u8, attributes: &[u8]) -> io::Result<Option<Vec<Message>>> {
        self.request(kind, family, DUMP, attributes)?;
        let (mut found, mut whole, mut size) = (Vec::new(), true, 0);
        loop {
            for message in self.receive()? {
                whole &= message.flags & DUMP_INTERRUPTED == 0;
                match message.kind {
                    DONE => return Ok(whole.then_some(found)),
                    ERROR => {
                        let errno = objection(&message).map_or(libc::EPROTO, |objection| objection.errno);
                        return Err(io::Error::from_raw_os_error(errno));
                    }
                    _ => {}
                }
                size += message.payload.len();
                if size > crate::MAX_BYTES {
                    return Err(io::ErrorKind::FileTooLarge.into());
                }
                let last = message.flags & MULTI == 0;
                found.push(message);
                if last {
                    return Ok(whole.then_some(found));
                }
            }
        }
    }

    fn request(&mut self, kind: u16, family: u8, flags: u16, attributes: &[u8]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut bytes = Vec::new();
        put_message(&mut bytes, kind, REQUEST | flags, self.sequence, family, 0, attributes);
        self.send(&bytes)
    }

    /// Sends what [`put_message`] has made, at once.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        sendto(&self.fd, bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        Ok(())
    }

    /// What the kernel objects to in what was sent.
    pub fn objections(&self) -> io::Result<Vec<Objection>> {
        let mut found = Vec::new();
        loop {
            match self.receive() {
                Ok(messages) => found.extend(messages.iter().filter_map(objection)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(found),
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&self) -> io::Result<Vec<Message>> {
        let mut bytes = vec![0; CHUNK];
        let (length, _) = recv(&self.fd, &mut bytes[..], RecvFlags::DONTWAIT)?;
        Ok(messages(bytes.get(..length).unwrap_or(&[])))
    }
}

/// Appends a message with its headers.
pub fn put_message(
    to: &mut Vec<u8>,
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    attributes: &[u8],
) {
    let length = u32::try_from(HEADER + NFGENMSG + attributes.len()).unwrap_or(0);
    to.extend_from_slice(&length.to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(&flags.to_ne_bytes());
    to.extend_from_slice(&sequence.to_ne_bytes());
    to.extend_from_slice(&0_u32.to_ne_bytes());
    to.extend_from_slice(&[family, 0]);
    to.extend_from_slice(&resource.to_be_bytes());
    to.extend_from_slice(attributes);
    to.resize(aligned(to.len()), 0);
}

/// The messages of a datagram, as far as they are whole.
fn messages(mut bytes: &[u8]) -> Vec<Message> {
    let mut found = Vec::new();
    while let Some(header) = bytes.first_chunk::<HEADER>() {
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let Some(payload) = bytes.get(HEADER..length) else { break };
        found.push(Message {
            kind: u16::from_ne_bytes([e, f]),
            flags: u16::from_ne_bytes([g, h]),
            sequence: u32::from_ne_bytes([i, j, k, l]),
            payload: payload.to_vec(),
        });
        bytes = bytes.get(aligned(length)..).unwrap_or(&[]);
    }
    found
}

/// The error that a message is, unless it only acknowledges: its number, the header of the request, and then attributes.
fn objection(message: &Message) -> Option<Objection> {
    if message.kind != ERROR {
        return None;
    }
    let number = i32::from_ne_bytes(*message.payload.first_chunk()?);
    if number == 0 {
        return None;
    }
    let place = 4 + HEADER;
    let attributes =
        if message.flags & ACK_TLVS != 0 && message.flags & CAPPED != 0 { message.payload.get(place..) } else { None };
    let offset = attributes.and_then(|bytes| crate::attributes::find(bytes, ATTR_OFFSET));
    Some(Objection {
        sequence: message.sequence,
        errno: number.checked_neg().unwrap_or(libc::EPROTO),
        offset: offset.and_then(|value| value.try_into().ok()).map_or(0, u32::from_ne_bytes),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_written_and_torn_ones_left_out() {
        let mut bytes = Vec::new();
        put_message(&mut bytes, 0xa00, REQUEST, 3, 2, 10, &[1, 2, 3, 4, 5]);
        put_message(&mut bytes, 0x11, REQUEST, 4, 0, 10, &[]);
        let found = messages(&bytes);
        assert_eq!(
            found.iter().map(|message| (message.kind, message.sequence)).collect::<Vec<_>>(),
            [(0xa00, 3), (0x11, 4)]
        );
        assert_eq!((found[0].family(), found[0].attributes()), (2, [1, 2, 3, 4, 5].as_slice()));
        for end in 0..bytes.len() {
            assert!(messages(&bytes[..end]).len() <= 1);
        }
        assert!(messages(&[0; 64]).is_empty(), "a length below that of the header");
    }
}
