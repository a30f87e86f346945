//! From a descriptor chain to a request. Every field is read once; nothing is done yet.
//!
//! The header is the first 16 bytes of the readable part, the status the last byte of the writable part, the data what
//! is between, in whatever descriptors the driver chose (section 2.7.4, message framing).

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::{Bytes, GuestAddress};

use crate::virtio::ring::Chain;

/// Data segments of a request: the queue's size without header and status.
pub const SEG_MAX: u32 = 126;
/// Unit of capacity and sector numbers.
pub const SECTOR: u64 = 512;
/// Length of the serial number (section 5.2.6).
pub const SERIAL_LEN: usize = 20;
/// Most bytes of data in one request: more than Linux ever puts into one (max_sectors_kb is 1280), and bounds what a
/// slow disk has to do before a reset is over: the worker looks for one after each request.
const MAX_DATA: u64 = 16 << 20;
const HEADER_LEN: u32 = 16;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read the data from the disk.
    In,
    /// Write the data to the disk.
    Out,
    /// Make what was written durable.
    Flush,
    /// Read the serial number.
    GetId,
    /// Something that was not offered.
    Unsupported(u32),
}

/// A part of the data in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A request whose answer has a place to go. That the memory of its data exists is not known yet.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub kind: Kind,
    /// Where on the disk.
    pub sector: u64,
    /// The data.
    pub data: Vec<Segment>,
    /// Sum of the segments' lengths.
    pub len: u64,
    /// Where the status goes.
    pub status: GuestAddress,
}

/// Why a chain is no request.
#[derive(Debug, PartialEq, Eq)]
pub enum ParseError {
    /// There is no place for a status: the chain can only be given back.
    NoStatus,
    /// The status is all that can be written.
    Malformed {
        /// Where it goes.
        status: GuestAddress,
    },
}

/// Parses a chain.
pub fn parse(chain: &Chain) -> Result<Request, ParseError> {
    let memory = chain.memory();
    let limit = usize::try_from(SEG_MAX).unwrap_or(0) + 2;
    // One more than allowed, to see that there is one more.
    let descriptors: Vec<_> = chain.clone().take(limit + 1).collect();
    let (Some(first), Some(last)) = (descriptors.first(), descriptors.last()) else { return Err(ParseError::NoStatus) };
    let status = last.len().checked_sub(1).filter(|_| last.is_write_only() && descriptors.len() > 1);
    let status = status.and_then(|offset| last.addr().0.checked_add(u64::from(offset))).map(GuestAddress);
    let status = status.ok_or(ParseError::NoStatus)?;
    let malformed = ParseError::Malformed { status };
    if descriptors.len() > limit || first.is_write_only() || first.len() < HEADER_LEN {
        return Err(malformed);
    }
    let Ok(header) = memory.read_obj::<[u8; HEADER_LEN as usize]>(first.addr()) else { return Err(malformed) };
    let (kind, sector) = parse_header(header);

    let wants_writable = matches!(kind, Kind::In | Kind::GetId);
    let mut data = Vec::with_capacity(descriptors.len());
    let mut len = 0;
    for (i, descriptor) in descriptors.iter().enumerate() {
        let skip = if i == 0 { HEADER_LEN } else { 0 };
        let keep = if i + 1 == descriptors.len() { 1 } else { 0 };
        let part = descriptor.len() - skip - keep;
        if part == 0 {
            continue;
        }
        let address = descriptor.addr().0.checked_add(u64::from(skip));
        let (Some(address), true) = (address, descriptor.is_write_only() == wants_writable) else {
            return Err(malformed);
        };
        len += u64::from(part);
        data.push(Segment { address: GuestAddress(address), len: part });
    }
    if len > MAX_DATA || (matches!(kind, Kind::In | Kind::Out) && len % SECTOR != 0) {
        return Err(malformed);
    }
    Ok(Request { kind, sector, data, len, status })
}

/// Little-endian type, reserved word, sector.
fn parse_header(header: [u8; HEADER_LEN as usize]) -> (Kind, u64) {
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let kind = match u32::from_le_bytes([t0, t1, t2, t3]) {
        VIRTIO_BLK_T_IN => Kind::In,
        VIRTIO_BLK_T_OUT => Kind::Out,
        VIRTIO_BLK_T_FLUSH => Kind::Flush,
        VIRTIO_BLK_T_GET_ID => Kind::GetId,
        other => Kind::Unsupported(other),
    };
    (kind, u64::from_le_bytes(sector))
}
