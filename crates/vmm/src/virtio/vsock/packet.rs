//! The header of a packet (section 5.10.6), read from guest memory once and judged from the copy.
//!
//! `virtio-vsock` has a packet type too, but it takes payloads of one descriptor only, and drivers may send several.

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;

/// Largest payload, both ways: Linux's VIRTIO_VSOCK_MAX_PKT_BUF_SIZE.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// CID of the host, VMADDR_CID_HOST.
pub const HOST_CID: u64 = 2;

/// VIRTIO_VSOCK_TYPE_STREAM.
pub const TYPE_STREAM: u16 = 1;

/// Operations, section 5.10.6.
pub mod op {
    /// VIRTIO_VSOCK_OP_REQUEST.
    pub const REQUEST: u16 = 1;
    /// VIRTIO_VSOCK_OP_RESPONSE.
    pub const RESPONSE: u16 = 2;
    /// VIRTIO_VSOCK_OP_RST.
    pub const RST: u16 = 3;
    /// VIRTIO_VSOCK_OP_SHUTDOWN.
    pub const SHUTDOWN: u16 = 4;
    /// VIRTIO_VSOCK_OP_RW.
    pub const RW: u16 = 5;
    /// VIRTIO_VSOCK_OP_CREDIT_UPDATE.
    pub const CREDIT_UPDATE: u16 = 6;
    /// VIRTIO_VSOCK_OP_CREDIT_REQUEST.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of a SHUTDOWN.
pub mod shutdown {
    /// The sender will receive no more.
    pub const RECEIVE: u32 = 1;
    /// The sender will send no more.
    pub const SEND: u32 = 2;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// struct virtio_vsock_hdr.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Header {
    /// Sender.
    pub src_cid: u64,
    /// Receiver.
    pub dst_cid: u64,
    /// Sender's port.
    pub src_port: u32,
    /// Receiver's port.
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// Depends on `op`.
    pub flags: u32,
    /// Size of the sender's receive buffer.
    pub buf_alloc: u32,
    /// Bytes that the sender has taken out of its receive buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes a header. Every pattern of bytes is one.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// The RST that answers a packet which belongs to no connection.
    pub fn reset_for(packet: &Self) -> Self {
        Self {
            src_cid: packet.dst_cid,
            dst_cid: packet.src_cid,
            src_port: packet.dst_port,
            dst_port: packet.src_port,
            kind: packet.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((head, tail)) = rest.split_first_chunk() else { return [0; N] };
    *rest = tail;
    *head
}
