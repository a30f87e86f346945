//! Reading and attaching in network namespaces of their own, which takes root and ip(8). The redirect
//! itself needs kernel modules that not every build machine has; the test node has them.

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

#[tokio::test]
async fn cni_setup_is_read_for_the_guest() {
    let name = format!("bhtest-read-{}", std::process::id());
    let commands = [
        "link add eth0 type bridge",
        "link set eth0 mtu 1450 address 02:00:00:00:00:07 up",
        "addr add 10.22.0.5/24 dev eth0",
        "route add default via 10.22.0.1 dev eth0",
        "route add 169.254.1.1/32 dev eth0 scope link",
        "neigh add 10.22.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
    ];
    let netns = Netns::new(&name, &commands);
    let read = async || {
        let handle = netns::connect()?;
        let links = inspect::links(&handle).await?;
        inspect::network(&handle, &links).await
    };
    let network = netns::run_in(&netns.path(), read).await.unwrap().unwrap();
    let [eth0] = network.interfaces.as_slice() else { panic!("{:?}", network.interfaces) };
    assert_eq!((eth0.name.as_str(), eth0.mac.as_str(), eth0.mtu), ("eth0", "02:00:00:00:00:07", 1450));
    assert_eq!(eth0.addresses, ["10.22.0.5/24"]);
    let routes: Vec<_> = network.routes.iter().map(|r| (r.destination.as_str(), r.gateway.as_str(), r.scope)).collect();
    assert_eq!(routes, [("10.22.0.0/24", "", 253), ("169.254.1.1/32", "", 253), ("", "10.22.0.1", 0)]);
    assert_eq!(network.neighbours.len(), 1);
    assert_eq!(network.neighbours[0].mac, "02:00:00:00:00:01");
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
    let error = attach(PathBuf::from("/run/netns/none-such"), HashSet::new()).await.unwrap_err();
    assert!(error.to_string().contains("/run/netns/none-such"));
}

#[tokio::test]
async fn interfaces_of_the_node_are_never_touched() {
    // The first process's is out of sight of a test in a container.
    for path in ["/proc/1/ns/net", "/proc/self/ns/net"].into_iter().filter(|path| std::fs::metadata(path).is_ok()) {
        let attached = attach(path.into(), HashSet::new()).await;
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
    let up: Vec<_> = links(&path).await.unwrap().into_values().collect();
    assert!(up.len() >= 2 && up.contains(&true), "{up:?}");
    detach(&path, vec![1]).await.unwrap();
}

#[tokio::test]
async fn changes_of_links_are_told_until_nobody_listens() {
    let name = format!("bhtest-follow-{}", std::process::id());
    let netns = Netns::new(&name, &[]);
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let path = netns.path();
    let following = tokio::spawn(async move { netns::follow_links(&path, tell).await });
    told.recv().await.unwrap();
    assert!(run(&format!("ip -n {name} link add eth0 type bridge")));
    told.recv().await.unwrap();
    drop(told);
    following.await.unwrap().unwrap();
}

#[tokio::test]
async fn namespace_of_another_vm_is_refused_and_left_as_it_is() {
    let name = format!("bhtest-taken-{}", std::process::id());
    let netns = Netns::new(&name, &["link add eth0 type bridge"]);
    let make = async || {
        let handle = netns::connect().unwrap();
        let links = inspect::links(&handle).await.unwrap();
        tap::open(&format!("tap-{}", links[0].index)).unwrap()
    };
    let _tap = netns::run_in(&netns.path(), make).await.unwrap();
    let attached = attach(netns.path(), HashSet::new()).await;
    assert!(matches!(&attached, Err(NetworkError::Taken(name)) if name == "eth0"), "{attached:?}");
}
