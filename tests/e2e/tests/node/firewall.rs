//! Rules of the packet filter that CNI plugins put into a pod's namespace (istio-cni, linkerd-cni, firewalls) hold in the
//! guest; a pod whose rules the guest cannot have is refused, or warned of if the operator wants that.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::cni::{Guest, Netns, ip};
use bulkhead_e2e::{node_command, on_node};

/// The operator's configuration in the node.
const CONFIG: &str = "/etc/bulkhead/config.toml";

/// The host's end of the pair, from the namespace's view the rest of the world.
const OUTSIDE: &str = "10.67.0.1";

/// A namespace with eth0 in it, as a CNI makes it.
fn namespace(name: &str) -> Result<Netns> {
    let netns = Netns::new(name)?;
    ip(&format!("link add fw0 type veth peer name eth0 netns {name}"))?;
    ip(&format!("addr add {OUTSIDE}/24 dev fw0"))?;
    ip("link set fw0 up")?;
    for line in ["link set eth0 up", "addr add 10.67.0.5/24 dev eth0", &format!("route add default via {OUTSIDE}")] {
        netns.ip(line)?;
    }
    Ok(netns)
}

/// Runs a program in a namespace.
fn inside(name: &str, command: &str) -> Result<String> {
    let words: Vec<&str> = command.split(' ').collect();
    node_command("ip", &[["netns", "exec", name].as_slice(), &words].concat())
}

/// nft(8) in a namespace.
fn nft(name: &str, rules: &str) -> Result<String> {
    node_command("ip", &["netns", "exec", name, "nft", rules])
}

/// Answers every connection to a port with a page, until the node ends.
fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((OUTSIDE, port)).with_context(|| format!("cannot listen on port {port}"))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let (mut stream, mut request) = (stream, [0; 512]);
            let _ = stream.read(&mut request);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\noutside\n");
        }
    });
    Ok(())
}

#[test]
fn rules_of_a_mesh_and_a_firewall_in_the_namespace_redirect_and_drop_in_the_pod_also_those_that_come_later() {
    on_node(async |_| {
        let netns = namespace("mesh")?;
        // For each tool: a port that is redirected to a proxy in the pod unless the proxy asks, and one that nobody reaches.
        nft(
            "mesh",
            "table inet mesh {
                set blocked { type inet_service; flags interval; elements = { 9100-9105 } }
                chain to_proxy {
                    type nat hook output priority -100;
                    meta skuid 1000 return
                    oif eth0 tcp dport { 8100, 8101 } redirect to :15100
                }
                chain closed { type filter hook output priority 0; tcp dport @blocked counter drop; }
            }",
        )?;
        inside("mesh", "ipset create closed bitmap:port range 9000-9999")?;
        inside("mesh", "ipset add closed 9500")?;
        for (tool, redirected, proxy, dropped) in [("nft", 8200, 15200, 9200), ("legacy", 8300, 15300, 9300)] {
            for rule in [
                "-t nat -N MESH".to_owned(),
                "-t nat -A OUTPUT -p tcp -j MESH".to_owned(),
                "-t nat -A MESH -m owner --uid-owner 1000 -j RETURN".to_owned(),
                format!("-t nat -A MESH -p tcp -m tcp --dport {redirected} -j REDIRECT --to-ports {proxy}"),
                format!("-A OUTPUT -p tcp -m multiport --dports {dropped},{} -j DROP", dropped + 1),
                "-A OUTPUT -p tcp -m set --match-set closed dst -j DROP".to_owned(),
            ] {
                inside("mesh", &format!("iptables-{tool} -w {rule}"))?;
            }
        }
        for port in [8100, 8200, 8300, 9100, 9200, 9300, 9500] {
            serve(port)?;
        }
        let guest = Guest::start("mesh", &netns)?;
        guest.sh("for port in 15100 15200 15300; do
                 mkdir -p /www/$port; echo proxy $port > /www/$port/index.html; busybox httpd -p $port -h /www/$port
             done")?;
        let ask = format!("for port in 8100 8200 8300; do wget -qO- http://{OUTSIDE}:$port/; done");
        let everybody = guest.sh(&ask)?;
        ensure!(everybody.lines().eq(["proxy 15100", "proxy 15200", "proxy 15300"]), "{everybody}");
        let proxy = guest.sh_as("1000", &ask)?;
        ensure!(proxy.lines().eq(["outside"; 3]), "the proxy is led to itself: {proxy}");
        // What is dropped never answers; the time is many times what the above took.
        let dropped = format!("timeout 8 wget -qO- http://{OUTSIDE}:$port/ || echo dropped");
        let dropped = guest.sh(&format!("for port in 9100 9200 9300 9500; do ({dropped}) & done; wait"))?;
        ensure!(dropped.lines().eq(["dropped"; 4]), "{dropped}");
        // A rule that comes later. Nobody listens at the port; the bound is the test's patience, not what it takes.
        nft("mesh", "insert rule inet mesh to_proxy tcp dport 8400 redirect to :15100")?;
        let follow = format!("until wget -qO- http://{OUTSIDE}:8400/ 2>/dev/null; do :; done");
        let followed = guest.sh(&format!("timeout 60 sh -c '{follow}'"))?;
        ensure!(followed == "proxy 15100", "a rule that came later: {followed}");
        guest.remove()
    });
}

/// What starting a guest was refused with.
fn refused(name: &str, netns: &Netns) -> Result<String> {
    let started = Guest::start(name, netns);
    // containerd keeps the container whose task could not be created.
    let _ = node_command("ctr", &["-n", "k8s.io", "container", "rm", name]);
    match started {
        Ok(guest) => {
            guest.remove()?;
            anyhow::bail!("the pod was started")
        }
        Err(error) => Ok(format!("{error:#}")),
    }
}

#[test]
fn pod_with_rules_that_a_guest_cannot_have_is_refused_and_runs_if_the_operator_wants_warnings() {
    on_node(async |_| {
        let netns = namespace("odd")?;
        serve(9400)?;
        // What nobody can carry is refused before the guest is booted, what the guest's kernel lacks after that.
        nft(
            "odd",
            "table inet odd { chain c { type filter hook input priority 0; iif { eth0, lo } tcp dport 5 drop; }; }",
        )?;
        let message = refused("odd-1", &netns)?;
        for word in ["chain c of table inet odd", "interface by its number", "unsupported_network", "runc"] {
            ensure!(message.contains(word), "{message:?} does not name {word:?}");
        }
        nft("odd", "delete table inet odd")?;
        inside("odd", "tc qdisc add dev eth0 clsact")?;
        inside("odd", "tc filter add dev eth0 ingress protocol ip u32 match ip dport 7 0xffff action drop")?;
        let message = refused("odd-1", &netns)?;
        ensure!(message.contains("a filter of traffic control (u32) at the ingress of eth0"), "{message}");
        inside("odd", "tc qdisc del dev eth0 clsact")?;
        // The guest's kernel has no auditing, and the table drops.
        for tool in ["nft", "legacy"] {
            for target in ["AUDIT --type drop", "DROP"] {
                inside("odd", &format!("iptables-{tool} -w -A INPUT -p tcp --dport 7 -j {target}"))?;
            }
        }
        nft("odd", "table inet kept { chain c { type filter hook output priority 0; tcp dport 9400 drop; }; }")?;
        let message = refused("odd-2", &netns)?;
        for word in [
            "table ip filter",
            "\"target AUDIT\"",
            "table filter of iptables",
            "target \"AUDIT\"",
            "unsupported_network",
        ] {
            ensure!(message.contains(word), "{message:?} does not name {word:?}");
        }
        let good = fs::read_to_string(CONFIG).with_context(|| format!("cannot read {CONFIG}"))?;
        fs::write(CONFIG, format!("unsupported_network = \"warn\"\n{good}"))?;
        let started = Guest::start("odd-3", &netns);
        fs::write(CONFIG, good)?;
        let guest = started?;
        let kept = guest.sh(&format!("timeout 5 wget -qO- http://{OUTSIDE}:9400/ || echo dropped"))?;
        ensure!(kept == "dropped", "the rest of the rules is not in the guest: {kept}");
        guest.remove()
    });
}
