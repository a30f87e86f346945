//! What somebody has set up in a pod's network namespace, by a plugin of CNI or by hand, is in the guest: when it starts, and
//! when it changes while the guest runs.

use anyhow::{Result, ensure};
use bulkhead_cli::net;
use bulkhead_e2e::cni::{Guest, Netns, host_local, ip};
use bulkhead_e2e::{node_command, on_node};
use serde_json::{Value, json};

/// What is shown of a namespace and of its guest, and has to be the same.
const SHOWN: [&str; 10] = [
    "-o link",
    "-o -d link show type vlan",
    "-o -d link show type macvlan",
    "-o addr",
    "-4 route show table all",
    "-6 route show table all",
    "-4 rule",
    "-6 rule",
    "neigh show nud permanent",
    "neigh show proxy",
];

/// Beside what the plugins make. `eth0` is one of theirs.
const SETUP: [&str; 38] = [
    "link set eth0 alias cni txqueuelen 77",
    // Links that stand on others, and some that stand on none.
    "link add link eth0 name eth0.7 type vlan id 7",
    "addr add 10.47.0.5/24 dev eth0.7",
    "link set eth0.7 up",
    "link add low link eth0 type macvlan mode bridge",
    "link add dummy0 type dummy",
    "addr add 169.254.20.10/32 dev dummy0",
    "link set dummy0 up",
    "link add br0 type bridge forward_delay 200",
    "link add left type veth peer name right",
    "link set left master br0 up",
    "link set right up",
    "link set br0 up",
    // Addresses.
    "addr add 10.22.0.200/24 dev eth0 label eth0:1",
    "addr add 10.88.1.1 peer 10.88.1.2/32 dev eth0",
    "addr add 10.99.0.5/24 dev eth0 noprefixroute",
    "addr add 10.77.0.1/32 dev lo",
    "addr add 10.23.0.5/24 dev br0 valid_lft 10000 preferred_lft 5000",
    "-6 addr add fd22::9/64 dev eth0 nodad preferred_lft 0",
    "-6 addr add fe80::abcd/64 dev eth0 nodad",
    // Routes.
    "route replace default nexthop via 10.22.0.1 weight 1 nexthop via 10.22.0.3 weight 2",
    "route add 10.66.0.0/16 via 10.22.0.1 advmss 1200 initcwnd 20 rto_min 10ms quickack 1",
    "route add blackhole 10.67.0.0/16",
    "route add unreachable 10.68.0.0/16",
    "route add prohibit 10.69.0.0/16",
    "route add 10.71.0.0/16 via 10.22.0.1 tos 0x10",
    "route append 10.71.0.0/16 via 10.22.0.3 tos 0x10",
    "route add local 10.72.0.0/16 dev lo table 100",
    "route add default via 10.22.0.3 dev eth0 table 100 onlink",
    "-6 route add fd66::/64 nexthop via fd22::3 nexthop via fd22::4",
    "-6 route add prohibit fd67::/64",
    // Rules and neighbours.
    "rule add from 10.22.0.200 table 100 pref 50",
    "rule add not fwmark 7/15 ipproto tcp dport 80-90 oif eth0 lookup 7 suppress_prefixlength 0 pref 60",
    "rule del pref 32767",
    "-6 rule add to fd99::/64 prohibit pref 70",
    "neigh add 10.22.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
    "neigh add proxy 10.22.0.78 dev eth0",
    "neigh add 10.47.0.9 lladdr 02:00:00:00:00:79 dev eth0.7 extern_learn",
];

/// What changes while the guest runs.
const CHANGES: [&str; 11] = [
    "addr add 10.22.0.201/24 dev eth0",
    "addr del 10.22.0.200/24 dev eth0",
    "route replace default via 10.22.0.3",
    "route add prohibit 10.90.0.0/16",
    "route del blackhole 10.67.0.0/16",
    "rule add from 10.22.0.201 table 100 pref 51",
    "rule del pref 50",
    "link set eth0.7 mtu 1400",
    "link del low",
    "link set dummy0 down",
    "neigh del 10.22.0.77 dev eth0",
];

/// Links of every kind that the guest makes again, each with something to it. The modules of the last ones make devices of their
/// own on the node, unless they are told not to or are unloaded.
const KINDS: [&str; 25] = [
    "link add bond7 type bond mode active-backup miimon 100",
    "link add slave7 type dummy",
    "link set slave7 master bond7",
    "link set bond7 up",
    "link add br7 type bridge vlan_filtering 1",
    "link add vrf7 type vrf table 70",
    "link set vrf7 up",
    "link add vx7 type vxlan id 42 remote 10.22.0.9 dstport 4789 dev eth0 ttl inherit",
    "link add gnv7 type geneve id 43 remote 10.22.0.9",
    "link add link eth0 name q7 type vlan protocol 802.1ad id 9",
    "link add low7 type dummy",
    "link add link low7 name ipv7 type ipvlan mode l3",
    "link add link eth0 name mv7 type macvlan mode private",
    "link add link eth0 name mvt7 type macvtap mode bridge",
    "link add ifb7 type ifb",
    "link add ipip7 type ipip remote 10.22.0.9 local 10.22.0.200 ttl 9",
    "link add gre7 type gre remote 10.22.0.9 key 5",
    "link add gretap7 type gretap remote 10.22.0.9 dev eth0",
    "link add sit7 type sit remote 10.22.0.9",
    "link add tnl7 type ip6tnl remote fd22::9 mode ip6ip6",
    "link add gre67 type ip6gre remote fd22::9",
    "link add grt67 type ip6gretap remote fd22::9",
    "link add vti7 type vti remote 10.22.0.9 local 10.22.0.200 key 7",
    "link add vti67 type vti6 remote fd22::9 key 8",
    "link add xfrm7 type xfrm dev eth0 if_id 7",
];

/// The modules whose devices would stay on the node, by who needs whom.
const MODULES: [&str; 11] = [
    "bonding max_bonds=0",
    "ifb numifbs=0",
    "ip_gre",
    "ipip",
    "sit",
    "ip6_gre",
    "ip6_vti",
    "ip_vti",
    "ip6_tunnel",
    "xfrm_interface",
    "macvtap",
];

/// Lines of ip(8) without what is another machine's own: numbers, states, times, a driver's limits.
fn plain(text: &str) -> Vec<String> {
    const SKIPPED: &[&str] = &[
        "valid_lft",
        "preferred_lft",
        "state",
        "qdisc",
        "link-netnsid",
        "link-netns",
        "gc_timer",
        "hello_timer",
        "expires",
        "numtxqueues",
        "numrxqueues",
        "designated_bridge",
        "designated_root",
        "bridge_id",
        "root_id",
        "minmtu",
        "maxmtu",
        "tso_max_size",
        "tso_max_segs",
        "parentbus",
        "parentdev",
        "promiscuity",
        "permaddr",
        // In its kernel's ticks.
        "mcast_startup_query_interval",
    ];
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let words = line.split_whitespace().skip(usize::from(line.split(':').next().is_some_and(is_number)));
        let mut shown = Vec::new();
        // A line of several is joined by backslashes, and a name is followed by its peer's, or by a colon.
        let mut words = words.map(|word| word.split('@').next().unwrap_or_default().trim_end_matches(['\\', ':']));
        while let Some(word) = words.next() {
            match word {
                _ if SKIPPED.contains(&word) => drop(words.next()),
                "" | "linkdown" | "nodad" | "tentative" | "dynamic" | "veth" => {}
                // The name is in a file that images need not have.
                "ipproto-6" => shown.push("tcp"),
                _ => shown.push(word),
            }
        }
        lines.push(shown.join(" "));
    }
    // What the host has for itself: taps, and what the tunnels' modules put into every namespace.
    let own = ["tap-", "gre0", "gretap0", "erspan0", "tunl0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0"];
    lines.retain(|line| {
        !line.is_empty() && !own.iter().any(|name| line.starts_with(name) || line.contains(&format!("dev {name}")))
    });
    lines.sort();
    lines
}

fn is_number(text: &str) -> bool {
    text.parse::<u32>().is_ok()
}

fn ensure_same(netns: &Netns, guest: &Guest, shown: &[&str]) -> Result<()> {
    let want = shown.iter().map(|line| netns.ip(line)).collect::<Result<Vec<_>>>()?.join("\n");
    let (want, have) = (plain(&want), plain(&guest.ip(shown)?));
    let only = |of: &[String], other: &[String]| -> String {
        of.iter().filter(|line| !other.contains(line)).map(|line| format!("{line}\n")).collect()
    };
    let (missing, more) = (only(&want, &have), only(&have, &want));
    ensure!(missing.is_empty() && more.is_empty(), "the guest lacks\n{missing}and has\n{more}");
    Ok(())
}

fn chain() -> Vec<Value> {
    let subnets = host_local(&["10.22.0.0/24", "fd22::/64"]);
    let bridge = json!({ "type": "bridge", "bridge": "cni2", "isGateway": true, "ipam": subnets });
    let sysctl = json!({
        "net.core.somaxconn": "777",
        "net.ipv4.conf.eth0.arp_filter": "1",
        "net.ipv4.conf.all.rp_filter": "2",
        "net.ipv4.tcp_keepalive_time": "99",
        "net.ipv4.ip_local_port_range": "20000\t30000",
        "net.ipv6.conf.eth0.hop_limit": "33",
    });
    vec![bridge, json!({ "type": "tuning", "allmulti": true, "sysctl": sysctl })]
}

#[test]
fn links_of_every_kind_are_made_again_in_the_guest() {
    on_node(async |_| {
        for module in MODULES {
            node_command("modprobe", &module.split(' ').collect::<Vec<_>>())?;
        }
        let netns = Netns::new("kinds")?;
        ip("link add kinds0 type veth peer name eth0 netns kinds")?;
        ip("link set kinds0 up")?;
        for line in ["link set eth0 up", "addr add 10.22.0.200/24 dev eth0"] {
            netns.ip(line)?;
        }
        for line in KINDS {
            netns.ip(line)?;
        }
        let guest = Guest::start_with_ip("kinds", &netns)?;
        ensure_same(&netns, &guest, &["-o -d link"])?;
        guest.remove()?;
        drop(netns);
        for module in MODULES {
            let name = module.split(' ').next().unwrap_or_default();
            node_command("modprobe", &["-r", name])?;
        }
        Ok(())
    });
}

#[test]
fn what_is_set_up_in_the_namespace_is_in_the_guest_and_follows_changes() {
    on_node(async |_| {
        // Its devices are in every namespace from now on.
        node_command("modprobe", &["ip_gre"])?;
        let mut netns = Netns::new("setup")?;
        netns.add("eth0", "setup", chain())?;
        for line in SETUP {
            netns.ip(line)?;
        }
        // Two interfaces with one MAC.
        ip("link add parent type dummy")?;
        ip("link set parent up")?;
        for number in ["1", "2"] {
            ip(&format!("link add link parent name net{number} netns setup type ipvlan mode l2"))?;
            netns.ip(&format!("addr add 10.4{number}.0.5/24 dev net{number}"))?;
            netns.ip(&format!("link set net{number} up"))?;
        }
        netns.ip("link set net2 name other")?;
        ip("link add away type veth peer name down0 netns setup")?;
        ip("link add link cni2 name cni2.7 type vlan id 7")?;
        ip("addr add 10.47.0.1/24 dev cni2.7")?;
        ip("link set cni2.7 up")?;
        let guest = Guest::start_with_ip("setup", &netns)?;
        ensure_same(&netns, &guest, &SHOWN)?;
        let values = "cd /proc/sys/net; cat core/somaxconn ipv4/conf/eth0/arp_filter ipv4/conf/all/rp_filter \
                      ipv4/tcp_keepalive_time ipv4/ip_local_port_range ipv6/conf/eth0/hop_limit ipv4/conf/eth0/rp_filter \
                      ipv4/ip_forward";
        let want = node_command("ip", &["netns", "exec", "setup", "sh", "-c", values])?;
        let have = guest.sh(values)?;
        ensure!(have.starts_with("777\n1\n2\n99\n") && have == want.trim(), "{have} instead of {want}");
        net::ping("10.47.0.5".parse()?).await?;
        netns.check()?;

        for line in CHANGES {
            netns.ip(line)?;
        }
        // One more network, and one less.
        ip("link add late type veth peer name net9 netns setup")?;
        ip("addr add 10.59.0.1/24 dev late")?;
        ip("link set late up")?;
        netns.ip("addr add 10.59.0.5/24 dev net9")?;
        netns.ip("link set net9 up")?;
        netns.ip("link del net1")?;
        // A second is what it may take, and an exec takes longer here.
        guest.sh("sleep 1")?;
        ensure_same(&netns, &guest, &SHOWN)?;
        net::ping("10.59.0.5".parse()?).await?;
        netns.check()?;
        guest.remove()?;
        netns.delete()?;
        drop(netns);
        for link in ["cni2.7", "cni2", "parent"] {
            ip(&format!("link del {link}"))?;
        }
        node_command("modprobe", &["-r", "ip_gre"]).map(drop)
    });
}
