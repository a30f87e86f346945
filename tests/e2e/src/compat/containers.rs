//! Containers and pods as the kubelet configures them.

use bulkhead_cli::cri::{self, v1};

/// The image of the cases: busybox, and `probe`, which makes system calls that busybox has no applet for.
pub const IMAGE: &str = "127.0.0.1:5000/compat:latest";

/// What the kubelet asks to mask unless procMount is Unmasked.
const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// What it asks to make read-only.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A container of the suite's image that runs a shell script, with what the kubelet says of every container.
pub fn shell(name: &str, script: &str) -> v1::ContainerConfig {
    let mut config = cri::container_config(name, IMAGE, &["/bin/sh", "-c", script]);
    let resources = v1::LinuxContainerResources { oom_score_adj: 1000, cpu_shares: 2, ..Default::default() };
    config.linux.get_or_insert_default().resources = Some(resources);
    security(&mut config).masked_paths = MASKED.map(str::to_owned).to_vec();
    security(&mut config).readonly_paths = READ_ONLY.map(str::to_owned).to_vec();
    config
}

/// The security context of a container's configuration.
pub fn security(config: &mut v1::ContainerConfig) -> &mut v1::LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

/// The security context of a pod's configuration.
pub fn pod_security(config: &mut v1::PodSandboxConfig) -> &mut v1::LinuxSandboxSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}
