//! Inputs by hand: the seeds are written with it.

use crate::guest::{segment, step};

/// An input of a device's target.
#[derive(Default)]
pub struct Script(Vec<u8>);

/// A buffer of a chain.
pub enum Segment<'a> {
    /// These bytes, for the device to read.
    Bytes(&'a [u8]),
    /// Room for the device to write.
    Room(u16),
    /// Any address and length, writable or not.
    Wild(u64, u32, bool),
}

impl Script {
    /// A script that begins with what the target wants to know, and acknowledges all features but these.
    pub fn new(prefix: &[u8], without_features: u64) -> Self {
        Self(prefix.to_vec()).raw(&without_features.to_le_bytes())
    }

    /// Its bytes.
    pub fn bytes(self) -> Vec<u8> {
        self.0
    }

    /// Any bytes.
    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn segments(self, segments: &[Segment<'_>]) -> Self {
        let count = u8::try_from(segments.len() - 1).unwrap();
        segments.iter().fold(self.raw(&[count]), |script, one| match one {
            Segment::Bytes(bytes) => {
                let len = u16::try_from(bytes.len()).unwrap();
                script.raw(&[0]).raw(&len.to_le_bytes()).raw(bytes)
            }
            Segment::Room(len) => script.raw(&[segment::WRITE]).raw(&len.to_le_bytes()),
            Segment::Wild(address, len, write) => {
                let flags = segment::WILD | if *write { segment::WRITE } else { 0 };
                script.raw(&[flags]).raw(&address.to_le_bytes()).raw(&len.to_le_bytes())
            }
        })
    }

    /// A chain.
    #[must_use]
    pub fn chain(self, queue: u8, segments: &[Segment<'_>]) -> Self {
        self.raw(&[step::CHAIN, queue]).segments(segments)
    }

    /// A chain in an indirect table whose length is off by the bits of `wrong`.
    #[must_use]
    pub fn indirect(self, queue: u8, wrong: u8, segments: &[Segment<'_>]) -> Self {
        self.raw(&[step::INDIRECT, queue, wrong]).segments(segments)
    }

    /// A descriptor as the device's specification has it.
    #[must_use]
    pub fn descriptor(self, queue: u8, index: u16, address: u64, len: u32, flags: u16, next: u16) -> Self {
        let script = self.raw(&[step::DESCRIPTOR, queue]).raw(&index.to_le_bytes()).raw(&address.to_le_bytes());
        script.raw(&len.to_le_bytes()).raw(&flags.to_le_bytes()).raw(&next.to_le_bytes())
    }

    /// Makes a head available.
    #[must_use]
    pub fn offer(self, queue: u8, head: u16) -> Self {
        self.raw(&[step::OFFER, queue]).raw(&head.to_le_bytes())
    }

    /// Sets the available index.
    #[must_use]
    pub fn available(self, queue: u8, index: u16) -> Self {
        self.raw(&[step::AVAILABLE, queue]).raw(&index.to_le_bytes())
    }

    /// Notifies.
    #[must_use]
    pub fn kick(self, queue: u8) -> Self {
        self.raw(&[step::KICK, queue])
    }

    /// Resets.
    #[must_use]
    pub fn reset(self) -> Self {
        self.raw(&[step::RESET]).raw(&[0; 8])
    }

    /// What the target makes of it.
    #[must_use]
    pub fn own(self, bytes: &[u8]) -> Self {
        self.raw(&[step::OWN]).raw(bytes)
    }
}
