//! The agent's RPC connection as the shim lets ttrpc see it: answers alone, and none longer than an answer has to be.
//!
//! ttrpc takes 4 MiB, of which a parser makes fifty times as much: two bytes of an empty entry become a hundred in memory.
//! The shim asks for nothing long, so what is long, or is no answer, ends the connection (ttrpc: PROTOCOL.md,
//! docs/negative-tests.md, 21).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bulkhead_protocol::guest::MAX_ANSWER;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf, Take};
use tokio::net::UnixStream;

/// Length, stream and kind, flags.
const HEADER_LENGTH: usize = 10;

/// The kind of a frame that answers a call.
const RESPONSE: u8 = 2;

/// A connection to the agent.
#[derive(Debug)]
pub struct BoundedReplies {
    /// Its limit is what is missing of the current header or body.
    stream: Take<UnixStream>,
    header: [u8; HEADER_LENGTH],
    /// Bytes of the header that have come.
    have: usize,
    /// Bytes of the body that have not.
    left: usize,
}

impl BoundedReplies {
    /// Watches over a connection from its first byte on.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream: stream.take(0), header: [0; HEADER_LENGTH], have: 0, left: 0 }
    }

    /// Notes what has come; fails at the end of a header that no answer has.
    fn note(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.left > 0 {
            self.left = self.left.saturating_sub(bytes.len());
            return Ok(());
        }
        for byte in bytes {
            if let Some(place) = self.header.get_mut(self.have) {
                *place = *byte;
                self.have += 1;
            }
        }
        if self.have < HEADER_LENGTH {
            return Ok(());
        }
        let [l0, l1, l2, l3, _, _, _, _, kind, _] = self.header;
        let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if kind != RESPONSE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it sends what is no answer"));
        }
        if length > MAX_ANSWER {
            let text = format!("it sends an answer longer than {} KiB", MAX_ANSWER >> 10);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        (self.have, self.left) = (0, length);
        Ok(())
    }
}

impl AsyncRead for BoundedReplies {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let missing = if this.left > 0 { this.left } else { HEADER_LENGTH - this.have };
        this.stream.set_limit(u64::try_from(missing).unwrap_or(u64::MAX));
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
        let noted = this.note(buffer.filled().get(before..).unwrap_or_default());
        if noted.is_err() {
            // Who fails has read nothing.
            buffer.set_filled(before);
        }
        Poll::Ready(noted)
    }
}

impl AsyncWrite for BoundedReplies {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(self.get_mut().stream.get_mut()).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().stream.get_mut()).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().stream.get_mut()).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    fn frame(length: u32, kind: u8, body: &[u8]) -> Vec<u8> {
        [&length.to_be_bytes()[..], &[0, 0, 0, 1, kind, 0], body].concat()
    }

    async fn read(sent: &[u8], pieces: usize) -> io::Result<Vec<u8>> {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let mut answers = BoundedReplies::new(host);
        let sent = sent.to_vec();
        let sending = async move {
            for piece in sent.chunks(pieces) {
                // An end that is refused is not read to its end.
                let _ = guest.write_all(piece).await;
                tokio::task::yield_now().await;
            }
        };
        let mut got = Vec::new();
        let (_, outcome) = tokio::join!(sending, answers.read_to_end(&mut got));
        outcome.map(|_| got)
    }

    #[tokio::test]
    async fn answers_pass_whole_however_they_are_cut() {
        let sent = [frame(5, RESPONSE, b"hello"), frame(0, RESPONSE, b""), frame(3, RESPONSE, b"you")].concat();
        for pieces in [1, 2, 7, 10, 11, 1000] {
            assert_eq!(read(&sent, pieces).await.unwrap(), sent, "in pieces of {pieces}");
        }
    }

    #[tokio::test]
    async fn what_is_long_or_no_answer_ends_the_connection() {
        let long = frame(u32::try_from(MAX_ANSWER).unwrap() + 1, RESPONSE, b"");
        let longest = frame(u32::try_from(MAX_ANSWER).unwrap(), RESPONSE, &vec![0; MAX_ANSWER]);
        assert_eq!(read(&longest, 4096).await.unwrap(), longest);
        for sent in [long, frame(u32::MAX, RESPONSE, b""), frame(0, 1, b""), frame(0, 3, b""), vec![0xa5; 64]] {
            assert_eq!(read(&sent, 3).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}
