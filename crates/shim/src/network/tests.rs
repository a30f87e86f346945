//! Reading and attaching in network namespaces of their own, which takes root and ip(8). The redirect
//! itself needs kernel modules that not every build machine has; the test node has them.

use std::collections::HashMap;
use std::process::Command;

use super::*;

/// A named namespace with a bridge as its Ethernet interface, made by ip(8).
struct Netns(String);

impl Netns {
    fn new(name: &str, commands: &[&str]) -> Self {
        assert!(run(&format!("ip netns add {name}")), "the pod's network is tested as root, with ip(8) of iproute2");
        let made = Self(name.to_owned());
        for command in commands {
            assert!(run(&format!("ip -n {name} {command}")), "{command}");
        }
        made
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        run(&format!("ip netns del {}", self.0));
    }
}

fn run(line: &str) -> bool {
    let mut words = line.split(' ');
    Command::new(words.next().unwrap()).args(words).status().is_ok_and(|status| status.success())
}

/// What somebody may have set up in a namespace, of the kinds that need no module. Addresses that the kernel makes come when
/// they come.
const SETUP: [&str; 42] = [
    "link set lo up",
    "link set eth0 addrgenmode none mtu 1450 txqueuelen 77 alias cni allmulticast on up",
    "link add br0 type bridge forward_delay 200",
    "link add left type veth peer name right",
    "link set left addrgenmode none master br0 up",
    "link set right addrgenmode none up",
    "link set br0 addrgenmode none up",
    "link add low link eth0 type macvlan mode bridge",
    "addr add 10.22.0.5/24 brd + dev eth0",
    "addr add 10.22.0.9/24 dev eth0 label eth0:1",
    "addr add 10.88.1.1 peer 10.88.1.2/32 dev eth0",
    "addr add 10.99.0.5/24 dev eth0 noprefixroute",
    "addr add 10.77.0.1/32 dev lo",
    "addr add 10.23.0.5/24 dev br0 valid_lft 1000 preferred_lft 500",
    "addr add 10.24.0.5/24 dev br0",
    "addr add 10.26.0.5/24 dev low",
    "-6 addr add fd22::5/64 dev eth0 nodad",
    "-6 addr add fd22::9/64 dev eth0 nodad preferred_lft 0",
    "-6 addr add fd23::1 peer fd23::2/128 dev eth0 nodad",
    "-6 addr add fe80::abcd/64 dev eth0 nodad",
    "route add default nexthop via 10.22.0.1 weight 1 nexthop via 10.22.0.2 weight 2",
    "route add 10.65.0.0/24 dev eth0 src 10.22.0.5 mtu 1300",
    "route del 10.24.0.0/24 dev br0",
    "route add 10.66.1.1 dev eth0 scope link",
    "route add 10.66.0.0/16 via 10.66.1.1 advmss 1200 initcwnd 20 rto_min 10ms quickack 1",
    "route add blackhole 10.67.0.0/16",
    "route add unreachable 10.68.0.0/16",
    "route add prohibit 10.69.0.0/16",
    "route add throw 10.70.0.0/16 table 7",
    "route add 10.71.0.0/16 via 10.22.0.1 tos 0x10",
    "route append 10.71.0.0/16 via 10.22.0.2 tos 0x10",
    "route add local 10.72.0.0/16 dev lo table 100",
    "route add default via 10.22.0.3 dev eth0 table 100 onlink",
    "-6 route add default via fd22::1 pref high",
    "-6 route add fd66::/64 nexthop via fd22::2 nexthop via fd22::3",
    "-6 route add prohibit fd67::/64",
    "rule add from 10.22.0.5 table 100 pref 50",
    "rule add not fwmark 7/15 ipproto tcp dport 80-90 oif eth0 lookup 7 suppress_prefixlength 0 pref 60",
    "-6 rule add to fd99::/64 prohibit pref 70",
    "rule del pref 32767",
    "neigh add 10.22.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
    "neigh add proxy 10.22.0.78 dev eth0",
];

/// What ip(8) shows of a namespace, without what differs: numbers of links, and times that pass.
fn shown(name: &str) -> Vec<String> {
    let commands = [
        "-o -d link",
        "-o addr",
        "route show table all",
        "-6 route show table all",
        "rule",
        "-6 rule",
        "neigh show nud permanent",
        "neigh show proxy",
    ];
    let mut all = Vec::new();
    for command in commands {
        let output = Command::new("ip").args(["-n", name]).args(command.split(' ')).output().unwrap();
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            // Times, numbers, states, and what a driver has by itself.
            let mut shown = Vec::new();
            let mut words = line.split_whitespace().skip(usize::from(command.starts_with("-o")));
            while let Some(word) = words.next() {
                let name = word.split('@').next().unwrap_or_default().trim_end_matches(':');
                match name {
                    "valid_lft"
                    | "preferred_lft"
                    | "state"
                    | "qdisc"
                    | "link-netnsid"
                    | "link-netns"
                    | "gc_timer"
                    | "hello_timer"
                    | "expires"
                    | "proto"
                    | "numtxqueues"
                    | "numrxqueues"
                    | "designated_bridge"
                    | "designated_root"
                    | "bridge_id"
                    | "root_id"
                    | "link/ether"
                    | "forward_delay_timer" => drop(words.next()),
                    // Of an address that has no route, the guest says so.
                    "linkdown" | "nodad" | "tentative" | "noprefixroute" => {}
                    // A carrier is noticed when it is.
                    _ => shown.push(name.replace("NO-CARRIER,", "").replace(",LOWER_UP", "")),
                }
            }
            all.push(shown.join(" "));
        }
    }
    all.sort();
    all
}

/// Takes steps as the agent does, in the calling thread's namespace; answers with those that the kernel has refused. `known`
/// has the links there by their indexes in the namespace that is copied.
async fn take(steps: &[NetworkStep], known: &mut HashMap<u32, u32>) -> Vec<String> {
    use bulkhead_protocol::agent::network_step::Step;
    use bulkhead_protocol::rtnl::{IFLA_IFNAME, Message, u32_at};
    let socket = netns::socket().unwrap();
    let index = async |name: &[u8]| {
        let links = socket.dump(&links::dump()).await.unwrap();
        let link = links.iter().find(|link| link.attribute(IFLA_IFNAME) == Some(name));
        link.and_then(|link| u32_at(&link.payload, 4)).unwrap_or(0)
    };
    let mut refused = Vec::new();
    for step in steps {
        let Some(Step::Netlink(netlink)) = &step.step else { continue };
        let kind = u16::try_from(netlink.type_).unwrap();
        let mut message = Message { kind, payload: netlink.payload.clone() };
        message.translate(|index| known.get(&index).copied()).unwrap();
        let name = message.attribute(IFLA_IFNAME).map(<[u8]>::to_vec);
        match socket.change(message, u16::try_from(netlink.flags).unwrap()).await {
            // What is there, or gone, already: EEXIST, ENOENT, ESRCH, EADDRNOTAVAIL.
            Err(error) if !matches!(error.raw_os_error(), Some(17 | 2 | 3 | 99)) => {
                refused.push(format!("{}: {error}", step.what))
            }
            _ => {}
        }
        if let Some(name) = name.filter(|_| netlink.makes != 0) {
            known.insert(netlink.makes, index(&name).await);
        }
    }
    refused
}

async fn made_again(netns: &Netns, steps: Vec<NetworkStep>, mut known: HashMap<u32, u32>) -> HashMap<u32, u32> {
    let taken = async move || (take(&steps, &mut known).await, known);
    let (refused, known) = netns::run_in(&netns.path(), taken).await.unwrap();
    assert!(refused.is_empty(), "{refused:#?}");
    known
}

async fn read(netns: &Netns) -> inspect::State {
    let read = async || inspect::State::read(&netns::socket().unwrap()).await.unwrap();
    netns::run_in(&netns.path(), read).await.unwrap()
}

#[tokio::test]
async fn all_that_is_set_up_in_a_namespace_is_made_again() {
    let name = |kind| format!("bhtest-{kind}-{}", std::process::id());
    let (made, again, peer) = (name("made"), name("again"), name("peer"));
    let peer = Netns::new(&peer, &[]);
    let eth0 = |name: &str| {
        let line = format!("link add eth0 address 02:00:00:00:00:07 type veth peer name {name} netns {}", peer.0);
        let netns = Netns::new(if name == "one" { &made } else { &again }, &[&line]);
        assert!(run(&format!("ip -n {} link set {name} up", peer.0)));
        netns
    };
    let (made, again) = (eth0("one"), eth0("two"));
    for line in SETUP {
        assert!(run(&format!("ip -n {} {line}", made.0)), "{line}");
    }
    let state = read(&made).await;
    assert!(state.unsupported.is_empty(), "{:?}", state.unsupported);
    let device = state.links.iter().find(|link| link.name == "eth0").unwrap();
    assert_eq!(device.device_mac(), Some([2, 0, 0, 0, 0, 7]));
    let copy = read(&again).await;
    let known =
        HashMap::from([(1, 1), (device.index, copy.links.iter().find(|link| link.name == "eth0").unwrap().index)]);
    let first = steps::first(&state, Default::default());
    let known = made_again(&again, first, known).await;
    assert_eq!(shown(&made.0), shown(&again.0));

    // What changes is told, and nothing else.
    for line in [
        "route replace default via 10.22.0.4",
        "-6 route replace default via fd22::1 mtu 1400 pref high",
        "addr del 10.22.0.5/24 dev eth0",
        "addr add 10.22.0.6/24 dev eth0",
        "route add 10.22.0.0/24 dev eth0 src 10.22.0.6 metric 9",
        "rule del pref 50",
        "link del low",
        "link set eth0 mtu 1400",
        "link set right promisc on",
        "route add prohibit 10.90.0.0/16",
        "neigh del 10.22.0.1 dev eth0",
    ] {
        assert!(run(&format!("ip -n {} {line}", made.0)), "{line}");
    }
    let later = read(&made).await;
    assert!(steps::change(&later, &read(&made).await, Default::default()).is_empty());
    let change = steps::change(&state, &later, Default::default());
    made_again(&again, change, known).await;
    assert_eq!(shown(&made.0), shown(&again.0));
}

#[tokio::test]
async fn kernel_parameters_are_read_in_the_order_in_which_they_hold() {
    let name = format!("bhtest-sysctl-{}", std::process::id());
    let netns = Netns::new(&name, &["link add eth0 type veth peer name eth1"]);
    let state = read(&netns).await;
    let read = async move || {
        std::fs::write("/proc/sys/net/ipv4/conf/eth0/arp_filter", "1").unwrap();
        let links: Vec<_> = state.links.iter().filter(|link| link.name == "eth0").collect();
        sysctls::read(&links, true).sysctls
    };
    let found = netns::run_in(&netns.path(), read).await.unwrap();
    let at = |name: &str| found.iter().position(|sysctl| sysctl.name == name).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(found[at("net/ipv4/conf/eth0/arp_filter")].value, "1");
    assert!(at("net/ipv4/ip_forward") < at("net/ipv4/conf/all/forwarding"));
    assert!(at("net/ipv6/conf/all/forwarding") < at("net/ipv6/conf/default/forwarding"));
    assert!(at("net/ipv6/conf/default/forwarding") < at("net/ipv6/conf/eth0/forwarding"));
    assert!(found.iter().all(|sysctl| !sysctl.name.ends_with("/flush") && !sysctl.name.contains("eth1")));
}

#[tokio::test]
async fn changes_in_a_namespace_are_told() {
    let name = format!("bhtest-events-{}", std::process::id());
    let netns = Netns::new(&name, &[]);
    let events = netns::run_in(&netns.path(), async || Events::open()).await.unwrap().unwrap();
    let events = events.watched().unwrap();
    for line in ["link set lo up", "addr add 10.22.0.6/32 dev lo", "rule add pref 7 lookup 7"] {
        assert!(run(&format!("ip -n {name} {line}")), "{line}");
        // It is there already: ip(8) has had its answer.
        tokio::time::timeout(std::time::Duration::from_secs(10), events.next()).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn tap_is_made_in_the_namespace_and_goes_with_its_descriptor() {
    let name = format!("bhtest-tap-{}", std::process::id());
    let netns = Netns::new(&name, &[]);
    let make = async || {
        let handle = netns::connect().unwrap();
        let tap = tap::open("tap-9").unwrap();
        tap::raise(&handle, "tap-9", 1400).await.unwrap();
        tap
    };
    let tap = netns::run_in(&netns.path(), make).await.unwrap();
    assert!(run(&format!("ip -n {name} link show tap-9")));
    assert!(!run("ip link show tap-9"), "not in the host's namespace");
    drop(tap);
    // Another test's child holds a copy of the descriptor between its fork and its exec: look again for that long.
    assert!((0..100).any(|_| !run(&format!("ip -n {name} link show tap-9"))));
}

#[tokio::test]
async fn localhost_of_the_namespace_leads_to_one_listener_whatever_the_port() {
    let name = format!("bhtest-local-{}", std::process::id());
    let netns = Netns::new(&name, &["link set lo up", "addr add 10.22.0.6/32 dev lo"]);
    let dial = async || {
        use std::net::TcpStream;
        let localhost = Localhost::open().unwrap();
        for address in ["127.0.0.1:7", "127.9.9.9:65000", "[::1]:80"] {
            let near = TcpStream::connect(address).unwrap();
            let listeners: &[_; 2] = localhost.listeners().try_into().unwrap();
            let (far, _) = listeners[usize::from(address.starts_with('['))].accept().unwrap();
            assert_eq!(
                (far.local_addr().unwrap(), near.peer_addr().unwrap()),
                (address.parse().unwrap(), address.parse().unwrap())
            );
        }
        assert!(TcpStream::connect("10.22.0.6:7").is_err(), "only localhost is steered");
        drop(localhost);
        assert!(TcpStream::connect("127.0.0.1:7").is_err(), "the steering outlives its owner");
    };
    netns::run_in(&netns.path(), dial).await.unwrap();
}

#[tokio::test]
async fn namespace_that_is_gone_is_named() {
    let error = attach(PathBuf::from("/run/netns/none-such"), Take::All, Policy::Refuse).await.unwrap_err();
    assert!(error.to_string().contains("/run/netns/none-such"));
}

#[tokio::test]
async fn interfaces_of_the_node_are_never_touched() {
    // The first process's is out of sight of a test in a container.
    for path in ["/proc/1/ns/net", "/proc/self/ns/net"].into_iter().filter(|path| std::fs::metadata(path).is_ok()) {
        let attached = attach(path.into(), Take::All, Policy::Refuse).await;
        assert!(matches!(attached, Err(NetworkError::Netns(NetnsError::Nodes(_)))), "{attached:?}");
        let detached = detach(Path::new(path), vec![1]).await;
        assert!(matches!(detached, Err(NetworkError::Netns(NetnsError::Nodes(_)))), "{detached:?}");
    }
}

#[tokio::test]
async fn held_namespace_is_worked_in_when_its_path_is_gone() {
    let name = format!("bhtest-held-{}", std::process::id());
    let netns = Netns::new(&name, &["link add eth0 type bridge", "link set eth0 up"]);
    let held = netns::open(&netns.path()).unwrap();
    drop(netns);
    let path = netns::path_of(&held);
    let (state, _) = look(&path, HashSet::new(), Take::Raised).await.unwrap();
    assert!(state.links.iter().any(|link| link.name == "eth0"), "{state:?}");
    assert!(state.link(1).is_some());
    detach(&path, vec![1]).await.unwrap();
}

#[tokio::test]
async fn namespace_of_another_vm_is_refused_and_left_as_it_is() {
    let name = format!("bhtest-taken-{}", std::process::id());
    let far = Netns::new(&format!("bhtest-taken-far-{}", std::process::id()), &[]);
    let netns = Netns::new(&name, &[&format!("link add eth0 type veth peer name eth0 netns {}", far.0)]);
    let state = read(&netns).await;
    let eth0 = state.links.iter().find(|link| link.name == "eth0").unwrap().index;
    let make = async move || tap::open(&format!("tap-{eth0}")).unwrap();
    let _tap = netns::run_in(&netns.path(), make).await.unwrap();
    let attached = attach(netns.path(), Take::All, Policy::Refuse).await;
    assert!(matches!(&attached, Err(NetworkError::Taken(name)) if name == "eth0"), "{attached:?}");
}
