//! The end-to-end suites; they run in the test node (`make test-node`), one test at a time.

mod block;
mod chaos;
mod clock;
mod cni;
mod cni_setup;
mod codes;
mod coherence;
mod contract;
mod counters;
mod crio;
mod dead_shims;
mod docker;
mod escape;
mod exec;
mod failure;
mod firewall;
mod flood;
mod growth;
mod guest_hostile;
mod jail;
mod kernel;
mod layers;
mod liar;
mod lifecycle;
mod locks;
mod mounts;
mod namespaces;
mod network;
mod port_forward;
mod power_cut;
mod refusal;
mod resize;
mod resources;
mod restart;
mod root_files;
mod soak;
mod standalone;
mod stuck;
mod throttled;
mod throughput;
mod unusual_specs;
mod user_namespace;
mod volumes;

/// A file of the node, trimmed.
fn read(path: &str) -> anyhow::Result<String> {
    use anyhow::Context;
    Ok(std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?.trim().to_owned())
}

/// The boot id of the node's kernel.
fn node_boot_id() -> anyhow::Result<String> {
    read("/proc/sys/kernel/random/boot_id")
}

/// The command that prints a kernel's boot id.
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";
