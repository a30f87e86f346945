//! Asks containerd for its version: 1.7 and 2.0 start a shim in the same way but want different answers
//! (see [`super::bootstrap`]).
//!
//! One unary gRPC call over containerd's socket, `containerd.services.version.v1.Version/Version`, in the few frames of
//! HTTP/2 that it takes (RFC 9113; gRPC over HTTP/2). The answer's headers are not looked at: only a success has data.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use protobuf::CodedInputStream;

use crate::deadlines::Operation;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Frame types and flags (RFC 9113, section 6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Largest frame that a peer may send unless it was told otherwise.
const MAX_FRAME: usize = 16384;

/// Frames that are read at most; the answer comes in about six.
const MAX_FRAMES: u32 = 64;

/// The major version of the containerd that serves a socket; `None` if it cannot be had.
pub fn containerd_major(socket: &Path) -> Option<u32> {
    let stream = UnixStream::connect(socket).ok()?;
    let limit = Operation::ContainerdVersion.budget();
    stream.set_read_timeout(Some(limit)).ok()?;
    stream.set_write_timeout(Some(limit)).ok()?;
    major(&ask(stream).ok()?)
}

/// `v2.1.4`, `1.7.24~ds1`.
fn major(version: &str) -> Option<u32> {
    version.trim_start_matches('v').split('.').next()?.parse().ok()
}

fn ask(mut stream: impl Read + Write) -> Result<String> {
    stream.write_all(&request())?;
    let mut message = Vec::new();
    for _ in 0..MAX_FRAMES {
        let (kind, flags, payload) = read_frame(&mut stream)?;
        match kind {
            DATA => message.extend_from_slice(&payload),
            GOAWAY => break,
            _ => {}
        }
        let answered = matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0;
        if answered || message.len() > MAX_FRAME {
            break;
        }
    }
    version(&message).ok_or_else(|| ErrorKind::InvalidData.into())
}

fn request() -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    frame(&mut bytes, SETTINGS, 0, 0, &[]);
    frame(&mut bytes, HEADERS, END_HEADERS, 1, &headers());
    // An empty message: not compressed, no bytes.
    frame(&mut bytes, DATA, END_STREAM, 1, &[0; 5]);
    bytes
}

/// The request's headers, none of them indexed or compressed (RFC 7541, section 6 and appendix A).
fn headers() -> Vec<u8> {
    // :method POST and :scheme http are entries of the static table.
    let mut block = vec![0x83, 0x86];
    let mut literal = |name: &[u8], value: &str| {
        block.extend_from_slice(name);
        block.push(u8::try_from(value.len()).unwrap_or(0));
        block.extend_from_slice(value.as_bytes());
    };
    literal(&[0x04], "/containerd.services.version.v1.Version/Version");
    literal(&[0x01], "localhost");
    literal(&[0x0f, 0x10], "application/grpc");
    literal(b"\x00\x02te", "trailers");
    block
}

fn frame(bytes: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    bytes.extend(length.iter().skip(1));
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
}

fn read_frame(stream: &mut impl Read) -> Result<(u8, u8, Vec<u8>)> {
    let mut header = [0; 9];
    stream.read_exact(&mut header)?;
    let [a, b, c, kind, flags, ..] = header;
    let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
    if length > MAX_FRAME {
        return Err(Error::from(ErrorKind::InvalidData));
    }
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok((kind, flags, payload))
}

/// The first field of the `VersionResponse` in a gRPC message.
fn version(message: &[u8]) -> Option<String> {
    let body = message.get(5..)?;
    let mut input = CodedInputStream::from_bytes(body);
    let tag = input.read_raw_tag_or_eof().ok()??;
    if tag == 0x0a { input.read_string().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A server that answers as gRPC does: settings, headers, data, trailers.
    fn serve(version: &'static str) -> (tempfile::TempDir, std::thread::JoinHandle<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("sock")).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = vec![0; request().len()];
            stream.read_exact(&mut asked).unwrap();
            let mut body = vec![0, 0, 0, 0, u8::try_from(version.len()).unwrap() + 2, 0x0a];
            body.push(u8::try_from(version.len()).unwrap());
            body.extend_from_slice(version.as_bytes());
            let mut answer = Vec::new();
            frame(&mut answer, SETTINGS, 0, 0, &[]);
            frame(&mut answer, HEADERS, END_HEADERS, 1, &[0x88]);
            frame(&mut answer, DATA, 0, 1, &body);
            frame(&mut answer, HEADERS, END_HEADERS | END_STREAM, 1, &[0x88]);
            stream.write_all(&answer).unwrap();
            asked
        });
        (dir, server)
    }

    #[test]
    fn version_is_asked_for_and_read() {
        for (version, expected) in [("v2.1.4", Some(2)), ("1.7.24~ds1", Some(1)), ("unknown", None)] {
            let (dir, server) = serve(version);
            assert_eq!(containerd_major(&dir.path().join("sock")), expected);
            assert!(server.join().unwrap().starts_with(PREFACE));
        }
    }

    #[test]
    fn silence_and_nonsense_are_no_version() {
        assert_eq!(containerd_major(Path::new("/nonexistent/sock")), None);
        struct Nonsense(&'static [u8]);
        impl Read for Nonsense {
            fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
                self.0.read(buffer)
            }
        }
        impl Write for Nonsense {
            fn write(&mut self, bytes: &[u8]) -> Result<usize> {
                Ok(bytes.len())
            }
            fn flush(&mut self) -> Result<()> {
                Ok(())
            }
        }
        assert!(ask(Nonsense(b"HTTP/1.1 400 Bad Request\r\n\r\n")).is_err());
        assert!(ask(Nonsense(&[0, 0, 0, GOAWAY, 0, 0, 0, 0, 0])).is_err());
    }
}
