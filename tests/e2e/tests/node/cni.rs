//! What CNI plugins other than the node's own bridge do to a namespace holds in the guest as well.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bulkhead_e2e::cni::{Guest, Netns, addresses, counter, host_end, host_local, ip};
use bulkhead_e2e::{PATIENCE, node_command, on_node};
use serde_json::json;

/// Routes without what only says who made them, sorted.
fn plain_routes(text: &str) -> Vec<String> {
    let words = |line: &str| -> String {
        let mut plain = Vec::new();
        let mut words = line.split_whitespace();
        while let Some(word) = words.next() {
            match word {
                "proto" | "pref" | "metric" => drop(words.next()),
                _ => plain.push(word),
            }
        }
        plain.join(" ")
    };
    // Of its own addresses and of multicast the kernel tells as it likes.
    let mut routes: Vec<_> =
        text.lines().map(words).filter(|line| !line.starts_with("fe80") && !line.contains("ff00::")).collect();
    routes.sort();
    routes
}

#[test]
fn ptp_network_has_its_gateway_on_link_and_frames_of_9000_bytes() {
    on_node(async |_| {
        let ptp = || json!({ "type": "ptp", "mtu": 9000, "ipam": host_local(&["10.77.0.0/24", "fd77::/64"]) });
        let (mut netns, mut peer) = (Netns::new("ptp")?, Netns::new("ptp-peer")?);
        let result = netns.add("eth0", "ptp", vec![ptp()])?;
        let neighbour = addresses(&peer.add("eth0", "ptp", vec![ptp()])?)?;
        let guest = Guest::start("ptp", &netns)?;
        for family in ["-4", "-6"] {
            let (want, have) = (netns.ip(&format!("{family} route"))?, guest.sh(&format!("ip {family} route"))?);
            ensure!(plain_routes(&want) == plain_routes(&have), "CNI made\n{want}\nthe guest has\n{have}");
        }
        // The neighbour has an address of the same subnet and is on another link.
        for address in &neighbour {
            guest.sh(&format!("ping -c 1 -W 20 {address}"))?;
        }
        ensure!(guest.sh("ip link show eth0")?.contains("mtu 9000"), "the guest's MTU");
        let veth = host_end(&result)?;
        let [gateway, own] = ["10.77.0.1".to_owned(), addresses(&result)?.remove(0)];
        // Frames that cannot be fragmented from here; in the other direction counted.
        node_command("ping", &["-c", "3", "-W", "20", "-M", "do", "-s", "8972", &own])?;
        let before = (counter(&veth, "rx_packets")?, counter(&veth, "rx_bytes")?);
        guest.sh(&format!("ping -c 3 -W 20 -s 8972 {gateway}"))?;
        let after = (counter(&veth, "rx_packets")?, counter(&veth, "rx_bytes")?);
        ensure!(after.0 - before.0 < 12 && after.1 - before.1 > 27_000, "fragments: {before:?} {after:?}");
        guest.remove()?;
        netns.delete()?;
        peer.delete()
    });
}

#[test]
fn address_without_a_subnet_and_a_gateway_that_is_none_work() {
    on_node(async |_| {
        // As Calico makes it: the host's end of the pair answers for an address that nobody has.
        let netns = Netns::new("calico")?;
        ip("link add cali0 type veth peer name eth0 netns calico")?;
        ip("link set cali0 address ee:ee:ee:ee:ee:ee up")?;
        std::fs::write("/proc/sys/net/ipv4/conf/cali0/proxy_arp", "1")?;
        std::fs::write("/proc/sys/net/ipv4/neigh/cali0/proxy_delay", "0")?;
        for line in [
            "link set eth0 up",
            "addr add 10.66.0.5/32 dev eth0",
            "route add 169.254.1.1 dev eth0 scope link",
            "route add default via 169.254.1.1 dev eth0",
        ] {
            netns.ip(line)?;
        }
        ip("route add 10.66.0.5/32 dev cali0")?;
        // An address is answered for that the node has a route to. A node has a default route; this one gets one for it.
        ip("route add 169.254.1.1/32 dev lo")?;
        ip("addr add 10.66.1.1/32 dev lo")?;
        let guest = Guest::start("calico", &netns)?;
        let reached = guest.sh("ping -c 1 -W 20 10.66.1.1");
        ip("addr del 10.66.1.1/32 dev lo")?;
        ip("route del 169.254.1.1/32 dev lo")?;
        let (want, have) = (netns.ip("-4 route")?, guest.sh("ip -4 route")?);
        ensure!(plain_routes(&want) == plain_routes(&have), "CNI made\n{want}\nthe guest has\n{have}");
        reached?;
        guest.remove()
    });
}

#[test]
fn bandwidth_plugin_limits_both_directions() {
    on_node(async |_| {
        // 1 Mbit/s each way after a burst of 8 KB: 250 KB take two seconds, on hardware as under emulation.
        let (rate, burst) = (1_000_000, 64_000);
        let bridge =
            json!({ "type": "bridge", "bridge": "cni1", "isGateway": true, "ipam": host_local(&["10.55.0.0/24"]) });
        let bandwidth = json!({
            "type": "bandwidth",
            "ingressRate": rate, "ingressBurst": burst, "egressRate": rate, "egressBurst": burst,
        });
        let mut netns = Netns::new("shaped")?;
        let result = netns.add("eth0", "shaped", vec![bridge, bandwidth])?;
        let guest = Guest::start("shaped", &netns)?;
        let own = addresses(&result)?.remove(0);
        guest.sh("mkdir /www; head -c 250000 /dev/zero > /www/data; busybox httpd -p 80 -h /www")?;
        let begin = Instant::now();
        let mut stream = TcpStream::connect((own.as_str(), 80))?;
        let out = exchange(&mut stream, b"GET /data HTTP/1.0\r\n\r\n")?;
        let egress = begin.elapsed();
        let page = [b"HTTP/1.0 200 OK\r\n\r\n".as_slice(), &[0; 250_000]].concat();
        let listener = TcpListener::bind("10.55.0.1:5001")?;
        let server = std::thread::spawn(move || exchange(&mut listener.accept()?.0, &page));
        let begin = Instant::now();
        let count = guest.sh("wget -qO- http://10.55.0.1:5001/ | wc -c")?;
        let ingress = begin.elapsed();
        ensure!(server.join().is_ok_and(|served| served.is_ok()), "the server on the node failed");
        guest.remove()?;
        netns.delete()?;
        drop(netns);
        ip("link del cni1")?;
        ensure!(out > 250_000 && count == "250000", "{out} bytes out, {count} in");
        let least = Duration::from_millis(1700);
        ensure!(egress > least && ingress > least, "out in {egress:?}, in in {ingress:?}");
        Ok(())
    });
}

/// Sends bytes and half-closes; reads to the end and returns how many bytes that was.
fn exchange(stream: &mut TcpStream, bytes: &[u8]) -> Result<usize> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(bytes)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(stream.read_to_end(&mut Vec::new())?)
}
