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

#[test]
fn kinds_of_links_queues_protocols_and_ciphers_of_a_node_work_in_a_pod() {
    on_node(async |node| {
        let pod = node.pod("kernel").await?;
        let mut config = sh("main", CHECK);
        config.mounts = vec![v1::Mount {
            host_path: "/usr".into(),
            container_path: "/node/usr".into(),
            readonly: true,
            ..Default::default()
        }];
        let linux = config.linux.get_or_insert_default();
        let security = linux.security_context.get_or_insert_default();
        let capabilities = ["NET_ADMIN", "NET_RAW", "BPF"].map(str::to_owned).to_vec();
        security.capabilities = Some(v1::Capability { add_capabilities: capabilities, ..Default::default() });
        let (end, said) = pod.run_to_end(config).await?;
        ensure!(end.exit_code == 0 && said.is_empty(), "{said}\n{end:?}");
        Ok(())
    });
}
