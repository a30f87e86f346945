//! Port-forward: through the CRI as `kubectl port-forward` does it, and as the CRI does it itself, by dialling localhost in
//! the pod's network namespace. What is asserted of a pod in a guest is asserted of one under runc as well.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use anyhow::{Result, ensure};
use bulkhead_e2e::port_forward::{Forwarded, http_get};
use bulkhead_e2e::{Node, PATIENCE, TestPod, on_node};
use futures::future::try_join_all;

/// A pod with a page behind each of the ways in which a server can listen on localhost, and an echo server.
async fn serving_pod(node: &Node, handler: &str) -> Result<(TestPod, String)> {
    let pod = node.pod_with(&format!("forward-{handler}"), handler, |_| {}).await?;
    let container = pod.sleeper("main").await?;
    let script = "mkdir /www; echo page > /www/index.html
        for at in 127.0.0.1:8004 [::1]:8006 8000; do busybox httpd -p $at -h /www; done
        busybox nc -ll -p 7 -e cat >/dev/null 2>&1 &";
    pod.sh(&container, script).await?;
    Ok((pod, container))
}

/// Connects in the pod's network namespace on the host.
fn dial(netns: &str, address: &str) -> Result<TcpStream> {
    let (netns, address) = (netns.to_owned(), address.to_owned());
    let dialled = std::thread::spawn(move || -> Result<TcpStream> {
        let netns = std::fs::File::open(netns)?;
        rustix::thread::move_into_link_name_space(
            std::os::fd::AsFd::as_fd(&netns),
            Some(rustix::thread::LinkNameSpaceType::Network),
        )?;
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    });
    dialled.join().unwrap_or_else(|_| anyhow::bail!("the dialling thread panicked"))
}

#[test]
fn port_forward_reaches_whatever_listens_on_localhost_and_nothing_else() {
    on_node(async |node| {
        for handler in ["runc", "bulkhead"] {
            let (pod, container) = serving_pod(node, handler).await?;
            for port in [8004, 8006, 8000] {
                ensure!(http_get(&pod, port, "/").await? == "page", "{handler}: port {port}");
            }
            // Nobody listens: an error at once, not an empty answer.
            let mut refused = Forwarded::open(&pod, 8001).await?;
            let got = refused.read_to_end().await?;
            ensure!(got.is_empty() && !refused.error.is_empty(), "{handler}: {got:?} and {:?}", refused.error);
            // A server that starts later is reached.
            pod.sh(&container, "busybox httpd -p 127.0.0.1:8001 -h /www").await?;
            ensure!(http_get(&pod, 8001, "/").await? == "page", "{handler}: a later server");
        }
        Ok(())
    });
}

#[test]
fn forwarded_connections_run_side_by_side_and_keep_every_byte() {
    on_node(async |node| {
        let (pod, _) = serving_pod(node, "bulkhead").await?;
        let echo = async |seed: u8| -> Result<()> {
            let mut connection = Forwarded::open(&pod, 7).await?;
            let sent: Vec<u8> = (0..200_000_u32).map(|at| at.to_le_bytes()[usize::from(seed) % 3] ^ seed).collect();
            // In pieces that the echo server has answered before the next: it reads no more than it can write.
            for piece in sent.chunks(50_000) {
                connection.send(piece).await?;
                ensure!(connection.read_exact(piece.len()).await? == piece, "connection {seed} has other bytes");
            }
            Ok(())
        };
        try_join_all((0..8).map(echo)).await?;
        Ok(())
    });
}

#[test]
fn localhost_of_the_pods_namespace_leads_to_the_guest() {
    on_node(async |node| {
        let (pod, _) = serving_pod(node, "bulkhead").await?;
        let netns = pod.netns().await?;
        for address in ["127.0.0.1:7", "[::1]:7"] {
            let mut stream = dial(&netns, address)?;
            stream.write_all(b"half-closed")?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            ensure!(answer == "half-closed", "{address} answers {answer:?}");
        }
        let refused = dial(&netns, "127.0.0.1:9")?.read(&mut [0]);
        ensure!(
            refused.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset),
            "nobody listens, and still {refused:?}"
        );
        // One more than may be open is reset; those that are open go on.
        let mut open: Vec<_> = (0..128).map(|_| dial(&netns, "127.0.0.1:8000")).collect::<Result<_>>()?;
        let over = dial(&netns, "127.0.0.1:8000")?.read(&mut [0]);
        ensure!(over.is_err(), "129 connections at once: {over:?}");
        let mut answer = String::new();
        open[0].write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        open[0].read_to_string(&mut answer)?;
        ensure!(answer.ends_with("page\n"), "{answer}");
        Ok(())
    });
}
