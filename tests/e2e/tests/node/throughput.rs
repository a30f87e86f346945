//! Several connections at once carry about what one does.
//!
//! Where an exit is dear and a round trip takes milliseconds, as in an emulated node, Linux cuts what several connections send
//! into many small frames (`virtio::net::segment` in the VMM says why), and each costs what a large one does.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::{PATIENCE, TestPod, node_command, on_node};

/// The node on its bridge.
const NODE: &str = "10.88.0.1";
const STREAMS: usize = 8;
/// For all connections together; several times what a connection needs to find its speed.
const MIB: u32 = 32;
const BYTES: usize = (MIB as usize) << 20;
const ROUNDS: usize = 3;

/// What was lost on the way.
#[derive(Debug)]
struct Losses {
    /// Packets that the node's kernel has sent, and those of them that it had to send again.
    sent: u64,
    again: u64,
    /// Frames that the tap had no room for.
    dropped: u64,
}

impl Losses {
    async fn read(pod: &TestPod) -> Result<Self> {
        // Two lines for each protocol: names and numbers.
        let snmp = super::read("/proc/net/snmp")?;
        let mut lines = snmp.lines().filter(|line| line.starts_with("Tcp:")).map(str::split_whitespace);
        let (names, numbers) = lines.next().zip(lines.next()).context("no TCP in /proc/net/snmp")?;
        let all: Vec<_> = names.zip(numbers).collect();
        let number = |name: &str| -> Result<u64> {
            let found = all.iter().find(|(known, _)| *known == name).with_context(|| format!("no {name}"))?;
            Ok(found.1.parse()?)
        };
        let netns = pod.netns().await?;
        let devices = node_command("nsenter", &[&format!("--net={netns}"), "cat", "/proc/net/dev"])?;
        let tap = devices.lines().find_map(|line| line.trim().strip_prefix("tap-")).context("no tap")?;
        // The name, then eight columns of what is received, then bytes, packets, errors and drops of what is sent.
        let dropped = tap.split_whitespace().nth(12).context("no column of drops")?.parse()?;
        Ok(Self { sent: number("OutSegs")?, again: number("RetransSegs")?, dropped })
    }

    /// Nothing to speak of: some sent again is TCP looking for the limit.
    fn are_few_since(&self, before: &Self) -> Result<()> {
        let (sent, again) = (self.sent - before.sent, self.again - before.again);
        ensure!(self.dropped - before.dropped <= 10, "the tap has dropped frames: {before:?}, {self:?}");
        ensure!(again * 100 <= sent, "{again} of {sent} packets were sent again");
        Ok(())
    }
}

/// Runs `count` threads, each with what `prepare` makes, from the same moment on, and tells how long they took.
fn at_once<T: Send>(prepared: Vec<T>, run: impl Fn(T) -> Result<()> + Sync) -> Result<Duration> {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = prepared.into_iter().map(|one| scope.spawn(|| run(one))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread has panicked"))?)
    })?;
    Ok(begin.elapsed())
}

/// How long it takes to send to the pod by so many connections, from when all are there.
async fn into_pod(pod: &TestPod, container: &str, streams: usize) -> Result<Duration> {
    let listener = TcpListener::bind((NODE, 0))?;
    let port = listener.local_addr()?.port();
    let server = std::thread::spawn(move || {
        let asked = (0..streams).map(|_| {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                request.push(byte[0]);
            }
            Ok(stream)
        });
        let asked: Vec<TcpStream> = asked.collect::<Result<_>>()?;
        let page = [b"HTTP/1.0 200 OK\r\n\r\n".as_slice(), &vec![0; BYTES / streams]].concat();
        at_once(asked, |mut stream| {
            stream.write_all(&page)?;
            stream.shutdown(Shutdown::Write)?;
            // The pod has closed, so it has everything.
            stream.read_to_end(&mut Vec::new())?;
            Ok(())
        })
    });
    let get = format!("wget -qO /dev/null http://{NODE}:{port}/ || echo failed");
    let told = pod.sh(container, &format!("for i in $(seq {streams}); do ({get}) & done; wait")).await?;
    ensure!(told.is_empty(), "{told}");
    server.join().map_err(|_| anyhow::anyhow!("the server on the node has panicked"))?
}

/// How long it takes to get a file from the pod by so many connections, from when all are there.
fn out_of_pod(address: Ipv4Addr, streams: usize) -> Result<Duration> {
    let connections = (0..streams).map(|_| {
        let stream = TcpStream::connect((address, 80))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    });
    at_once(connections.collect::<Result<Vec<_>>>()?, |mut stream| {
        write!(stream, "GET /{streams} HTTP/1.0\r\n\r\n")?;
        let (mut buffer, mut all) = (vec![0; 1 << 18], 0);
        loop {
            match stream.read(&mut buffer)? {
                0 => break,
                count => all += count,
            }
        }
        ensure!(all > BYTES / streams, "{all} bytes");
        Ok(())
    })
}

/// Compares the best of a few measurements by turns: what else a machine does makes some slow, and none fast. A collapse is a
/// tenth; six tenths are usual in an emulated node.
async fn compare(way: &str, mut measure: impl AsyncFnMut(usize) -> Result<Duration>) -> Result<()> {
    let mut best = [Duration::MAX; 2];
    for _ in 0..ROUNDS {
        for (best, streams) in best.iter_mut().zip([1, STREAMS]) {
            *best = measure(streams).await?.min(*best);
        }
    }
    let [one, several] = best.map(|time| f64::from(MIB) * 8.0 * 1.048_576 / time.as_secs_f64());
    println!("{way} the pod: {one:.0} Mbit/s by one connection, {several:.0} by {STREAMS}");
    ensure!(several * 3.0 >= one, "{several:.0} Mbit/s {way} the pod by {STREAMS} connections, {one:.0} by one");
    Ok(())
}

#[test]
fn eight_connections_into_a_pod_carry_at_least_a_third_of_what_one_does_and_lose_nothing() {
    on_node(async |node| {
        let pod = node.pod("into").await?;
        let container = pod.sleeper("main").await?;
        let before = Losses::read(&pod).await?;
        compare("into", async |streams| into_pod(&pod, &container, streams).await).await?;
        Losses::read(&pod).await?.are_few_since(&before)
    });
}

#[test]
fn eight_connections_out_of_a_pod_carry_at_least_a_third_of_what_one_does_and_lose_nothing() {
    on_node(async |node| {
        let pod = node.pod("out").await?;
        let container = pod.sleeper("main").await?;
        // In memory: the share is another matter.
        let file = |streams: usize| format!("head -c {} /dev/zero > /dev/shm/{streams}", BYTES / streams);
        let start = format!("{}; {}; busybox httpd -p 80 -h /dev/shm", file(1), file(STREAMS));
        pod.sh(&container, &start).await?;
        let addresses = pod.addresses().await?;
        let address = addresses.iter().find_map(|ip| ip.parse().ok()).context("no IPv4 address")?;
        let before = Losses::read(&pod).await?;
        compare("out of", async |streams| out_of_pod(address, streams)).await?;
        Losses::read(&pod).await?.are_few_since(&before)
    });
}
