//! The real Docker: `docker run --runtime io.containerd.bulkhead.v2`. tests/node/suites-docker starts it and runs these; it is
//! not in every node.
//!
//! What Docker does to a network namespace it does by the pid that the shim reports, so each test looks at the node as well.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::net;
use bulkhead_e2e::{BUSYBOX, PATIENCE, node_command, on_node};

use crate::namespaces::node_network;
use crate::{BOOT_ID, node_boot_id};

fn docker(line: &str) -> Result<String> {
    node_command("docker", &line.split(' ').collect::<Vec<_>>())
}

/// Runs a container in the background, which executes a shell script.
fn run(name: &str, options: &str, script: &str) -> Result<String> {
    let options = format!("run -d --runtime io.containerd.bulkhead.v2 --name {name} {options} {BUSYBOX}");
    let words: Vec<_> = options.split_whitespace().chain(["sh", "-c", script]).collect();
    node_command("docker", &words)
}

/// What a shell in a container prints.
fn sh(name: &str, script: &str) -> Result<String> {
    node_command("docker", &["exec", name, "sh", "-c", script])
}

/// A test's containers and networks, gone with it; the node's network is as before then.
struct Things {
    containers: &'static [&'static str],
    networks: &'static [&'static str],
}

impl Drop for Things {
    fn drop(&mut self) {
        for name in self.containers {
            let _ = docker(&format!("rm -f -v {name}"));
        }
        for name in self.networks {
            let _ = docker(&format!("network rm {name}"));
        }
    }
}

/// Runs a test, and compares the node's network before and after.
fn with_docker(things: Things, test: impl AsyncFnOnce() -> Result<()>) {
    on_node(async |_| {
        docker(&format!("pull -q {BUSYBOX}"))?;
        let before = node_network()?;
        let outcome = test().await;
        drop(things);
        outcome?;
        let after = node_network()?;
        ensure!(before == after, "the node's network was\n{before}\nand is\n{after}");
        Ok(())
    });
}

const SERVE: &str = "mkdir /www; hostname > /www/index.html; exec busybox httpd -f -p 80 -h /www";

#[test]
#[ignore = "it takes Docker, see tests/node/suites-docker"]
fn bridge_published_port_processes_and_a_network_that_is_connected_later() {
    with_docker(Things { containers: &["bridged"], networks: &["later"] }, async || {
        run("bridged", "-h bridged -p 8089:80", SERVE)?;
        let address = docker("inspect -f {{.NetworkSettings.IPAddress}} bridged")?;
        let address: IpAddr =
            address.trim().parse().with_context(|| format!("the container has no address: {address}"))?;
        let shown = sh("bridged", &format!("ip addr show eth0; ip route; {BOOT_ID}"))?;
        ensure!(shown.contains(&format!("{address}/16")) && shown.contains("default via"), "{shown}");
        ensure!(!shown.contains(&node_boot_id()?), "not in a guest");
        for (at, port) in [(address, 80), ("127.0.0.1".parse()?, 8089)] {
            ensure!(net::http_get(at, port, "/", PATIENCE).await?.trim() == "bridged", "{at}");
        }
        let top = docker("top bridged")?;
        ensure!(top.contains("httpd -f -p 80"), "docker top shows {top}");
        docker("network create --subnet 10.94.0.0/24 later")?;
        docker("network connect --ip 10.94.0.7 later bridged")?;
        sh("bridged", "until ip addr show eth1 | grep -q 10.94.0.7/24; do sleep 0.1; done")?;
        ensure!(
            net::http_get("10.94.0.7".parse()?, 80, "/", PATIENCE).await?.trim() == "bridged",
            "by the later network"
        );
        docker("network disconnect later bridged")?;
        sh("bridged", "while ip link show eth1 >/dev/null 2>&1; do sleep 0.1; done")?;
        ensure!(net::http_get(address, 80, "/", PATIENCE).await?.trim() == "bridged", "{address} after that");
        Ok(())
    });
}

#[test]
#[ignore = "it takes Docker, see tests/node/suites-docker"]
fn containers_of_a_network_find_each_other_by_name() {
    with_docker(Things { containers: &["served", "client"], networks: &["named"] }, async || {
        docker("network create named")?;
        run("served", "-h served --network named", SERVE)?;
        run("client", "--network named", "exec sleep 3600")?;
        let got = sh("client", "cat /etc/resolv.conf; wget -qO- http://served/")?;
        ensure!(got.contains("127.0.0.11") && got.trim().ends_with("served"), "{got}");
        // TCP as well, which resolvers use for long answers; and nothing that nobody listens on.
        sh("client", "nc -w 20 127.0.0.11 53 </dev/null && ! nc -w 20 127.0.0.11 54 </dev/null")?;
        Ok(())
    });
}

#[test]
#[ignore = "it takes Docker, see tests/node/suites-docker"]
fn ipvlan_is_the_containers_and_not_the_nodes() {
    with_docker(Things { containers: &["ipvlan-a"], networks: &["ipvlan"] }, async || {
        docker("network create -d ipvlan --subnet 10.93.0.0/24 --gateway 10.93.0.1 ipvlan")?;
        run("ipvlan-a", "--network ipvlan --ip 10.93.0.2", "exec sleep 3600")?;
        let shown = sh("ipvlan-a", "ip addr show eth0; ip route")?;
        ensure!(shown.contains("10.93.0.2/24") && shown.contains("10.93.0.0/24 dev eth0"), "{shown}");
        let node = node_network()?;
        ensure!(!node.contains("10.93.0."), "the node has the container's network: {node}");
        Ok(())
    });
}

#[test]
#[ignore = "it takes Docker, see tests/node/suites-docker"]
fn container_without_a_network_has_loopback_alone_and_a_privileged_one_its_guests_devices() {
    with_docker(Things { containers: &["lonely"], networks: &[] }, async || {
        run("lonely", "--network none --privileged", "exec sleep 3600")?;
        let links = sh("lonely", "ip -o link | wc -l; ip -o addr show lo")?;
        ensure!(links.starts_with("1\n") && links.contains("127.0.0.1/8"), "{links}");
        // Its devices are its guest's: the node has /dev/kvm.
        sh("lonely", "test -c /dev/kmsg && test -c /dev/fuse && test ! -e /dev/kvm")?;
        // Another one cannot have the same namespace, which is in a VM.
        for (option, word) in [
            ("--network host", "hostNetwork"),
            ("--ipc host", "hostIPC"),
            ("--pid host", "hostPID"),
            ("--uts host", "UTS"),
            ("--pid container:lonely", "share"),
        ] {
            let refused = run("refused", option, "exec sleep 3600");
            docker("rm -f refused")?;
            let said = format!("{:#}", refused.err().with_context(|| format!("{option} was accepted"))?);
            ensure!(said.contains(word), "{option}: {said}");
        }
        Ok(())
    });
}
