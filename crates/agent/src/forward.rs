//! Connections to the guest's localhost, for what listens there: the guest's half of a port-forward
//! ([`bulkhead_protocol::forward`] defines the exchange).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bulkhead_protocol::forward::{CONNECTED, REFUSED, TARGET_LEN, Target};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpSocket, TcpStream};

use crate::netns::Netns;

/// How long a connection may take to name its target. The host sends the target with the connection; one that does not
/// would hold its task for ever.
const TARGET_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a server may take to accept. A connection to localhost is made or refused at once unless the server's backlog
/// is full; the host waits longer than this.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes copied at once, in each direction.
const CHUNK: usize = 16 * 1024;

/// Serves one connection to its end.
pub async fn connection(netns: Netns, mut host: impl AsyncRead + AsyncWrite + Unpin) {
    let mut bytes = [0; TARGET_LEN];
    let target = match tokio::time::timeout(TARGET_TIMEOUT, host.read_exact(&mut bytes)).await {
        Ok(Ok(_)) => Target::decode(bytes),
        Ok(Err(error)) => return tracing::warn!(%error, "forwarded connection without a target"),
        Err(_) => return tracing::warn!("forwarded connection that names no target"),
    };
    let target = match target {
        Ok(target) => target,
        Err(error) => return tracing::warn!(%error, "forwarded connection refused"),
    };
    let Ok(mut server) = connect(&netns, target).await else {
        let _ = host.write_all(&[REFUSED]).await;
        return;
    };
    let copying = async {
        host.write_all(&[CONNECTED]).await?;
        copy_bidirectional_with_sizes(&mut host, &mut server, CHUNK, CHUNK).await
    };
    if let Err(error) = copying.await {
        tracing::debug!(?target, %error, "forwarded connection ended early");
    }
}

/// Connects to localhost over the family that was dialled, else over the other: the host's dialler takes the first address
/// of "localhost" that accepts, and it is the host that accepts.
async fn connect(netns: &Netns, target: Target) -> io::Result<TcpStream> {
    let ipv4 = SocketAddr::from((Ipv4Addr::LOCALHOST, target.port));
    let ipv6 = SocketAddr::from((Ipv6Addr::LOCALHOST, target.port));
    let addresses = if target.ipv6 { [ipv6, ipv4] } else { [ipv4, ipv6] };
    let server = tokio::time::timeout(CONNECT_TIMEOUT, connect_to_one(netns, addresses)).await??;
    // Whoever wrote the bytes has decided how large a segment is.
    server.set_nodelay(true)?;
    Ok(server)
}

async fn connect_to_one(netns: &Netns, addresses: [SocketAddr; 2]) -> io::Result<TcpStream> {
    let connect = async |address: SocketAddr| {
        let socket = if address.is_ipv4() { TcpSocket::new_v4 } else { TcpSocket::new_v6 };
        netns.run(socket).await??.connect(address).await
    };
    match connect(addresses[0]).await {
        Err(_) => connect(addresses[1]).await,
        connected => connected,
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, UnixStream};

    use super::*;

    /// The host's end of a connection that names a port, and the answer to it.
    async fn dial(target: Target) -> (UnixStream, u8) {
        let (mut host, guest) = UnixStream::pair().unwrap();
        tokio::spawn(connection(Netns::default(), guest));
        host.write_all(&target.encode()).await.unwrap();
        let answer = host.read_u8().await.unwrap();
        (host, answer)
    }

    #[tokio::test]
    async fn bytes_and_half_closes_go_both_ways() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = tokio::spawn(async move {
            let (mut peer, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            peer.read_to_end(&mut asked).await.unwrap();
            peer.write_all(&asked).await.unwrap();
        });
        let (mut host, answer) = dial(Target { ipv6: false, port }).await;
        assert_eq!(answer, CONNECTED);
        let sent = vec![7; 300_000];
        host.write_all(&sent).await.unwrap();
        host.shutdown().await.unwrap();
        let mut got = Vec::new();
        host.read_to_end(&mut got).await.unwrap();
        assert_eq!(got, sent);
        server.await.unwrap();
    }

    #[tokio::test]
    async fn server_on_the_other_family_is_found() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(dial(Target { ipv6: true, port }).await.1, CONNECTED);
    }

    #[tokio::test]
    async fn port_without_a_listener_is_refused_and_closed() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let (mut host, answer) = dial(Target { ipv6: false, port }).await;
        assert_eq!(answer, REFUSED);
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }
}
