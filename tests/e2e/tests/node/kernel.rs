//! The guest's kernel has what a node's has as modules.

use anyhow::ensure;
use bulkhead_cli::cri::v1;
use bulkhead_e2e::{on_node, sh};

/// What has to work, by the node's own tools. Each line that it prints is of something that does not.
const CHECK: &str = r#"
export PYTHONHOME=/node/usr
node() {
    libraries=/node/usr/lib/x86_64-linux-gnu program=/node/usr/$1
    shift
    $libraries/ld-linux-x86-64.so.2 --library-path $libraries $program "$@" 2>&1
}
link() { said=$(node bin/ip link add "$@") || echo "link $* :: $said"; node bin/ip link del x0 > /dev/null; }
ends="remote 10.1.1.1 local 10.1.1.2"
[ "$(ls /sys/class/net | tr '\n' ' ')" = "eth0 lo " ] || ls /sys/class/net
for kind in wireguard dummy bridge ifb bond team nlmon "vrf table 10" "netkit" "geneve id 7 remote 10.1.1.1" \
    "ipip $ends" "gre $ends" "gretap $ends" "erspan seq key 1 erspan_ver 1 $ends" "sit $ends" "vti key 5 $ends" \
    "ip6tnl remote fd00::1 local fd00::2" "ip6gre remote fd00::1 local fd00::2" "vti6 key 5 remote fd00::1 local fd00::2" \
    "vxlan id 7 dstport 4789 dev eth0" "xfrm dev eth0 if_id 5" "veth peer name x1"; do
    link x0 type $kind
done
link x0 link eth0 type vlan id 5
link x0 link eth0 type macvlan mode bridge
link x0 link eth0 type macvtap
link x0 link eth0 type macsec
link x0 link eth0 type ipvlan mode l2
for queue in netem sfq prio cake codel fq_codel hfsc drr qfq pie fq_pie "choke limit 1000 bandwidth 10mbit" "ets bands 3" \
    "red limit 100000 avpkt 1000"; do
    said=$(node sbin/tc qdisc add dev lo root $queue) || echo "queue $queue :: $said"
    node sbin/tc qdisc del dev lo root > /dev/null
done
for mode in tunnel transport; do for at in "10.1.1.1 dst 10.1.1.2" "fd00::1 dst fd00::2"; do
    said=$(node bin/ip xfrm state add src $at proto esp spi 1 mode $mode enc aes 0x00112233445566778899aabbccddeeff \
        auth sha256 0x00112233445566778899aabbccddeeff) || echo "esp $mode $at :: $said"
    said=$(node bin/ip xfrm state add src $at proto esp spi 2 mode $mode \
        aead 'rfc4106(gcm(aes))' 0x00112233445566778899aabbccddeeff00112233 128) || echo "gcm $mode $at :: $said"
    node bin/ip xfrm state flush
done; done
for route in "10.9.1.0/24 encap ip id 5 dst 10.1.1.1 dev lo" "10.9.2.0/24 encap mpls 100 dev lo" \
    "fd09::/64 encap seg6 mode encap segs fd00::1 dev lo"; do
    said=$(node bin/ip route add $route) || echo "route $route :: $said"
    node bin/ip route del $route
done
for file in /proc/config.gz /proc/schedstat /proc/self/schedstat /proc/net/xfrm_stat /proc/net/ip_vs /proc/net/nf_conntrack \
    /proc/sys/net/mptcp/enabled; do
    head -c 1 $file > /dev/null || echo "$file is not there"
done
node bin/python3 -S -c '
import socket
for name, args in (("mptcp", (2, 1, 262)), ("alg", (38, 5, 0)), ("key", (15, 3, 2)), ("l2tp", (2, 2, 115)), ("xdp", (44, 3, 0))):
    try: socket.socket(*args)
    except OSError as error: print("socket", name, error)
for kind, name in ("hash", "hmac(sha256)"), ("skcipher", "cbc(aes)"), ("aead", "gcm(aes)"), ("rng", "stdrng"):
    try: socket.socket(38, 5, 0).bind((kind, name))
    except OSError as error: print("algorithm", name, error)
s, l = socket.socket(), socket.socket()
l.bind(("127.0.0.1", 0)); l.listen(); s.connect(l.getsockname())
try: s.setsockopt(6, 31, b"tls")
except OSError as error: print("tls", error)
for control in "reno", "cubic", "bbr", "dctcp", "htcp":
    try: socket.socket().setsockopt(6, 13, control.encode())
    except OSError as error: print(control, error)
'
"#;

/// Ends a network namespace with a link of every kind in it. A veth pair tells when the kernel's worker has taken it down:
/// the end outside goes with the one inside. Then a link can be made, if the guest lives.
const END: &str = r#"
export PYTHONHOME=/node/usr
libraries=/node/usr/lib/x86_64-linux-gnu
exec $libraries/ld-linux-x86-64.so.2 --library-path $libraries /node/usr/bin/python3 -S -c '
import ctypes, os, socket, struct, subprocess, sys
libraries = "/node/usr/lib/x86_64-linux-gnu"
def ip(lines):
    loader = [libraries + "/ld-linux-x86-64.so.2", "--library-path", libraries]
    ended = subprocess.run(loader + ["/node/usr/bin/ip", "-force", "-batch", "-"], input=lines, capture_output=True, text=True)
    if ended.returncode: print(lines, "::", ended.stderr)
ends = "remote 10.1.1.1 local 10.1.1.2"
kinds = ["wireguard", "dummy", "bridge", "ifb", "bond", "team", "nlmon", "vrf table 10", "netkit", "geneve id 7 remote 10.1.1.1",
    "ipip " + ends, "gre " + ends, "gretap " + ends, "sit " + ends, "vti key 5 " + ends, "ip6tnl remote fd00::1 local fd00::2",
    "ip6gre remote fd00::1 local fd00::2", "xfrm dev lo if_id 5", "veth peer name y1"]
events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
events.bind((0, 1))
events.settimeout(60)
ip("link add x0 type veth peer name x1")
made, moved = os.pipe(), os.pipe()
child = os.fork()
if not child:
    # user namespaces aside, all that a container can unshare: CLONE_NEWNET, NEWUTS, NEWIPC, NEWCGROUP, NEWNS
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000 | 0x4000000 | 0x8000000 | 0x2000000 | 0x20000):
        print("unshare", ctypes.get_errno())
    os.write(made[1], b"x")
    os.read(moved[0], 1)
    ip("\n".join(f"link add k{number} type {kind}" for number, kind in enumerate(kinds)))
    sys.stdout.flush()
    os._exit(0)
os.read(made[0], 1)
ip(f"link set x1 netns {child}")
index = socket.if_nametoindex("x0")
os.write(moved[1], b"x")
os.waitpid(child, 0)
while True:
    data = events.recv(65536)
    if struct.unpack_from("=H", data, 4)[0] == 17 and struct.unpack_from("=i", data, 20)[0] == index: break
ip("link add x0 type bond")
print("the guest lives")
'
"#;

/// A container that has the node's programs at /node/usr, and capabilities.
fn with_programs(script: &str, capabilities: &[&str]) -> v1::ContainerConfig {
    let mut config = sh("main", script);
    config.mounts = vec![v1::Mount {
        host_path: "/usr".into(),
        container_path: "/node/usr".into(),
        readonly: true,
        ..Default::default()
    }];
    let add_capabilities = capabilities.iter().map(|&name| name.to_owned()).collect();
    let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.capabilities = Some(v1::Capability { add_capabilities, ..Default::default() });
    config
}

#[test]
fn kinds_of_links_queues_protocols_and_ciphers_of_a_node_work_in_a_pod() {
    on_node(async |node| {
        let pod = node.pod("kernel").await?;
        let (end, said) = pod.run_to_end(with_programs(CHECK, &["NET_ADMIN", "NET_RAW", "BPF"])).await?;
        ensure!(end.exit_code == 0 && said.is_empty(), "{said}\n{end:?}");
        Ok(())
    });
}

/// Containers in a pod, and CI in them, make namespaces and end them.
#[test]
fn guest_outlives_the_namespaces_that_a_container_makes_and_ends() {
    on_node(async |node| {
        let pod = node.pod("namespaces").await?;
        let (end, said) = pod.run_to_end(with_programs(END, &["SYS_ADMIN", "NET_ADMIN"])).await?;
        ensure!(end.exit_code == 0 && said == "the guest lives\n", "{said}\n{end:?}");
        Ok(())
    });
}
