//! What shim and VMM say to each other, either of which may have been taken over, and the operator's configuration.

use bulkhead_protocol::control::{ControlError, MAX_MESSAGE, Reply, Request, receive, send};
use bulkhead_protocol::vmspec::VmSpec;
use bulkhead_shim::annotations;
use bulkhead_shim::config::{Config, Node, RawConfig};
use bulkhead_shim::sizing::Plan;
use bulkhead_vmm::boot::cmdline;
use bulkhead_vmm::layout::CMDLINE_MAX;
use bulkhead_vmm::memory::create_memory;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use serde_json::Value;

/// A packet on the control socket, read as either side does: a reply if the first byte is odd.
pub fn control_messages(data: &[u8]) {
    let (kind, packet) = data.split_first().unwrap_or((&0, &[]));
    if kind & 1 == 0 { both_ways::<Request>(packet) } else { both_ways::<Reply>(packet) }
}

/// What was understood is understood the same when it is sent again.
fn both_ways<T>(packet: &[u8])
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let (theirs, ours) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::send(&theirs, packet, SendFlags::empty()).unwrap();
    let Ok(Some((message, fds))) = receive::<T>(&ours) else { return };
    assert!(fds.is_empty() && packet.len() <= MAX_MESSAGE);
    match send(&theirs, &message, &[]) {
        Ok(()) => {}
        // Escapes can make it longer than it came.
        Err(ControlError::TooLarge) => return,
        Err(error) => panic!("what was received cannot be sent: {error}"),
    }
    let (again, _) = receive::<T>(&ours).unwrap().unwrap();
    assert_eq!(message, again);
}

/// A machine's spec as JSON, or a node's configuration as TOML if the first byte is odd, through all checks that need no
/// machine.
pub fn vmspec_config(data: &[u8]) {
    let (kind, text) = data.split_first().unwrap_or((&0, &[]));
    if kind & 1 == 0 {
        vmspec(text);
    } else if let Ok(text) = std::str::from_utf8(text) {
        config(text);
    }
}

fn vmspec(json: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<VmSpec>(json) else { return };
    let again = serde_json::to_vec(&spec).unwrap();
    assert_eq!(serde_json::from_slice::<VmSpec>(&again).unwrap(), spec);
    if let Ok(line) = cmdline::build(&spec) {
        assert!(line.as_bytes().len() < CMDLINE_MAX);
    }
    drop(create_memory(spec.memory_mib, spec.hotplug_mib));
}

/// A configuration, and a pod with annotations on the node that has it: what comes behind a line of dashes, as JSON.
fn config(text: &str) {
    let (toml, pod) = text.split_once("\n---\n").unwrap_or((text, "{}"));
    let Ok(raw) = toml::from_str::<RawConfig>(toml) else { return };
    let Ok(config) = Config::validate(raw, Node { cpus: 4, memory_mib: 8192 }) else { return };
    assert!((1..=config.max_vcpus).contains(&config.default_vcpus) && config.max_vcpus <= 64);
    let Ok(Value::Object(pod)) = serde_json::from_str(pod) else { return };
    let pod = pod.into_iter().filter_map(|(name, value)| Some((name, value.as_str()?.to_owned()))).collect();
    let _ = annotations::role(&pod);
    let Ok(request) = annotations::request(&pod, &config.annotations) else { return };
    let Ok(plan) = Plan::new(&config, &request) else { return };
    assert!((1..=config.max_vcpus).contains(&plan.vcpus) && (1..=plan.vcpus).contains(&plan.initial.cpus));
    assert!(plan.initial.plugged_mib <= plan.hotplug_mib && plan.boot_mib <= config.max_memory_mib);
}
