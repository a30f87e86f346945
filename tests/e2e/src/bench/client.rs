//! The client in the container, as it is told what to do.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// How long one order may take. The longest, 100 MiB through a container's log, take a minute on an emulated node.
const LIMIT: Duration = Duration::from_secs(600);

/// A connection to a client.
pub struct Client(BufReader<TcpStream>);

/// What an order has taken, by the client's word.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Taken {
    /// Milliseconds.
    pub milliseconds: f64,
    /// System calls.
    pub calls: u64,
}

impl Client {
    /// Connects to a client that listens.
    pub async fn connect(address: IpAddr, port: u16) -> Result<Self> {
        let stream =
            TcpStream::connect((address, port)).await.context("the client in the container does not answer")?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Gives an order and waits until it is done.
    pub async fn order(&mut self, order: &str) -> Result<Taken> {
        let answer = async {
            self.0.write_all(format!("{order}\n").as_bytes()).await?;
            let mut answer = String::new();
            self.0.read_line(&mut answer).await?;
            Ok::<_, std::io::Error>(answer)
        };
        let answer = tokio::time::timeout(LIMIT, answer).await.with_context(|| format!("{order:?} does not end"))?;
        taken(&answer.context("the connection to the client in the container is broken")?)
            .with_context(|| format!("the client cannot do {order:?}"))
    }
}

/// Reads an answer.
pub fn taken(answer: &str) -> Result<Taken> {
    let answer: serde_json::Value =
        serde_json::from_str(answer).with_context(|| format!("{answer:?} is no answer of the client's"))?;
    if let Some(error) = answer["error"].as_str() {
        return Err(anyhow!("{error}"));
    }
    let nanoseconds = answer["ns"].as_f64().context("the client does not say how long it took")?;
    Ok(Taken { milliseconds: nanoseconds / 1e6, calls: answer["calls"].as_u64().unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_understood() {
        let answer = taken("{\"ns\": 1500000, \"calls\": 3}\n").unwrap();
        assert_eq!(answer, Taken { milliseconds: 1.5, calls: 3 });
        assert_eq!(taken("{\"error\": \"stat: none\"}").unwrap_err().to_string(), "stat: none");
        assert!(taken("").is_err());
    }
}
