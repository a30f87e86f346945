//! Exec and attach as `kubectl` does them, over a WebSocket.

use anyhow::{Context, Result, bail};
use bulkhead_cli::cri::{Pod, status, v1};
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

use crate::streaming::{self, Socket};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// A Status as JSON.
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// A process that a WebSocket is attached to.
pub struct Terminal {
    socket: Socket,
    /// What standard output has said so far.
    pub output: String,
    /// What standard error has said so far.
    pub errors: String,
    /// The final Status, once the process has ended.
    pub status: Option<serde_json::Value>,
}

impl Terminal {
    /// Executes a command with streams attached.
    pub async fn exec(pod: &Pod, container: &str, command: &[&str], tty: bool) -> Result<Self> {
        let request = v1::ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let url = pod.cri().runtime().exec(request).await.map_err(status)?.into_inner().url;
        Self::connect(&url).await
    }

    /// Attaches to a container's own streams.
    pub async fn attach(pod: &Pod, container: &str, tty: bool) -> Result<Self> {
        let request =
            v1::AttachRequest { container_id: container.to_owned(), tty, stdin: true, stdout: true, stderr: !tty };
        let url = pod.cri().runtime().attach(request).await.map_err(status)?.into_inner().url;
        Self::connect(&url).await
    }

    async fn connect(url: &str) -> Result<Self> {
        let socket = streaming::connect(url).await?;
        Ok(Self { socket, output: String::new(), errors: String::new(), status: None })
    }

    /// Types.
    pub async fn send(&mut self, text: &str) -> Result<()> {
        self.message(STDIN, text.as_bytes()).await
    }

    /// Sends what is no text.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.message(STDIN, bytes).await
    }

    /// Changes the size of the terminal, in characters.
    pub async fn resize(&mut self, width: u16, height: u16) -> Result<()> {
        let size = serde_json::json!({ "Width": width, "Height": height }).to_string();
        self.message(RESIZE, size.as_bytes()).await
    }

    async fn message(&mut self, channel: u8, body: &[u8]) -> Result<()> {
        let mut frame = vec![channel];
        frame.extend_from_slice(body);
        self.socket.send(Message::binary(frame)).await.context("cannot send to the streaming server")
    }

    /// Reads until the output contains a text.
    pub async fn expect(&mut self, text: &str) -> Result<()> {
        while !self.output.contains(text) {
            if !self.read().await? {
                bail!("the stream ended before {text:?}; it said {:?} {:?}", self.output, self.errors);
            }
        }
        Ok(())
    }

    /// Reads to the end and returns the process's exit code.
    pub async fn finish(&mut self) -> Result<i64> {
        while self.read().await? {}
        let status = self.status.as_ref().context("the stream ended without a status")?;
        if status["status"] == "Success" {
            return Ok(0);
        }
        let code = status["details"]["causes"][0]["message"].as_str().and_then(|code| code.parse().ok());
        code.with_context(|| format!("the stream ended with {status}"))
    }

    /// Takes in one message; false at the end.
    async fn read(&mut self) -> Result<bool> {
        let message = match tokio::time::timeout(crate::PATIENCE, self.socket.next()).await {
            Err(_) => bail!("the stream is silent; it said {:?} {:?}", self.output, self.errors),
            Ok(None | Some(Ok(Message::Close(_)) | Err(_))) => return Ok(false),
            Ok(Some(Ok(message))) => message.into_data(),
        };
        if let Some((&channel, body)) = message.split_first() {
            match channel {
                STDOUT => self.output.push_str(&String::from_utf8_lossy(body)),
                STDERR => self.errors.push_str(&String::from_utf8_lossy(body)),
                ERROR if !body.is_empty() => {
                    self.status = Some(serde_json::from_slice(body).context("the status is not JSON")?);
                }
                _ => {}
            }
        }
        Ok(true)
    }
}
