//! Which parts of the region are plugged: one bit for each device block of 2 MiB, one word for each memory block, of which
//! KVM knows if and only if its word is not zero.

use std::ops::Range;

use crate::guest_log;
use crate::layout::MEMORY_BLOCK;
use crate::memory::Backing;

/// Unit of plugging: what a huge page of the host has.
pub const BLOCK: u64 = 2 << 20;

/// Blocks in a word.
const WORD: usize = 64;

const _: () = assert!(BLOCK * WORD as u64 == MEMORY_BLOCK);

/// Answers of the device (section 5.15.6.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum Verdict {
    /// Done.
    Ack = 0,
    /// Not possible now, or not wanted.
    Nack = 1,
    /// The host cannot, for the time being.
    Busy = 2,
    /// The request makes no sense.
    Error = 3,
}

/// What a range of blocks is (section 5.15.6.6).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u16)]
pub enum Occupancy {
    /// All of it is plugged.
    Plugged = 0,
    /// Nothing of it is.
    Unplugged = 1,
    /// Some of it is.
    Mixed = 2,
}

/// The region.
pub struct Blocks {
    backing: Box<dyn Backing>,
    words: Vec<u64>,
    /// Bytes.
    plugged: u64,
    /// Bytes, a multiple of [`BLOCK`], at most the region's size.
    requested: u64,
}

impl Blocks {
    /// A region of which nothing is plugged or asked for.
    pub fn new(backing: Box<dyn Backing>) -> Self {
        let words = usize::try_from(backing.size() / MEMORY_BLOCK).unwrap_or(0);
        Self { backing, words: vec![0; words], plugged: 0, requested: 0 }
    }

    /// Bytes of the region.
    pub fn size(&self) -> u64 {
        self.backing.size()
    }

    /// Bytes that are plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged
    }

    /// Bytes that the driver is asked to have plugged.
    pub fn requested(&self) -> u64 {
        self.requested
    }

    /// Changes what the driver is asked for, rounded up to whole blocks. `false` if the region is smaller.
    #[must_use]
    pub fn request(&mut self, bytes: u64) -> bool {
        let Some(bytes) = bytes.checked_next_multiple_of(BLOCK).filter(|bytes| *bytes <= self.size()) else {
            return false;
        };
        self.requested = bytes;
        true
    }

    /// The configuration space (section 5.15.4).
    pub fn config(&self) -> [u8; 56] {
        let (start, size) = (self.backing.start(), self.size());
        // block_size, node_id and padding, addr, region_size, usable_region_size, plugged_size, requested_size.
        let words = [BLOCK, 0, start, size, size, self.plugged, self.requested];
        let mut config = [0; 56];
        for (to, word) in config.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        config
    }

    /// The blocks of a request, if there are such.
    fn range(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.backing.start()).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(usize::from(count))?;
        (count > 0 && end <= self.words.len() * WORD).then_some(first..end)
    }

    /// A word's part of a range: the word's number and the bits.
    fn parts(range: Range<usize>) -> impl Iterator<Item = (usize, u64)> + Clone {
        (range.start / WORD..range.end.div_ceil(WORD)).map(move |word| {
            let from = range.start.saturating_sub(word * WORD);
            let to = (range.end - word * WORD).min(WORD);
            (word, (u64::MAX >> (WORD - (to - from))) << from)
        })
    }

    fn word(&self, number: usize) -> u64 {
        self.words.get(number).copied().unwrap_or(0)
    }

    fn set_word(&mut self, number: usize, bits: u64) {
        if let Some(word) = self.words.get_mut(number) {
            *word = bits;
        }
    }

    /// VIRTIO_MEM_REQ_STATE.
    pub fn occupancy(&self, address: u64, count: u16) -> Option<Occupancy> {
        let mut parts = Self::parts(self.range(address, count)?);
        if parts.clone().all(|(word, bits)| self.word(word) & bits == bits) {
            return Some(Occupancy::Plugged);
        }
        let unplugged = parts.all(|(word, bits)| self.word(word) & bits == 0);
        Some(if unplugged { Occupancy::Unplugged } else { Occupancy::Mixed })
    }

    /// Whether the memory blocks of a range may be the guest's. One is the guest's as a whole, however little of it is
    /// plugged; so there are no more of them than hold what was asked for, or those that the guest has kept from when that
    /// was more. Linux fills the blocks that it has before it plugs something in another.
    fn may_attach(&self, range: Range<usize>) -> bool {
        let new = Self::parts(range).filter(|(word, _)| self.word(*word) == 0).count();
        let all = new + self.words.iter().filter(|word| **word != 0).count();
        let most = usize::try_from(self.requested.div_ceil(MEMORY_BLOCK)).unwrap_or(usize::MAX);
        new == 0 || all <= most
    }

    /// VIRTIO_MEM_REQ_PLUG.
    pub fn plug(&mut self, address: u64, count: u16) -> Verdict {
        let Some(range) = self.range(address, count) else { return Verdict::Error };
        if self.occupancy(address, count) != Some(Occupancy::Unplugged) {
            return Verdict::Error;
        }
        let bytes = u64::from(count) * BLOCK;
        if self.plugged + bytes > self.requested || !self.may_attach(range.clone()) {
            return Verdict::Nack;
        }
        for (word, bits) in Self::parts(range.clone()) {
            if self.word(word) == 0
                && let Err(error) = self.backing.attach(word)
            {
                guest_log!("mem: cannot attach a memory block: {error}");
                self.clear(range.start..word * WORD);
                return Verdict::Busy;
            }
            self.set_word(word, self.word(word) | bits);
        }
        self.plugged += bytes;
        Verdict::Ack
    }

    /// VIRTIO_MEM_REQ_UNPLUG.
    pub fn unplug(&mut self, address: u64, count: u16) -> Verdict {
        let Some(range) = self.range(address, count) else { return Verdict::Error };
        if self.occupancy(address, count) != Some(Occupancy::Plugged) {
            return Verdict::Error;
        }
        self.clear(range);
        self.plugged -= u64::from(count) * BLOCK;
        self.backing.discard(address, u64::from(count) * BLOCK);
        Verdict::Ack
    }

    /// VIRTIO_MEM_REQ_UNPLUG_ALL.
    pub fn unplug_all(&mut self) -> Verdict {
        self.clear(0..self.words.len() * WORD);
        self.plugged = 0;
        let (start, size) = (self.backing.start(), self.size());
        self.backing.discard(start, size);
        Verdict::Ack
    }

    /// Clears the bits of a range, and detaches what has become empty.
    fn clear(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        for (number, bits) in Self::parts(range) {
            let before = self.word(number);
            self.set_word(number, before & !bits);
            if before != 0
                && before & !bits == 0
                && let Err(error) = self.backing.detach(number)
            {
                guest_log!("mem: cannot detach a memory block: {error}");
            }
        }
    }
}
