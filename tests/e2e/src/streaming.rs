//! The CRI's streaming server, which speaks the `channel.k8s.io` protocols over a WebSocket: the first byte of a message
//! is its channel.

use anyhow::{Context, Result};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// Version 4 of the protocol: messages are binary.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// A connection to the streaming server.
pub type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Connects to a URL that the CRI has given.
pub async fn connect(url: &str) -> Result<Socket> {
    let mut request = url.replacen("http", "ws", 1).into_client_request().context("bad streaming URL")?;
    let protocol = PROTOCOL.parse().context("bad protocol name")?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", protocol);
    let (socket, _) = connect_async(request).await.context("the streaming server refused the connection")?;
    Ok(socket)
}
