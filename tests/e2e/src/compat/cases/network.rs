//! What containers see of the pod's network, and pods of each other.

use anyhow::Context;
use bulkhead_cli::cri::v1;

use crate::compat::Area::Network;
use crate::compat::{Act, Group, Probe, act, shell};

/// A pod that serves and connects.
pub fn group() -> Group {
    Group::new("network").probes([interfaces(), services()]).acts(acts())
}

fn interfaces() -> Probe {
    Probe::new("interfaces")
        .case(Network, "interfaces", "ip -o link | sed -E 's/link\\/ether [0-9a-f:]+/ether/; s/@if[0-9]+//; s/link-netnsid [0-9]+//; s/^[0-9]+: //; s/qdisc [a-z_]+//; s/qlen [0-9]+//' | sed 's/,M-DOWN//' | awk '{ print $1, $2, $4, $5 }'")
        .case(Network, "names of the interfaces", "ls /sys/class/net; cat /sys/class/net/eth0/mtu /sys/class/net/lo/mtu; cat /sys/class/net/eth0/operstate /sys/class/net/eth0/carrier")
        .case(Network, "hardware address", "cat /sys/class/net/eth0/address | wc -c; ip -o link show eth0 | grep -c 'link/ether'; ip -o link show eth0 | grep -o 'brd [f:]*'")
        .case(Network, "addresses", "ip -o addr | awk '{ print $2, $3, $4 }' | grep -v ' fe80'; ip -o addr show scope link | awk '{ print $2, $3 }'")
        .case(Network, "routes", "ip route; ip -6 route | grep -vE 'fe80|ff00|anycast|multicast' | sed -E 's/ (metric|pref|expires) .*//; s/ proto [a-z]+//'")
        .case(Network, "rules", "ip rule; ip -6 rule")
        .case(Network, "names of loopback", "cat /etc/hosts | head -20; ping -c 1 -W 5 localhost | tail -2 | head -1")
        .case(Network, "gateway answers", "ping -c 1 -W 20 10.88.0.1 | tail -2 | head -1; ping -c 1 -W 20 fd00:88::1 | tail -2 | head -1")
        .case(Network, "node's services", "nc -w 20 10.88.0.1 9 </dev/null; echo $?")
        .case(Network, "changes by the container are refused", "ip link set eth0 down; ip addr add 10.1.1.1/24 dev eth0; ip route del default; echo 1 > /proc/sys/net/ipv4/ip_forward")
        .case(Network, "netstat and sockets", "nc -l -p 7001 & sleep 1; netstat -ltn | awk '{ print $1, $4, $6 }'; cat /proc/net/tcp | wc -l; kill %1")
        .case(Network, "files below /proc/net", "cd /proc/net; for f in dev tcp tcp6 udp udp6 unix route if_inet6 snmp netstat sockstat arp raw packet; do [ -r $f ] && echo $f; done")
}

fn services() -> Probe {
    Probe::new("services")
        .case(Network, "TCP on loopback", "echo hello > /tmp/index.html; httpd -p 127.0.0.1:7002 -h /tmp; wget -qO- http://127.0.0.1:7002/; wget -qO- http://localhost:7002/")
        .case(Network, "TCP over IPv6", "httpd -p [::1]:7003 -h /tmp; wget -qO- http://[::1]:7003/")
        .case(Network, "UDP", "nc -u -l -p 7004 -e cat & sleep 1; echo there | nc -u -w 2 127.0.0.1 7004; kill %1")
        .case(Network, "refused connection", "nc -w 5 127.0.0.1 7999 </dev/null; echo $?; wget -qO- http://127.0.0.1:7999/; nc -w 5 10.88.0.1 7999 </dev/null; echo $?")
        .case(Network, "own address", "a=$(ip -o -4 addr show eth0 | awk '{ print $4 }' | cut -d/ -f1); httpd -p $a:7005 -h /tmp; wget -qO- http://$a:7005/; wget -qO- http://127.0.0.1:7005/")
        .case(Network, "large transfer over loopback", "head -c 3000000 /dev/zero > /tmp/large; wget -qO- http://127.0.0.1:7002/large | wc -c")
        .case(Network, "abstract sockets are the pod's", "cat /proc/net/unix | grep -c bulkhead; ls /run")
}

fn acts() -> Vec<Act> {
    vec![
        act!(Network, "node reaches a service of the pod", |stage| {
            let id = stage
                .run(shell(
                    "server",
                    "mkdir /www; head -c 1000000 /dev/zero > /www/f; echo ready; exec httpd -f -p 7010 -h /www",
                ))
                .await?;
            stage.shell(&id, "until wget -qO /dev/null http://127.0.0.1:7010/f; do sleep 0.1; done").await?;
            let mut said = String::new();
            for address in stage.addresses().await? {
                let host = if address.contains(':') { format!("[{address}]") } else { address };
                said += &stage.on_node(format!("busybox wget -qO- http://{host}:7010/f | wc -c")).await?;
            }
            Ok(said)
        }),
        act!(Network, "status of the pod", |stage| {
            let status = stage.status().await?;
            let network = status.network.clone().context("no network")?;
            let options = status.linux.and_then(|linux| linux.namespaces).and_then(|namespaces| namespaces.options);
            Ok(format!("{:?} {} {}\n{options:?}", status.state, network.ip, network.additional_ips.len()))
        }),
        act!(Network, "container's view after a second container has come", |stage| {
            let id = stage.sleeper().await?;
            Ok(format!(
                "{:?}",
                stage.shell(&id, "hostname; ls /sys/class/net; ip -o -4 addr show eth0 | awk '{ print $4 }'").await?
            ))
        }),
        act!(Network, "stats of the pod", |stage| {
            let request = v1::PodSandboxStatsRequest { pod_sandbox_id: stage.id.clone() };
            let answer = stage.cri().runtime().pod_sandbox_stats(request).await;
            let linux = match answer {
                Ok(answer) => answer.into_inner().stats.and_then(|stats| stats.linux).unwrap_or_default(),
                Err(error) => return Ok(error.to_string()),
            };
            let network = linux.network.unwrap_or_default().default_interface.unwrap_or_default();
            let counted = |value: Option<v1::UInt64Value>| value.is_some_and(|value| value.value > 0);
            Ok(format!(
                "{} rx {} tx {}\ncpu {} memory {}\ncontainers {}",
                network.name,
                counted(network.rx_bytes),
                counted(network.tx_bytes),
                linux.cpu.is_some(),
                linux.memory.is_some(),
                linux.containers.iter().all(|container| container.cpu.is_some()),
            ))
        }),
    ]
}
