//! From the tap to the driver: frames go into the driver's buffers as they are read, and TCP segments that follow each other
//! become one frame there ([`super::segment`]), without a copy.
//!
//! For that, when there may be a segment to append to, a frame's first bytes are read apart from the rest. If the rest continues
//! a frame that is held, it is that frame's already. If not, the first bytes go into a buffer of their own before it, which the
//! driver takes as well: a frame may have any number of buffers.
//!
//! A frame is held no longer than the tap has more at once, and no longer than something may be appended to it or to one before
//! it. So those of one connection keep their order.

use std::collections::VecDeque;
use std::sync::Arc;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF};

use super::header::{ETHERNET_LEN, HEADER_LEN, MAX_FRAME, NUM_BUFFERS};
use super::segment::{Kinds, MAX_HEADERS, Segment};
use super::tap::Tap;
use crate::memory::Memory;
use crate::virtio::buffers::Buffers;
use crate::virtio::ring::{Ring, RingError};

/// The receiving half of the worker.
pub struct Reception {
    tap: Arc<Tap>,
    memory: Memory,
    /// The queue.
    pub ring: Ring,
    /// A read may bring a frame.
    pub readable: bool,
    /// A frame may take several chains.
    mergeable: bool,
    kinds: Kinds,
    /// Room that the largest frame takes, with its header.
    needed: usize,
    /// Chains that wait for a frame.
    supply: VecDeque<Chain>,
    /// Frames that the driver does not have yet, in the order in which they came.
    held: VecDeque<Held>,
}

/// A chain of the driver's, by its head.
type Chain = (u16, Buffers);

/// A frame in the driver's buffers.
struct Held {
    /// Where its headers are.
    first: Buffers,
    /// All of its chains with the number of bytes in each.
    parts: Vec<(u16, usize)>,
    segment: Option<Segment>,
}

impl Held {
    fn is_open(&self) -> bool {
        self.segment.as_ref().is_some_and(Segment::is_open)
    }

    fn close(&mut self) {
        if let Some(segment) = &mut self.segment {
            segment.close();
        }
    }
}

impl Reception {
    /// For a queue of a device with an MTU and these features.
    pub fn new(tap: Arc<Tap>, memory: Memory, ring: Ring, mtu: u16, features: u64) -> Self {
        let has = |bit: u32| features & (1 << bit) != 0;
        let kinds = Kinds { v4: has(VIRTIO_NET_F_GUEST_TSO4), v6: has(VIRTIO_NET_F_GUEST_TSO6) };
        let frame = if kinds.v4 || kinds.v6 { MAX_FRAME } else { usize::from(mtu) + ETHERNET_LEN };
        Self {
            tap,
            memory,
            ring,
            readable: true,
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            kinds,
            needed: HEADER_LEN + frame,
            supply: VecDeque::new(),
            held: VecDeque::new(),
        }
    }

    /// Reads up to `budget` frames; if there may be more, the queue's kick is readable afterwards. The driver is not told.
    pub fn receive(&mut self, budget: usize) -> Result<(), RingError> {
        for _ in 0..budget {
            if !self.readable || !self.stock_up()? {
                return self.release_all();
            }
            self.read()?;
        }
        self.ring.kick_self();
        self.release_all()
    }

    /// Takes chains until they hold the largest frame, even behind the first of them if there are as many. `false` if there are
    /// too few; then the driver will kick.
    fn stock_up(&mut self) -> Result<bool, RingError> {
        let size = usize::from(self.ring.size());
        let mut room: usize = self.supply.iter().map(|(_, buffers)| buffers.size()).sum();
        self.ring.suppress_kicks()?;
        // Bounded: a driver can make useless chains available as fast as they are returned.
        for _ in 0..2 * size {
            // A driver whose whole ring holds less than the largest frame must do with that.
            let enough = room >= self.needed || self.supply.len() >= size;
            let first = self.supply.front().map_or(0, |(_, buffers)| buffers.size());
            if enough && (!self.mergeable || room - first >= self.needed) {
                return Ok(true);
            }
            let Some(chain) = self.ring.pop()? else {
                if enough {
                    return Ok(true);
                }
                if self.ring.expect_kicks()? {
                    self.ring.suppress_kicks()?;
                    continue;
                }
                return Ok(false);
            };
            let head = chain.head_index();
            let least = if self.mergeable { HEADER_LEN } else { self.needed };
            match Buffers::writable(&self.memory, chain) {
                Ok(buffers) if buffers.size() >= least => {
                    room += buffers.size();
                    self.supply.push_back((head, buffers));
                }
                _ => self.ring.push(head, 0)?,
            }
        }
        self.ring.kick_self();
        Ok(false)
    }

    /// Reads one frame.
    fn read(&mut self) -> Result<(), RingError> {
        let mut start = [0; MAX_HEADERS];
        let apart = self.apart();
        let skipped = usize::from(apart > 0);
        let chains = if self.mergeable { self.supply.len() } else { 1 };
        let (own, _) = start.split_at_mut(apart.min(MAX_HEADERS));
        let buffers = self.supply.iter().take(chains).skip(skipped).map(|(_, buffers)| buffers);
        let Ok(len) = Buffers::read_from(&*self.tap, own, buffers) else {
            // Nothing there; or the interface is down or gone, and the edge tells when that changes.
            self.readable = false;
            return Ok(());
        };
        let room =
            apart + self.supply.iter().take(chains).skip(skipped).map(|(_, buffers)| buffers.size()).sum::<usize>();
        // Cut off, it is useless, and the chains are free for the next. The kernel does not say so.
        if len < HEADER_LEN || (len >= room && room < self.needed) {
            return Ok(());
        }
        if apart > 0 { self.place_apart(&start, apart, len) } else { self.place(&mut start, len) }
    }

    /// How many of the next frame's bytes are to be read apart: the headers of the segment that one may be appended to. 0 if
    /// there is none, or no room for it.
    fn apart(&self) -> usize {
        let open = self.held.iter().rev().filter(|held| held.is_open()).find_map(|held| held.segment.as_ref());
        let (Some(open), Some((_, first))) = (open, self.supply.front()) else { return 0 };
        let len = open.headers_len();
        let rest: usize = self.supply.iter().skip(1).map(|(_, buffers)| buffers.size()).sum();
        if first.size() >= len && rest + len >= self.needed { len } else { 0 }
    }

    /// A frame that is in the first chains.
    fn place(&mut self, start: &mut [u8; MAX_HEADERS], len: usize) -> Result<(), RingError> {
        let known = match self.supply.front() {
            Some((_, first)) => len.min(first.size()).min(MAX_HEADERS),
            None => 0,
        };
        let (start, _) = start.split_at_mut(known);
        let read = self.supply.front().is_some_and(|(_, first)| first.read(0, start));
        let segment = if read && self.mergeable { Segment::parse(start, len, self.kinds) } else { None };
        let mut chains = self.take(len).into_iter();
        let Some((part, (head, first))) = chains.next() else { return Ok(()) };
        let rest = chains.map(|(len, (head, _))| (head, len));
        self.hold(first, std::iter::once((head, part)).chain(rest).collect(), segment)
    }

    /// A frame of which the first `apart` bytes are in `start`, and the rest in the chains behind the first.
    fn place_apart(&mut self, start: &[u8; MAX_HEADERS], apart: usize, len: usize) -> Result<(), RingError> {
        let (start, _) = start.split_at(apart.min(len).min(MAX_HEADERS));
        let segment = Segment::parse(start, len, self.kinds);
        let Some((head, first)) = self.supply.pop_front() else { return Ok(()) };
        let rest = self.take(len - start.len()).into_iter().map(|(len, (head, _))| (head, len));
        // The last one of the connection, so that none is overtaken.
        let before = segment.as_ref().filter(|segment| segment.headers_len() == apart).and_then(|segment| {
            let same = |held: &&mut Held| held.segment.as_ref().is_some_and(|held| held.flow() == segment.flow());
            let last = self.held.iter_mut().rev().find(same)?;
            last.segment.as_mut()?.append(segment).then_some(last)
        });
        if let Some(before) = before {
            before.parts.extend(rest);
            self.supply.push_front((head, first));
            return Ok(());
        }
        let parts = std::iter::once((head, start.len())).chain(rest).collect();
        // It has room: it holds the headers of another.
        let _ = first.write(0, start);
        self.hold(first, parts, segment)
    }

    /// Takes the first chains of the supply, as many as `len` bytes fill, with the number of bytes in each.
    fn take(&mut self, len: usize) -> Vec<(usize, Chain)> {
        let (mut left, mut taken) = (len, Vec::new());
        while left > 0 {
            let Some(chain) = self.supply.pop_front() else { break };
            let part = left.min(chain.1.size());
            left -= part;
            taken.push((part, chain));
        }
        taken
    }

    fn hold(&mut self, first: Buffers, parts: Vec<(u16, usize)>, segment: Option<Segment>) -> Result<(), RingError> {
        let flow = segment.as_ref().map(Segment::flow);
        for held in &mut self.held {
            // Nothing is appended before what came between. What cannot be told may belong to any connection.
            if flow.is_none() || held.segment.as_ref().map(Segment::flow) == flow {
                held.close();
            }
        }
        self.held.push_back(Held { first, parts, segment });
        while self.held.front().is_some_and(|held| !held.is_open()) {
            self.release()?;
        }
        Ok(())
    }

    fn release_all(&mut self) -> Result<(), RingError> {
        while !self.held.is_empty() {
            self.release()?;
        }
        Ok(())
    }

    /// Gives the driver the first of the frames that are held.
    fn release(&mut self) -> Result<(), RingError> {
        let Some(Held { first, parts, segment }) = self.held.pop_front() else { return Ok(()) };
        // There is room for both: every chain holds a virtio header, and this one held the headers when they were read.
        if let Some((headers, len)) = segment.and_then(Segment::new_headers) {
            let (headers, _) = headers.split_at(len.min(MAX_HEADERS));
            let _ = first.write(0, headers);
        }
        let count = u16::try_from(parts.len()).unwrap_or(u16::MAX);
        let _ = first.write(NUM_BUFFERS, &count.to_le_bytes());
        for (head, len) in parts {
            self.ring.stage(head, len)?;
        }
        // All at once: the driver takes a frame of which a chain is missing for an error.
        self.ring.publish()
    }
}
