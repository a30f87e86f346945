//! From one network namespace into another, which takes root, ip(8), nft(8) and iptables(8).

use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use bulkhead_protocol::agent::Firewall;
use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::*;

/// A named namespace with the interfaces lo and eth0, made by ip(8).
struct Netns(String);

impl Netns {
    fn new(name: &str) -> Self {
        let name = format!("bhtest-{name}-{}", std::process::id());
        run("ip", &["netns", "add", &name], "");
        let made = Self(name);
        made.run(&["ip", "link", "add", "eth0", "type", "bridge"], "");
        made
    }

    fn run(&self, command: &[&str], input: &str) -> String {
        run("ip", &[["netns", "exec", &self.0].as_slice(), command].concat(), input)
    }

    /// Runs something on a thread that has entered it.
    fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.0);
        let enter = || {
            let netns = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&netns), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter).join().unwrap())
    }

    fn dump(&self) -> Dump {
        self.enter(|| dump().unwrap())
    }

    fn replay(&self, firewall: &Firewall) -> Vec<Uncarried> {
        let failures = self.enter(|| replay(firewall).unwrap());
        failures.iter().map(|one| failure(firewall, one).unwrap()).collect()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        run("ip", &["netns", "del", &self.0], "");
    }
}

fn run(program: &str, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?} failed; the rules are tested as root, with nftables and iptables"
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const RULESET: &str = r#"
table inet filter {
    counter dropped { }
    quota most { over 10 mbytes }
    set ports { type inet_service; flags interval; auto-merge; elements = { 22, 80-90, 443, 8000-8999 } }
    set networks { type ipv4_addr; flags interval; elements = { 0.0.0.0/8, 10.0.0.0/8, 192.168.1.7, 224.0.0.0-255.255.255.255 } }
    set pairs { type ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 80-90, 10.1.2.3 . 443 } }
    set seen { type ipv4_addr; size 128; flags dynamic,timeout; timeout 1h; elements = { 10.1.1.1 timeout 2h } }
    map verdicts { type inet_service : verdict; elements = { 25 : drop, 26 : jump other } }
    map marks { type mark : ipv4_addr; elements = { 1 : 10.0.0.1, 2 : 10.0.0.2 } }
    chain other { counter name "dropped" limit rate 5/minute burst 7 packets reject with tcp reset; }
    chain input {
        type filter hook input priority filter + 10; policy drop;
        iifname "lo" accept comment "by name"
        ct state established,related accept
        ip saddr @networks tcp dport @ports accept
        ip daddr . tcp dport @pairs accept
        tcp dport { 1-5, 7, 9 } log prefix "odd " drop
        tcp dport vmap @verdicts
        ip saddr vmap { 10.9.0.0/16 : accept, 10.8.0.1 : goto other }
        tcp dport 5000 add @seen { ip saddr limit rate 1/second } accept
        ip protocol tcp jump { ip saddr 10.5.0.0/16 tcp dport 99 drop; counter packets 5 bytes 7; }
        quota name "most" drop
        meta skuid 1337 meta mark set 0x1
    }
    chain forward { type filter hook forward priority 0; policy accept; meta mark 0x2 counter; }
}
table ip nat {
    chain output { type nat hook output priority -100; meta skuid != 1337 oifname != "lo" tcp dport 80 redirect to :15001; }
    chain prerouting { type nat hook prerouting priority dstnat; dnat to tcp dport map { 80 : 10.0.0.5, 81 : 10.0.0.6 }; }
}
table ip6 raw { flags dormant; chain prerouting { type filter hook prerouting priority raw; notrack; }; }
table bridge empty { }
"#;

fn nft(netns: &Netns) -> String {
    netns.run(&["nft", "list", "ruleset"], "")
}

#[test]
fn nftables_rules_are_the_same_in_the_other_namespace() {
    let (from, to) = (Netns::new("nft-from"), Netns::new("nft-to"));
    from.run(&["nft", "-f", "-"], RULESET);
    let dump = from.dump();
    assert_eq!(dump.uncarried, []);
    assert_eq!(to.replay(&dump.firewall), []);
    let without_times = |text: String| {
        let words = |line: &str| line.split(" expires ").next().unwrap_or_default().to_owned();
        text.lines().map(words).collect::<Vec<_>>()
    };
    assert_eq!(without_times(nft(&from)), without_times(nft(&to)));
    // Somebody goes on to work with them.
    to.run(
        &["nft", "-f", "-"],
        "add rule inet filter input tcp dport { 1000, 2000 } jump { tcp sport 7 accept; }\nflush table ip nat\n",
    );
}

/// What istio-cni and linkerd-cni make, and extensions with tables, protocols and pointers of their own.
const IPTABLES: &str = "*nat
:ISTIO_OUTPUT - [0:0]
:ISTIO_REDIRECT - [0:0]
-A PREROUTING -p tcp -j REDIRECT --to-ports 15006
-A OUTPUT -p tcp -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p udp -m udp --dport 53 -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
COMMIT
*mangle
-A POSTROUTING -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-A PREROUTING ! -d 127.0.0.1/32 -i eth0 -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j MARK --set-xmark 0x111/0xffffffff
COMMIT
*filter
:INPUT DROP [0:0]
-A INPUT -p tcp -m multiport --dports 80,443,8000:8080 -m comment --comment \"web servers\" -j ACCEPT
-A INPUT -p tcp -m limit --limit 5/min -j LOG --log-prefix \"in \"
-A INPUT -p tcp -m recent --set --name seen --mask 255.255.255.255 --rsource -j DROP
-A INPUT -p udp -m hashlimit --hashlimit-upto 5/sec --hashlimit-burst 5 --hashlimit-mode srcip --hashlimit-name dns -j ACCEPT
-A OUTPUT -m statistic --mode random --probability 0.50000000000 -j REJECT --reject-with icmp-host-prohibited
-A OUTPUT -p icmp -m string --string \"secret\" --algo bm -j DROP
COMMIT
";

fn plain(saved: &str) -> Vec<String> {
    saved.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
}

fn iptables(kind: &str) {
    let (from, to) = (Netns::new(&format!("{kind}-from")), Netns::new(&format!("{kind}-to")));
    from.run(&[&format!("iptables-{kind}-restore"), "-w"], IPTABLES);
    let six = IPTABLES.replace("127.0.0.1/32", "::1/128").replace("127.0.0.6/32", "::6/128");
    let six =
        six.replace("255.255.255.255", &["ffff"; 8].join(":")).replace("icmp-host-prohibited", "icmp6-adm-prohibited");
    let six = six.replace("-p icmp", "-p ipv6-icmp").replace("seen", "seen6").replace("name dns", "name dns6");
    from.run(&[&format!("ip6tables-{kind}-restore"), "-w"], &six);
    let dump = from.dump();
    assert_eq!(dump.uncarried, []);
    assert_eq!(to.replay(&dump.firewall), []);
    for program in ["iptables", "ip6tables"] {
        let save = |netns: &Netns| netns.run(&[&format!("{program}-{kind}-save")], "");
        let saved = plain(&save(&from));
        assert!(saved.len() > 25, "{saved:?}");
        assert_eq!(saved, plain(&save(&to)), "{program}-{kind}");
    }
    // Again, over what is there: the kernel wants to be told how many counters that has.
    assert!(dump.firewall.xtables.is_empty() || to.replay(&dump.firewall).is_empty());
}

#[test]
fn rules_of_iptables_nft_are_the_same_in_the_other_namespace() {
    iptables("nft");
}

#[test]
fn rules_of_iptables_legacy_are_the_same_in_the_other_namespace() {
    iptables("legacy");
}

#[test]
fn namespace_without_rules_has_nothing_to_carry_and_gets_nothing_by_looking() {
    let netns = Netns::new("none");
    netns.run(&["iptables-legacy", "-w", "-t", "filter", "-L"], "");
    let before = netns.enter(|| std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap());
    let dump = netns.dump();
    let carried = replacing(&Firewall::default(), &dump.firewall);
    assert_eq!((carried, dump.uncarried), (Firewall::default(), Vec::new()));
    let after = netns.enter(|| std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap());
    assert_eq!(before, after);
}

#[test]
fn counts_are_no_change_and_a_table_that_is_emptied_is_one() {
    let netns = Netns::new("counts");
    let rules = "table inet counting {
        quota some { over 9000 bytes used 0 bytes }
        set seen { type ipv4_addr; flags dynamic,timeout; timeout 1h; }
        chain c {
            type filter hook output priority 0
            ip daddr 127.0.0.1 counter quota 8000 bytes update @seen { ip daddr counter } accept
        }
    }
    table inet other { chain c { type filter hook input priority 0; tcp dport 9 drop; }; }";
    netns.run(&["nft", "-f", "-"], rules);
    netns.run(&["iptables-legacy", "-w", "-A", "OUTPUT", "-d", "127.0.0.1", "-j", "ACCEPT"], "");
    netns.run(&["ip", "link", "set", "lo", "up"], "");
    netns.run(&["ping", "-q", "-c", "1", "127.0.0.1"], "");
    let before = netns.dump().firewall;
    netns.run(&["ping", "-q", "-c", "1", "127.0.0.1"], "");
    let after = netns.dump().firewall;
    assert_ne!(before, after, "nothing has counted");
    assert_eq!(replacing(&before, &after), Firewall::default());

    netns.run(&["nft", "add rule inet other c tcp dport 10 drop"], "");
    netns.run(&["iptables-legacy", "-w", "-F", "OUTPUT"], "");
    let change = replacing(&after, &netns.dump().firewall);
    assert!(change.nft.iter().all(|one| crate::tables::key(one) == (1, "other".to_owned())), "{:?}", change.nft);
    assert_eq!(
        (change.nft.len(), change.xtables.len()),
        (5, 1),
        "the old one goes, and table, chain and two rules come"
    );
    assert!(crate::xtables::is_empty(&change.xtables[0]));
}

#[test]
fn interfaces_by_number_become_interfaces_by_name() {
    let (from, to) = (Netns::new("index-from"), Netns::new("index-to"));
    to.run(&["ip", "link", "add", "eth9", "type", "bridge"], "");
    to.run(&["ip", "link", "del", "eth0"], "");
    to.run(&["ip", "link", "add", "eth0", "type", "bridge"], "");
    let rules = "table inet t { chain c { type filter hook input priority 0
        iif eth0 tcp dport 1 drop
        oif != eth0 accept
        iif lo accept
        fib saddr . iif oif missing drop;
    }; }";
    from.run(&["nft", "-f", "-"], rules);
    let dump = from.dump();
    assert_eq!(dump.uncarried, []);
    assert_eq!(to.replay(&dump.firewall), []);
    let got = nft(&to);
    for rule in
        ["iifname \"eth0\" tcp dport 1 drop", "oifname != \"eth0\" accept", "iif \"lo\" accept", "oif missing drop"]
    {
        assert!(got.contains(rule), "{rule}: {got}");
    }
}

#[test]
fn what_cannot_be_carried_is_named_with_its_rule_and_the_rest_is_there() {
    let (from, to) = (Netns::new("some-from"), Netns::new("some-to"));
    let rules = "table inet t {
        chain c { type filter hook input priority 0
            iif { eth0, lo } tcp dport { 1, 2 } drop
            tcp dport { 3, 4 } drop
        }
    }
    table ip quiet { chain c { type filter hook input priority 0; iif . tcp dport { eth0 . 1 } counter; }; }
    table netdev n { chain i { type filter hook ingress device eth0 priority 0; drop; }; }
    table netdev e { chain o { type filter hook egress device eth0 priority 0; drop; }; }";
    from.run(&["nft", "-f", "-"], rules);
    let dump = from.dump();
    let named: Vec<_> = dump.uncarried.iter().map(|one| (one.what.split(" (").next().unwrap(), one.security)).collect();
    let rule = "a rule in chain c of table";
    let want = [
        (format!("{rule} inet t"), true),
        (format!("{rule} ip quiet"), false),
        ("chain i of table netdev n".to_owned(), true),
    ];
    assert_eq!(named, want.iter().map(|(what, security)| (what.as_str(), *security)).collect::<Vec<_>>());
    assert_eq!(to.replay(&dump.firewall), []);
    // The set that was a part of the rule is one of its own now.
    let got = nft(&to);
    assert!(got.contains("tcp dport @__set2 drop") && got.contains("elements = { 3, 4 }"), "{got}");
}

#[test]
fn what_the_other_kernel_does_not_know_is_named_with_its_expression_and_the_rest_is_there() {
    let (from, to) = (Netns::new("unknown-from"), Netns::new("unknown-to"));
    from.run(
        &["nft", "-f", "-"],
        "table ip t { chain c { type filter hook input priority 0; tcp dport { 3, 4 } drop; tcp dport 5 drop; }; }",
    );
    from.run(&["iptables-legacy-restore", "-w"], "*filter\n-A OUTPUT -m owner --uid-owner 7 -j DROP\nCOMMIT\n");
    let mut firewall = from.dump().firewall;
    // Names of the same length that no kernel has.
    let spoil = |bytes: &mut Vec<u8>, name: &[u8], other: &[u8]| {
        let place = bytes.windows(name.len()).position(|window| window == name).unwrap();
        bytes[place..place + name.len()].copy_from_slice(other);
    };
    let rule = firewall.nft.iter_mut().find(|one| one.kind == 6).unwrap();
    spoil(&mut rule.attributes, b"lookup\0", b"lookap\0");
    spoil(&mut firewall.xtables[0].entries, b"owner\0", b"ownar\0");
    let failures = to.replay(&firewall);
    let whole = failures.iter().map(|one| one.what.as_str()).collect::<Vec<_>>().join("; ");
    assert!(whole.contains("a rule in chain c of table ip t") && whole.contains("\"lookap\""), "{whole}");
    assert!(whole.contains("table filter of iptables") && whole.contains("no match \"ownar\""), "{whole}");
    assert!(failures.iter().all(|one| one.security), "{failures:?}");
    assert!(nft(&to).contains("tcp dport 5 drop"));
}

#[test]
fn nonsense_is_no_panic_and_no_more_than_an_error() {
    let to = Netns::new("nonsense");
    let from = Netns::new("sense");
    from.run(&["nft", "-f", "-"], "table ip t { chain c { tcp dport { 3, 4 } drop; }; }");
    from.run(&["iptables-legacy-restore", "-w"], "*filter\n-A OUTPUT -m owner --uid-owner 7 -j DROP\nCOMMIT\n");
    let firewall = from.dump().firewall;
    for index in 0..firewall.nft.len() {
        for end in 0..firewall.nft[index].attributes.len() {
            let mut torn = firewall.clone();
            torn.nft[index].attributes.truncate(end);
            let _ = torn.nft.iter().map(words::message).count() + tables::acting(&torn.nft).len();
        }
    }
    let mut torn = firewall.clone();
    torn.nft[1].attributes.truncate(9);
    assert!(!to.replay(&torn).is_empty());
    torn.nft[1].kind = 2;
    assert!(to.enter(|| replay(&torn)).is_err());
    for end in 0..firewall.xtables[0].entries.len() {
        let mut torn = Firewall { xtables: firewall.xtables.clone(), ..Firewall::default() };
        torn.xtables[0].entries.truncate(end);
        assert!(!to.replay(&torn).is_empty());
    }
}

/// Whether anything is told; takes it.
fn is_told(watch: &OwnedFd) -> bool {
    let mut bytes = [0; 64];
    std::iter::from_fn(|| rustix::net::recv(watch, &mut bytes, rustix::net::RecvFlags::DONTWAIT).ok()).count() > 0
}

#[test]
fn change_is_noticed_and_replaces_what_was_carried_and_nothing_else() {
    let (from, to) = (Netns::new("change-from"), Netns::new("change-to"));
    let watch = from.enter(|| watch().unwrap().unwrap());
    from.run(&["nft", "-f", "-"], RULESET);
    assert!(is_told(&watch) && !is_told(&watch));
    let before = from.dump().firewall;
    assert_eq!(to.replay(&before), []);
    to.run(&["nft", "-f", "-"], "table inet own { chain c { tcp dport 1 drop; }; }");
    from.run(&["nft", "-f", "-"], "delete table ip nat\nflush chain inet filter other\nadd table inet more\n");
    assert!(is_told(&watch));
    assert_eq!(to.replay(&replacing(&before, &from.dump().firewall)), []);
    let got = nft(&to);
    for (text, is_there) in
        [("table inet own", true), ("table inet more", true), ("table ip nat", false), ("limit rate 5", false)]
    {
        assert_eq!(got.contains(text), is_there, "{text}: {got}");
    }
}

const SETS: &str = "create gap hash:ip
create nets hash:net family inet hashsize 1024 maxelem 65536 counters comment
add nets 10.0.0.0/8 packets 3 bytes 4 comment \"ours\"
add nets 192.168.1.0/24 nomatch
create ports bitmap:port range 0-1023 timeout 600
add ports 80 timeout 500
create both list:set
add both nets
create six hash:net,port family inet6
add six fd00::/64,tcp:443
";

#[test]
fn rules_with_sets_of_ipset_name_the_same_sets_in_the_other_namespace() {
    let (from, to) = (Netns::new("set-from"), Netns::new("set-to"));
    from.run(&["ipset", "restore"], SETS);
    from.run(&["ipset", "destroy", "gap"], "");
    let rules = "*filter
-A INPUT -m set --match-set nets src -j DROP
-A INPUT -p tcp -m set ! --match-set ports dst -j DROP
-A FORWARD -m set --match-set both src -j SET --add-set nets dst
COMMIT
";
    for kind in ["nft", "legacy"] {
        from.run(&[&format!("iptables-{kind}-restore"), "-w"], rules);
    }
    let dump = from.dump();
    assert_eq!(dump.uncarried, []);
    assert_eq!(to.replay(&dump.firewall), []);
    let plain_sets = |netns: &Netns| {
        let saved = netns.run(&["ipset", "save"], "");
        let words = |line: &str| {
            line.split(" initval").next().unwrap_or_default().split(" timeout 49").next().map(str::to_owned)
        };
        saved.lines().filter_map(words).collect::<Vec<_>>()
    };
    assert_eq!(plain_sets(&from), plain_sets(&to));
    for kind in ["nft", "legacy"] {
        let save = |netns: &Netns| plain(&netns.run(&[&format!("iptables-{kind}-save"), "-t", "filter"], ""));
        assert_eq!(save(&from), save(&to), "{kind}");
    }
    assert!(to.replay(&Firewall { sets: dump.firewall.sets, ..Firewall::default() })[0].what.contains("ipset nets"));
}
