//! TCP segments in the frames of the host, and which of them make one.
//!
//! A frame costs the guest about the same whether it holds 1 KiB or 64. Linux makes a connection's frames a thousandth of what
//! it sends in a second, on top of a share that vanishes with the round trip's time (tcp_tso_autosize). So where a round trip
//! takes milliseconds, several connections send many small frames, a queue of small frames makes them slower, and slower ones
//! make their frames smaller still: eight connections then get a tenth of what one gets. What waits in the tap's queue is
//! therefore put together here, as a network card's driver does it (Linux: net/ipv4/tcp_offload.c). Nothing waits for that.
//!
//! Segments are put together if they differ in nothing but place and length, with one difference from Linux: time stamps may
//! grow. What comes out is then what a receiver that acknowledges late makes of the segments: the first one's time stamps count
//! (RFC 7323, section 4.3). Nothing here trusts a frame: it may be anybody's.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

use super::header::{ETHERNET_LEN, HEADER_LEN, bits};

/// The longest headers that are looked at: virtio, Ethernet, IPv6, and TCP with time stamps.
pub const MAX_HEADERS: usize = IP + 40 + TCP_LEN + TIMESTAMPS.len() + 8;

/// Where the IP header is.
const IP: usize = HEADER_LEN + ETHERNET_LEN;
/// A TCP header without options.
const TCP_LEN: usize = 20;
/// Two times nothing, and the option of time stamps with its length (RFC 7323, appendix A). Two times of four bytes follow.
const TIMESTAMPS: [u8; 4] = [1, 1, 8, 10];
/// Largest length that an IP header tells.
const MAX_IP_LEN: usize = 0xffff;

/// TCP's flags (RFC 9293, section 3.1), and where the checksum is.
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;
const CHECKSUM: usize = 16;

/// Which connections' segments the driver takes in frames of several.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kinds {
    /// Over IPv4.
    pub v4: bool,
    /// Over IPv6.
    pub v6: bool,
}

/// Both ends of a connection, as one direction of it names them: kind of frame, addresses, ports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Flow([u8; 38]);

/// A TCP segment, or several that were put together.
#[derive(Clone, Debug)]
pub struct Segment {
    flow: Flow,
    /// From the virtio header to TCP's options.
    headers: [u8; MAX_HEADERS],
    len: usize,
    /// Where the TCP header is.
    tcp: usize,
    /// Bytes behind the headers.
    payload: usize,
    /// Bytes of each packet that the host was to make of it, but for the last.
    packet: usize,
    /// Whether others may follow in the same frame.
    open: bool,
    grown: bool,
}

impl Segment {
    /// The segment in a frame of `len` bytes that starts like this, with its virtio header. `None` if it is something else, or
    /// might be a part of a connection that cannot be told.
    pub fn parse(start: &[u8], len: usize, kinds: Kinds) -> Option<Self> {
        let (tcp, protocol, ip_len, addresses, plain, wanted) = match bytes::<2>(start, IP - 2)? {
            // No options.
            [0x08, 0x00] if byte(start, IP)? == 0x45 => {
                let fragment = word(start, IP + 6)?;
                // Only the flag that forbids fragments, so that the identification says nothing.
                let (whole, fixed) = (fragment & 0x3fff == 0, fragment == 0x4000);
                let ip_len = usize::from(word(start, IP + 2)?);
                let protocol = if whole { byte(start, IP + 9)? } else { 0 };
                (IP + 20, protocol, ip_len, start.get(IP + 12..IP + 20)?, fixed, (kinds.v4, VIRTIO_NET_HDR_GSO_TCPV4))
            }
            [0x86, 0xdd] => {
                let ip_len = usize::from(word(start, IP + 4)?) + 40;
                let addresses = start.get(IP + 8..IP + 40)?;
                (IP + 40, byte(start, IP + 6)?, ip_len, addresses, true, (kinds.v6, VIRTIO_NET_HDR_GSO_TCPV6))
            }
            _ => return None,
        };
        if protocol != 6 {
            return None;
        }
        let mut flow = [0; 38];
        let named =
            bytes::<2>(start, IP - 2)?.into_iter().chain(addresses.iter().copied()).chain(bytes::<4>(start, tcp)?);
        flow.iter_mut().zip(named).for_each(|(to, from)| *to = from);

        let tcp_len = usize::from(byte(start, tcp + 12)? >> 4) * 4;
        let headers_len = tcp + tcp_len;
        let mut headers = [0; MAX_HEADERS];
        let known = start.get(..headers_len).zip(headers.get_mut(..headers_len));
        let payload = len.saturating_sub(headers_len);
        let segmented = u32::from(byte(start, 1)?) != VIRTIO_NET_HDR_GSO_NONE;
        let packet = if segmented { usize::from(u16::from_le_bytes(bytes(start, 4)?)) } else { payload };
        let (kind_wanted, kind) = wanted;
        let open = known.is_some()
            && plain
            && kind_wanted
            && payload > 0
            && packet > 0
            && ip_len == len.saturating_sub(IP)
            && (!segmented || byte(start, 1)? == bits(kind))
            && byte(start, 0)? == bits(VIRTIO_NET_HDR_F_NEEDS_CSUM)
            && usize::from(u16::from_le_bytes(bytes(start, 6)?)) == tcp - HEADER_LEN
            && usize::from(u16::from_le_bytes(bytes(start, 8)?)) == CHECKSUM
            && byte(start, tcp + 12)? & 0xf == 0
            && byte(start, tcp + 13)? & !PSH == ACK
            && (tcp_len == TCP_LEN || has_timestamps(start, tcp, tcp_len));
        if let Some((from, to)) = known {
            to.copy_from_slice(from);
        }
        Some(Self { flow: Flow(flow), headers, len: headers_len, tcp, payload, packet, open, grown: false })
    }

    /// Whose it is.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// Where the payload begins.
    pub fn headers_len(&self) -> usize {
        self.len
    }

    /// Whether another one may be appended.
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Nothing more is appended.
    pub fn close(&mut self) {
        self.open = false;
    }

    /// Appends the next one of the same connection, if both may be one.
    pub fn append(&mut self, next: &Self) -> bool {
        if !self.is_followed_by(next) {
            return false;
        }
        self.payload += next.payload;
        self.grown = true;
        let flags = next.headers.get(self.tcp + 13).map_or(0, |flags| flags & PSH);
        if let Some(own) = self.headers.get_mut(self.tcp + 13) {
            *own |= flags;
        }
        true
    }

    fn is_followed_by(&self, next: &Self) -> bool {
        let same = |range: std::ops::Range<usize>| self.headers.get(range.clone()) == next.headers.get(range);
        let number = |segment: &Self, at| bytes(&segment.headers, at).map_or(0, u32::from_be_bytes);
        // Of time that wraps, half is the future.
        let not_before = |at| number(next, at).wrapping_sub(number(self, at)) < 1 << 31;
        let Ok(payload) = u32::try_from(self.payload) else { return false };
        let timed = self.len > self.tcp + TCP_LEN;
        // Type of service and lifetime, of either version.
        let ip = if self.tcp == IP + 20 {
            same(IP..IP + 2) && same(IP + 8..IP + 9)
        } else {
            same(IP..IP + 4) && same(IP + 7..IP + 8)
        };
        self.open
            && next.open
            && self.flow == next.flow
            && self.len == next.len
            && same(HEADER_LEN..IP)
            && ip
            && number(self, self.tcp + 4).wrapping_add(payload) == number(next, self.tcp + 4)
            // What it acknowledges, and its window.
            && same(self.tcp + 8..self.tcp + 12)
            && same(self.tcp + 14..self.tcp + 16)
            && (!timed || (not_before(self.tcp + TCP_LEN + 4) && not_before(self.tcp + TCP_LEN + 8)))
            // Packets of one size, of which the last may be shorter.
            && self.payload.is_multiple_of(self.packet)
            && (next.packet == self.packet || (next.packet == next.payload && next.payload < self.packet))
            && self.len - IP + self.payload + next.payload <= MAX_IP_LEN
    }

    /// The headers for the frame as it is now, if they are not those that it came with.
    pub fn new_headers(mut self) -> Option<([u8; MAX_HEADERS], usize)> {
        if !self.grown {
            return None;
        }
        let (v4, ip_len) = (self.tcp == IP + 20, self.len - IP + self.payload);
        let kind = if v4 { VIRTIO_NET_HDR_GSO_TCPV4 } else { VIRTIO_NET_HDR_GSO_TCPV6 };
        let short = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
        self.put(1, [bits(kind)]);
        self.put(2, short(self.len - HEADER_LEN).to_le_bytes());
        self.put(4, short(self.packet).to_le_bytes());
        let (at, told) = if v4 { (IP + 2, ip_len) } else { (IP + 4, ip_len - 40) };
        let more = short(told).wrapping_sub(word(&self.headers, at)?);
        self.put(at, short(told).to_be_bytes());
        if v4 {
            // A sum's complement (RFC 1624): the header has become longer by so much.
            let sum = word(&self.headers, IP + 10)?;
            self.put(IP + 10, (!add(!sum, more)).to_be_bytes());
        }
        // For the driver to finish: the sum of the addresses, the protocol and the length.
        let sum = word(&self.headers, self.tcp + CHECKSUM)?;
        self.put(self.tcp + CHECKSUM, add(sum, more).to_be_bytes());
        Some((self.headers, self.len))
    }

    fn put<const N: usize>(&mut self, at: usize, value: [u8; N]) {
        if let Some(place) = self.headers.get_mut(at..at + N) {
            place.copy_from_slice(&value);
        }
    }
}

fn has_timestamps(start: &[u8], tcp: usize, len: usize) -> bool {
    len == TCP_LEN + TIMESTAMPS.len() + 8 && bytes(start, tcp + TCP_LEN) == Some(TIMESTAMPS)
}

fn byte(start: &[u8], at: usize) -> Option<u8> {
    start.get(at).copied()
}

fn word(start: &[u8], at: usize) -> Option<u16> {
    bytes(start, at).map(u16::from_be_bytes)
}

fn bytes<const N: usize>(start: &[u8], at: usize) -> Option<[u8; N]> {
    start.get(at..)?.first_chunk().copied()
}

/// The internet checksum's sum (RFC 1071).
fn add(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum.wrapping_add(u16::from(carry))
}

#[cfg(test)]
pub(super) mod tests;
