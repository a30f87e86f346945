//! Port-forward as `kubectl` does it, over a WebSocket: channel 0 carries the bytes, channel 1 an error's text, and the
//! first message of the server on each is the port.

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cli::cri::{Pod, status, v1};
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

use crate::streaming::{self, Socket};

const DATA: u8 = 0;
const ERROR: u8 = 1;

/// Bytes in one message: what `kubectl` sends.
const CHUNK: usize = 32 << 10;

/// One connection to a port of a pod.
pub struct Forwarded {
    socket: Socket,
    /// What the pod's server has said and was not taken yet.
    data: Vec<u8>,
    /// What the CRI has said of an error.
    pub error: String,
    /// Channels whose first message, the port, has come.
    greeted: [bool; 2],
}

impl Forwarded {
    /// Opens a connection to a port on the pod's localhost.
    pub async fn open(pod: &Pod, port: u16) -> Result<Self> {
        let request = v1::PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![i32::from(port)] };
        let url = pod.cri().runtime().port_forward(request).await.map_err(status)?.into_inner().url;
        let socket = streaming::connect(&format!("{url}?port={port}")).await?;
        Ok(Self { socket, data: Vec::new(), error: String::new(), greeted: [false; 2] })
    }

    /// Sends bytes to the server.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            let message = [&[DATA], chunk].concat();
            self.socket.send(Message::binary(message)).await.context("cannot send to the streaming server")?;
        }
        Ok(())
    }

    /// Reads that many bytes of the server.
    pub async fn read_exact(&mut self, count: usize) -> Result<Vec<u8>> {
        while self.data.len() < count {
            ensure!(self.read().await?, "the connection ended after {} bytes: {}", self.data.len(), self.error);
        }
        let rest = self.data.split_off(count);
        Ok(std::mem::replace(&mut self.data, rest))
    }

    /// Reads to the end, which an error of the CRI's is as well, and returns what the server has sent.
    pub async fn read_to_end(&mut self) -> Result<Vec<u8>> {
        while self.error.is_empty() && self.read().await? {}
        Ok(std::mem::take(&mut self.data))
    }

    /// Takes in one message; false at the end.
    async fn read(&mut self) -> Result<bool> {
        let message = match tokio::time::timeout(crate::PATIENCE, self.socket.next()).await {
            Err(_) => bail!("the forwarded connection is silent after {} bytes", self.data.len()),
            Ok(None | Some(Ok(Message::Close(_)) | Err(_))) => return Ok(false),
            Ok(Some(Ok(message))) => message.into_data(),
        };
        let Some((&channel, mut body)) = message.split_first() else { return Ok(true) };
        if let Some(greeted) = self.greeted.get_mut(usize::from(channel))
            && !std::mem::replace(greeted, true)
        {
            body = body.get(2..).context("the first message of a channel does not name the port")?;
        }
        match channel {
            DATA => self.data.extend_from_slice(body),
            ERROR => self.error.push_str(&String::from_utf8_lossy(body)),
            _ => {}
        }
        Ok(true)
    }
}

/// Opens a connection, sends `GET path` and returns the body of the answer.
pub async fn http_get(pod: &Pod, port: u16, path: &str) -> Result<String> {
    let mut forwarded = Forwarded::open(pod, port).await?;
    forwarded.send(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
    let answer = String::from_utf8_lossy(&forwarded.read_to_end().await?).into_owned();
    let body = answer.split_once("\r\n\r\n").filter(|(head, _)| head.contains(" 200 "));
    let Some((_, body)) = body else { bail!("port {port} answers {answer:?}, error {:?}", forwarded.error) };
    Ok(body.trim().to_owned())
}
