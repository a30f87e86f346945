//! Connections to the stream port: header, one byte of answer, then the stream
//! ([`bulkhead_protocol::stdio`] defines the exchange).

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::stdio::{ACCEPTED, REFUSED, StreamHeader, decode, decode_length};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{End, Owner, Streams, copy};

/// How long a connection may take to name its stream. The host sends the header with the connection; one that does not
/// would hold its task for ever.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves one connection to its end.
pub async fn connection(streams: Arc<Streams>, mut connection: impl AsyncRead + AsyncWrite + Unpin) {
    let header = match tokio::time::timeout(HEADER_TIMEOUT, read_header(&mut connection)).await {
        Ok(Ok(header)) => header,
        Ok(Err(error)) => return tracing::warn!(%error, "stream connection without a valid header"),
        Err(_) => return tracing::warn!("stream connection without a header"),
    };
    let owner = Owner { container_id: header.container_id, exec_id: header.exec_id };
    let Some(attachment) = streams.attach(&owner, header.stream) else {
        let _ = connection.write_all(&[REFUSED]).await;
        return;
    };
    if connection.write_all(&[ACCEPTED]).await.is_err() {
        return;
    }
    let copying = async {
        match attachment.end {
            End::Input(end) => copy::input(connection, end).await,
            End::Output(output) => copy::output(output, connection).await,
        }
    };
    tokio::select! {
        outcome = copying => if let Err(error) = outcome {
            tracing::debug!(?owner, stream = ?header.stream, %error, "stream ended early");
        },
        _ = attachment.closed => {}
    }
}

async fn read_header(connection: &mut (impl AsyncRead + Unpin)) -> io::Result<StreamHeader> {
    let mut prefix = [0; 2];
    connection.read_exact(&mut prefix).await?;
    let mut body = vec![0; decode_length(prefix).map_err(io::Error::other)?];
    connection.read_exact(&mut body).await?;
    decode(&body).map_err(io::Error::other)
}
