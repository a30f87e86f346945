//! The pod's network: CNI's addresses in the guest, and traffic in both directions.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_cli::{cri, net};
use bulkhead_e2e::{NGINX, PATIENCE, TestPod, node_command, on_node};

async fn ipv4(pod: &TestPod) -> Result<Ipv4Addr> {
    let addresses = pod.addresses().await?;
    addresses.iter().find_map(|ip| ip.parse().ok()).with_context(|| format!("no IPv4 address in {addresses:?}"))
}

/// Starts busybox's web server with a page; it serves when this returns.
async fn serve(pod: &TestPod, page: &str) -> Result<String> {
    let container = pod.sleeper("server").await?;
    pod.sh(&container, &format!("mkdir /www; echo {page} > /www/index.html; busybox httpd -p 80 -h /www")).await?;
    Ok(container)
}

#[test]
fn guest_has_the_cni_addresses_mtu_and_default_route() {
    on_node(async |node| {
        let pod = node.pod("addresses").await?;
        let container = pod.sleeper("main").await?;
        let shown = pod.sh(&container, "ip addr show eth0; ip route; ip -6 route").await?;
        let addresses = pod.addresses().await?;
        ensure!(!addresses.is_empty(), "the pod has no address");
        for address in &addresses {
            ensure!(shown.contains(&format!("{address}/")), "{address} is not on the guest's eth0: {shown}");
        }
        ensure!(shown.contains("default via") && shown.contains("mtu 1500"), "{shown}");
        Ok(())
    });
}

#[test]
fn pod_answers_ping_and_http_from_the_node_over_every_address() {
    on_node(async |node| {
        let pod = node.pod("served").await?;
        serve(&pod, "hello").await?;
        for address in pod.addresses().await? {
            let address: IpAddr = address.parse()?;
            net::ping(address).await?;
            ensure!(net::http_get(address, 80, "/", PATIENCE).await?.trim() == "hello", "wrong page from {address}");
        }
        Ok(())
    });
}

#[test]
fn nginx_from_its_image_serves() {
    on_node(async |node| {
        node.cri.pull(NGINX).await?;
        let pod = node.pod("nginx").await?;
        pod.run(cri::container_config("nginx", NGINX, &[])).await?;
        let page = net::http_get(ipv4(&pod).await?.into(), 80, "/", PATIENCE).await?;
        ensure!(page.contains("bulkhead test page"), "{page}");
        Ok(())
    });
}

#[test]
fn two_pods_reach_each_other_over_the_bridge() {
    on_node(async |node| {
        let (first, second) = (node.pod("left").await?, node.pod("right").await?);
        let (one, two) = (serve(&first, "left-page").await?, serve(&second, "right-page").await?);
        let (left, right) = (ipv4(&first).await?, ipv4(&second).await?);
        ensure!(
            first.sh(&one, &format!("wget -qO- http://{right}/")).await? == "right-page",
            "left does not reach right"
        );
        ensure!(
            second.sh(&two, &format!("wget -qO- http://{left}/")).await? == "left-page",
            "right does not reach left"
        );
        first.sh(&one, &format!("ping -c 1 -W 10 {right}")).await?;
        Ok(())
    });
}

#[test]
fn service_address_reaches_a_pod_from_pods_and_node() {
    on_node(async |node| {
        let (client, server) = (node.pod("client").await?, node.pod("server").await?);
        serve(&server, "service-page").await?;
        let shell = client.sleeper("main").await?;
        // What kube-proxy does for a ClusterIP.
        let target = format!("{}:80", ipv4(&server).await?);
        let rule = ["-d", "10.96.0.80", "-p", "tcp", "--dport", "8080", "-j", "DNAT", "--to-destination", &target];
        let change = |verb: &'static str| -> Result<()> {
            for chain in ["PREROUTING", "OUTPUT"] {
                node_command("iptables", &[["-w", "-t", "nat", verb, chain].as_slice(), &rule].concat())?;
            }
            Ok(())
        };
        // A node has a default route; this one, which sees no other network, gets one for the address.
        node_command("ip", &["route", "add", "10.96.0.80", "dev", "cni0"])?;
        change("-A")?;
        let from_pod = client.sh(&shell, "wget -qO- http://10.96.0.80:8080/").await;
        let from_node = net::http_get(IpAddr::V4(Ipv4Addr::new(10, 96, 0, 80)), 8080, "/", PATIENCE).await;
        change("-D")?;
        node_command("ip", &["route", "del", "10.96.0.80"])?;
        ensure!(from_pod? == "service-page", "the pod does not reach the service");
        ensure!(from_node?.trim() == "service-page", "the node does not reach the service");
        Ok(())
    });
}

#[test]
fn host_port_reaches_the_pod_from_the_node_and_from_pods() {
    on_node(async |node| {
        let mapping = |pod: &mut v1::PodSandboxConfig| {
            pod.port_mappings = vec![v1::PortMapping { container_port: 80, host_port: 8088, ..Default::default() }];
        };
        let server = node.pod_with("mapped", "bulkhead", mapping).await?;
        serve(&server, "mapped-page").await?;
        for address in ["127.0.0.1", "10.88.0.1"] {
            ensure!(net::http_get(address.parse()?, 8088, "/", PATIENCE).await?.trim() == "mapped-page", "{address}");
        }
        let client = node.pod("client").await?;
        let shell = client.sleeper("main").await?;
        ensure!(client.sh(&shell, "wget -qO- http://10.88.0.1:8088/").await? == "mapped-page", "from a pod");
        Ok(())
    });
}

#[test]
fn cni_interface_counts_what_the_pod_sends_and_receives() {
    on_node(async |node| {
        let pod = node.pod("counted").await?;
        let container = serve(&pod, "page").await?;
        pod.sh(&container, "head -c 4000000 /dev/zero > /www/data").await?;
        let netns = pod.netns().await?;
        let counters = || -> Result<Vec<u64>> {
            let shown = node_command("nsenter", &[&format!("--net={netns}"), "cat", "/proc/net/dev"])?;
            let line = shown.lines().find_map(|line| line.trim().strip_prefix("eth0:")).context("no eth0")?;
            Ok(line.split_whitespace().map_while(|word| word.parse().ok()).collect())
        };
        let before = counters()?;
        let target = std::net::SocketAddr::new(ipv4(&pod).await?.into(), 80);
        let mut stream = std::net::TcpStream::connect(target)?;
        stream.write_all(b"GET /data HTTP/1.0\r\n\r\n")?;
        let got = stream.read_to_end(&mut Vec::new())?;
        let after = counters()?;
        let [rx_bytes, tx_bytes, tx_packets] = [0, 8, 9].map(|column| after[column] - before[column]);
        ensure!(got > 4_000_000 && tx_bytes > 4_000_000 && rx_bytes > 1000, "{got} bytes read: {before:?} {after:?}");
        // The host segments for the guest: far fewer frames than an MTU's worth each.
        ensure!(tx_packets < 4_000_000 / 1500 / 2, "{tx_packets} frames for 4 MB");
        Ok(())
    });
}

#[test]
fn pod_has_hosts_and_resolver_files() {
    on_node(async |node| {
        let pod = node.pod("files").await?;
        let container = pod.sleeper("main").await?;
        let resolver = pod.sh(&container, "cat /etc/resolv.conf").await?;
        ensure!(resolver.contains("nameserver 10.96.0.10") && resolver.contains("ndots:5"), "{resolver}");
        ensure!(pod.sh(&container, "cat /etc/hostname").await? == "files", "hostname file");
        Ok(())
    });
}

#[test]
fn bulk_transfer_in_both_directions_keeps_every_byte() {
    on_node(async |node| {
        let (first, second) = (node.pod("source").await?, node.pod("sink").await?);
        let one = first.sleeper("main").await?;
        let two = second.sleeper("main").await?;
        first.sh(&one, "mkdir /www; head -c 8000000 /dev/urandom > /www/data; busybox httpd -p 80 -h /www").await?;
        let address = ipv4(&first).await?;
        let sum = first.sh(&one, "md5sum < /www/data").await?;
        ensure!(second.sh(&two, &format!("wget -qO- http://{address}/data | md5sum")).await? == sum, "bytes were lost");
        Ok(())
    });
}
