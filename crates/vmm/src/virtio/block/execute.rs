//! Carries requests out.

use std::fs::File;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::file_io::{self, Direction};
use super::request::{Kind, ParseError, Request, SECTOR, SERIAL_LEN, parse};
use crate::guest_log;
use crate::virtio::ring::Chain;

/// The backing file.
pub struct Disk {
    pub file: File,
    /// Capacity. It stays what it was at the start: a file that shrinks gives errors, one that grows gives nothing.
    pub sectors: u64,
    pub read_only: bool,
    pub id: [u8; SERIAL_LEN],
}

/// A status byte, and how much data was written to the guest before it.
struct Outcome {
    status: u32,
    written: usize,
}

impl Outcome {
    fn ok(written: usize) -> Self {
        Self { status: VIRTIO_BLK_S_OK, written }
    }

    fn error() -> Self {
        Self { status: VIRTIO_BLK_S_IOERR, written: 0 }
    }
}

/// Answers a chain of a disk that is gone; returns the bytes that were written to it.
pub fn refuse(chain: &Chain) -> usize {
    match parse(chain) {
        Ok(Request { status, .. }) | Err(ParseError::Malformed { status }) => {
            finish(chain.memory(), status, &Outcome::error())
        }
        Err(ParseError::NoStatus) => 0,
    }
}

/// Writes the status; returns the bytes that were written to the chain.
fn finish(memory: &GuestMemoryMmap, status_at: GuestAddress, outcome: &Outcome) -> usize {
    let status = u8::try_from(outcome.status).unwrap_or(u8::MAX);
    match memory.write_obj(status, status_at) {
        Ok(()) => outcome.written + 1,
        Err(_) => 0,
    }
}

impl Disk {
    /// Answers one chain; returns the bytes that were written to it.
    pub fn answer(&self, chain: &Chain) -> usize {
        let memory = chain.memory();
        let (status_at, outcome) = match parse(chain) {
            Ok(request) => (request.status, self.execute(&request, memory)),
            Err(ParseError::Malformed { status }) => (status, Outcome::error()),
            Err(ParseError::NoStatus) => return 0,
        };
        finish(memory, status_at, &outcome)
    }

    fn execute(&self, request: &Request, memory: &GuestMemoryMmap) -> Outcome {
        match request.kind {
            Kind::In => self.transfer(request, memory, Direction::FromFile),
            Kind::Out if self.read_only => Outcome::error(),
            Kind::Out => self.transfer(request, memory, Direction::ToFile),
            Kind::Flush => match self.file.sync_data() {
                Ok(()) => Outcome::ok(0),
                Err(error) => {
                    guest_log!("block: cannot flush the disk: {error}");
                    Outcome::error()
                }
            },
            Kind::GetId => self.write_id(request, memory),
            Kind::Unsupported(_) => Outcome { status: VIRTIO_BLK_S_UNSUPP, written: 0 },
        }
    }

    fn transfer(&self, request: &Request, memory: &GuestMemoryMmap, direction: Direction) -> Outcome {
        let end = request.sector.checked_add(request.len / SECTOR);
        if end.is_none_or(|end| end > self.sectors) {
            return Outcome::error();
        }
        match file_io::transfer(&self.file, request.sector * SECTOR, &request.data, memory, direction) {
            Ok(()) if direction == Direction::FromFile => Outcome::ok(usize::try_from(request.len).unwrap_or(0)),
            Ok(()) => Outcome::ok(0),
            Err(error) => {
                guest_log!(
                    "block: cannot read or write {} sectors at {} of the disk: {error}",
                    request.len / SECTOR,
                    request.sector
                );
                Outcome::error()
            }
        }
    }

    fn write_id(&self, request: &Request, memory: &GuestMemoryMmap) -> Outcome {
        let Some(segment) = request.data.first() else { return Outcome::error() };
        let len = usize::try_from(segment.len).unwrap_or(usize::MAX).min(SERIAL_LEN);
        let (id, _) = self.id.split_at(len);
        match memory.write_slice(id, segment.address) {
            Ok(()) => Outcome::ok(len),
            Err(_) => Outcome::error(),
        }
    }
}
