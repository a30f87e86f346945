//! Packets between the node and a pod. The node is the other end, and takes the time.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::results::{Case, Sample};
use super::stage::{Bench, Measurement, PORT, Side};
use crate::node_command;

/// What all streams of a case carry together, in MiB.
const MIB: u32 = 64;

/// What is written and read at once.
const CHUNK: usize = 256 << 10;

/// Questions, and echo requests, of a case.
const QUESTIONS: u32 = 100;
const PINGS: u32 = 5;

/// Measures all of it.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    for streams in [1, 8] {
        for to_pod in [true, false] {
            bench.rounds(async |side, _| Ok(vec![transfer(side, streams, to_pod).await?])).await?;
        }
    }
    bench.rounds(async |side, _| Ok(vec![questions(side).await?])).await?;
    bench.rounds(async |side, _| Ok(vec![pings(side).await?])).await
}

/// Streams that carry their part each, from the first byte to the last one's acknowledgement.
async fn transfer(side: &mut Side, streams: u32, to_pod: bool) -> Result<Measurement> {
    let connections = (0..streams).map(|_| TcpStream::connect((side.address, PORT + 1)));
    let connections = try_join_all(connections).await.context("the container takes no streams")?;
    let bytes = u64::from(MIB / streams) << 20;
    let before = side.counts().await?;
    let begun = Instant::now();
    if to_pod {
        try_join_all(connections.into_iter().map(|stream| send(stream, bytes))).await?;
    } else {
        try_join_all(connections.into_iter().map(|stream| receive(stream, bytes))).await?;
    }
    let value = begun.elapsed().as_secs_f64() * 1000.0;
    let counts = side.since(&before).await?;
    let direction = if to_pod { "node to pod" } else { "pod to node" };
    let name = format!("network/TCP {direction}/{streams} stream{}", if streams == 1 { "" } else { "s" });
    Ok((Case::time(name, "MiB", MIB), Sample { value, calls: 0, counts }))
}

async fn send(mut stream: TcpStream, bytes: u64) -> Result<()> {
    stream.write_all(b"w").await?;
    let chunk = vec![0; CHUNK];
    for _ in 0..bytes / CHUNK as u64 {
        stream.write_all(&chunk).await?;
    }
    stream.shutdown().await?;
    stream.read_exact(&mut [0]).await.context("the container does not acknowledge a stream")?;
    Ok(())
}

async fn receive(mut stream: TcpStream, bytes: u64) -> Result<()> {
    stream.write_all(&[b"r".as_slice(), &bytes.to_le_bytes()].concat()).await?;
    let (mut chunk, mut received) = (vec![0; CHUNK], 0);
    loop {
        match stream.read(&mut chunk).await? {
            0 => break,
            length => received += length as u64,
        }
    }
    ensure!(received == bytes, "a stream ended after {received} of {bytes} bytes");
    Ok(())
}

/// A line there and a line back, one after the other on one connection.
async fn questions(side: &mut Side) -> Result<Measurement> {
    let before = side.counts().await?;
    let begun = Instant::now();
    for _ in 0..QUESTIONS {
        side.client.order("nothing").await?;
    }
    let value = begun.elapsed().as_secs_f64() * 1000.0;
    let counts = side.since(&before).await?;
    Ok((Case::time("network/question and answer", "question", QUESTIONS), Sample { value, calls: 0, counts }))
}

/// As ping(8) measures it.
async fn pings(side: &mut Side) -> Result<Measurement> {
    let before = side.counts().await?;
    let (count, address) = (PINGS.to_string(), side.address.to_string());
    let text = node_command("ping", &["-n", "-c", &count, "-i", "0.1", "-W", "5", &address])?;
    let counts = side.since(&before).await?;
    let times = round_trips(&text);
    ensure!(times.len() == PINGS as usize, "ping lost packets: {text}");
    Ok((Case::time("network/ping", "echo", PINGS), Sample { value: times.iter().sum(), calls: 0, counts }))
}

/// The milliseconds of each reply.
fn round_trips(text: &str) -> Vec<f64> {
    let time = |line: &str| line.split_once("time=")?.1.split(' ').next()?.parse().ok();
    text.lines().filter_map(time).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_of_ping_have_times() {
        let text = "PING 10.88.0.2 (10.88.0.2) 56(84) bytes of data.\n\
                    64 bytes from 10.88.0.2: icmp_seq=1 ttl=64 time=4.71 ms\n\
                    64 bytes from 10.88.0.2: icmp_seq=2 ttl=64 time=0.5 ms\n\n\
                    --- 10.88.0.2 ping statistics ---\n2 packets transmitted, 2 received, 0% packet loss, time 101ms\n";
        assert_eq!(round_trips(text), [4.71, 0.5]);
    }
}
