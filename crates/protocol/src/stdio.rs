//! Header of a standard stream (ARCHITECTURE.md, D8): each of stdin, stdout and stderr of a process is one vsock connection
//! to [`AGENT_STDIO_PORT`](crate::guest::AGENT_STDIO_PORT).
//!
//! The host sends a little-endian `u16` length and that many bytes of JSON, a [`StreamHeader`]. The guest answers with one
//! byte, [`ACCEPTED`] or [`REFUSED`], and then the connection is the stream: stdin from host to guest, stdout and stderr
//! from guest to host. A half-close ends the direction. A stream may be connected any time between the creation and the
//! deletion of its process; output waits in the guest until then.

use serde::{Deserialize, Serialize};

/// The stream is attached.
pub const ACCEPTED: u8 = 0;
/// There is no such process, or it has no such stream, or the stream is taken.
pub const REFUSED: u8 = 1;
/// Longest header in bytes that a receiver reads.
pub const MAX_HEADER: usize = 1024;

/// Names one stream of one process.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StreamHeader {
    /// The container.
    pub container_id: String,
    /// The exec; empty for the container's init.
    pub exec_id: String,
    /// Which stream.
    pub stream: Stream,
}

/// One of the standard streams. A terminal has `Stdin` (keyboard) and `Stdout` (screen).
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Host to guest.
    Stdin,
    /// Guest to host.
    Stdout,
    /// Guest to host.
    Stderr,
}

/// Encodes a header with its length.
pub fn encode(header: &StreamHeader) -> Result<Vec<u8>, HeaderError> {
    let body = serde_json::to_vec(header).map_err(HeaderError::Json)?;
    let len = u16::try_from(body.len())
        .ok()
        .filter(|len| usize::from(*len) <= MAX_HEADER)
        .ok_or(HeaderError::TooLong(body.len()))?;
    let mut out = len.to_le_bytes().to_vec();
    out.extend_from_slice(&body);
    Ok(out)
}

/// Checks the length prefix of a header.
pub fn decode_length(prefix: [u8; 2]) -> Result<usize, HeaderError> {
    let len = usize::from(u16::from_le_bytes(prefix));
    if len > MAX_HEADER {
        return Err(HeaderError::TooLong(len));
    }
    Ok(len)
}

/// Decodes the body of a header.
pub fn decode(body: &[u8]) -> Result<StreamHeader, HeaderError> {
    serde_json::from_slice(body).map_err(HeaderError::Json)
}

/// A stream header that cannot be sent or understood.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Beyond [`MAX_HEADER`].
    #[error("stream header of {0} bytes; at most {MAX_HEADER} are read: shorten the container or exec id")]
    TooLong(usize),
    /// Not the JSON of a [`StreamHeader`].
    #[error("stream header is not understood")]
    Json(#[source] serde_json::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(id: &str) -> StreamHeader {
        StreamHeader { container_id: id.into(), exec_id: String::new(), stream: Stream::Stdout }
    }

    #[test]
    fn header_encoded_decodes_to_itself() {
        let bytes = encode(&header("c1")).unwrap();
        let len = decode_length([bytes[0], bytes[1]]).unwrap();
        assert_eq!(decode(&bytes[2..2 + len]).unwrap(), header("c1"));
    }

    #[test]
    fn header_too_long_is_refused_on_both_sides() {
        assert!(matches!(encode(&header(&"x".repeat(2000))), Err(HeaderError::TooLong(_))));
        assert!(matches!(decode_length([0xff, 0xff]), Err(HeaderError::TooLong(0xffff))));
    }
}
