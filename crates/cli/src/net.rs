//! Asking a pod over the network, as a client beside it would.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// How long one attempt to reach a pod may take. Connections on one node take milliseconds; emulation and a busy node
/// stretch that, a lost SYN is sent again after one second and after three.
const ATTEMPT: Duration = Duration::from_secs(10);

/// Time from a refused connection to the next attempt. A server of another network namespace has no descriptor here that says
/// when it listens; this is short beside what starting one takes, and long beside the attempt itself.
const REFUSED_AGAIN: Duration = Duration::from_millis(20);

/// Largest answer that is read, in bytes.
const MAX_ANSWER: u64 = 1024 * 1024;

/// Sends `GET path` and returns the body of a 200 answer. Connections that are refused are tried again until `limit` is
/// over: a server that has only just been started listens when it is ready.
pub async fn http_get(address: IpAddr, port: u16, path: &str, limit: Duration) -> Result<String> {
    let target = SocketAddr::new(address, port);
    let attempts = async {
        loop {
            match TcpStream::connect(target).await {
                Ok(stream) => return request(stream, address, path).await,
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                    tokio::time::sleep(REFUSED_AGAIN).await;
                }
                Err(error) => return Err(error).with_context(|| format!("cannot connect to {target}")),
            }
        }
    };
    tokio::time::timeout(limit, attempts).await.with_context(|| format!("no answer from {target} within {limit:?}"))?
}

async fn request(mut stream: TcpStream, address: IpAddr, path: &str) -> Result<String> {
    let host = match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    };
    let head = format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.context("cannot send the HTTP request")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer).await.context("cannot read the HTTP answer")?;
    let answer = String::from_utf8_lossy(&answer);
    let Some((head, body)) = answer.split_once("\r\n\r\n") else {
        bail!("the answer has no HTTP header: {answer:?}");
    };
    let line = head.lines().next().unwrap_or_default();
    if line.split(' ').nth(1) != Some("200") {
        bail!("HTTP status {line:?}");
    }
    Ok(body.to_owned())
}

/// Sends one echo request with ping(8) and returns the line that reports the reply.
pub async fn ping(address: IpAddr) -> Result<String> {
    let child = tokio::process::Command::new("ping").args(["-c", "1", "-W", "5"]).arg(address.to_string()).output();
    let output = tokio::time::timeout(ATTEMPT, child)
        .await
        .context("ping does not end")?
        .context("cannot run ping: install iputils-ping")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.lines().find(|line| line.contains("bytes from")) {
        Some(line) => Ok(line.to_owned()),
        None => bail!("{address} does not answer ping: {}", text.trim()),
    }
}
