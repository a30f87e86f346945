//! `ctr run`: a container with no pod around it gets a guest of its own.

use anyhow::ensure;
use bulkhead_e2e::{BUSYBOX, node_command, on_node};

use crate::{BOOT_ID, node_boot_id};

fn ctr(arguments: &[&str]) -> anyhow::Result<String> {
    node_command("ctr", &[&["-n", "k8s.io"], arguments].concat())
}

#[test]
fn ctr_run_runs_in_a_guest() {
    on_node(async |_| {
        let runtime = "io.containerd.bulkhead.v2";
        let out = ctr(&["run", "--rm", "--runtime", runtime, BUSYBOX, "lonely", "/bin/sh", "-c", BOOT_ID])?;
        ensure!(out.trim().len() == 36 && out.trim() != node_boot_id()?, "{out}");
        Ok(())
    });
}

#[test]
fn ctr_run_reports_the_exit_code() {
    on_node(async |_| {
        let runtime = "io.containerd.bulkhead.v2";
        let failed = ctr(&["run", "--rm", "--runtime", runtime, BUSYBOX, "failing", "/bin/sh", "-c", "exit 4"]);
        let again = ctr(&["run", "--rm", "--runtime", runtime, BUSYBOX, "failing", "/bin/sh", "-c", "exit 0"]);
        ensure!(failed.is_err() && again.is_ok(), "{failed:?} {again:?}");
        Ok(())
    });
}

/// What cannot be had is refused before a VM is made for it, here of a VMM that is not there, and with a remedy in the words of
/// who has asked.
#[test]
fn ctr_run_with_devices_of_the_host_is_refused_without_a_vm() {
    on_node(async |_| {
        let config = std::env::temp_dir().join("bulkhead-no-vmm.toml");
        std::fs::write(&config, "vmm = '/nonexistent/vmm'\n")?;
        let config = config.display().to_string();
        let run = ["run", "--rm", "--runtime", "io.containerd.bulkhead.v2", "--runtime-config-path", &config];
        for asked in [&["--privileged"][..], &["--device", "/dev/kmsg"]] {
            let rest = [BUSYBOX, "devices", "/bin/true"];
            let said = ctr(&[&run, asked, &rest].concat()).err().map(|error| error.to_string()).unwrap_or_default();
            ensure!(said.contains("the container is given the host's device \"/dev/"), "{asked:?}: {said}");
            ensure!(said.contains("leave it out of --device") && !said.contains("configuration"), "{asked:?}: {said}");
            let _ = ctr(&["containers", "rm", "devices"]);
        }
        std::fs::remove_file(config)?;
        Ok(())
    });
}

/// A network namespace with two interfaces, as a CNI with a second network makes it; gone with the value.
struct TwoNetworks;

impl TwoNetworks {
    const NAME: &str = "two-networks";

    fn new() -> anyhow::Result<Self> {
        node_command("ip", &["netns", "add", Self::NAME])?;
        let networks = Self;
        for (host, guest, net, mtu) in [("two0", "eth0", 98, "1500"), ("two1", "net1", 99, "1400")] {
            for line in [
                format!("link add {host} mtu {mtu} type veth peer name {guest} mtu {mtu} netns {}", Self::NAME),
                format!("link set {host} up"),
                format!("addr add 10.{net}.0.1/24 dev {host}"),
                format!("addr add fd{net}::1/64 dev {host} nodad"),
                format!("-n {} link set {guest} up", Self::NAME),
                format!("-n {} addr add 10.{net}.0.2/24 dev {guest}", Self::NAME),
                format!("-n {} addr add fd{net}::2/64 dev {guest} nodad", Self::NAME),
            ] {
                ip(&line)?;
            }
        }
        ip(&format!("-n {} route add default via 10.98.0.1", Self::NAME))?;
        Ok(networks)
    }
}

impl Drop for TwoNetworks {
    fn drop(&mut self) {
        // Takes the interfaces and their peers along.
        let _ = node_command("ip", &["netns", "del", Self::NAME]);
    }
}

fn ip(line: &str) -> anyhow::Result<String> {
    node_command("ip", &line.split(' ').collect::<Vec<_>>())
}

#[test]
fn every_interface_of_the_namespace_reaches_the_guest() {
    on_node(async |_| {
        let _networks = TwoNetworks::new()?;
        let namespace = format!("network:/run/netns/{}", TwoNetworks::NAME);
        let runtime = "io.containerd.bulkhead.v2";
        let script =
            "ip addr; ip route; for to in 10.98.0.1 fd98::1 10.99.0.1 fd99::1; do ping -c 1 -W 20 $to || exit 1; done";
        let command =
            ["run", "--rm", "--with-ns", &namespace, "--runtime", runtime, BUSYBOX, "two", "/bin/sh", "-c", script];
        let out = ctr(&command)?;
        for word in
            ["10.98.0.2/24", "10.99.0.2/24", "fd98::2/64", "fd99::2/64", "mtu 1400", "default via 10.98.0.1 dev eth0"]
        {
            ensure!(out.contains(word), "no {word:?} in {out}");
        }
        let left = ip(&format!("-n {} -brief link", TwoNetworks::NAME))?;
        ensure!(left.lines().count() == 3, "the namespace has more than lo, eth0 and net1: {left}");
        let filters = node_command("tc", &["-n", TwoNetworks::NAME, "qdisc", "show", "dev", "eth0"])?;
        ensure!(!filters.contains("ingress"), "the redirect is still there: {filters}");
        Ok(())
    });
}
