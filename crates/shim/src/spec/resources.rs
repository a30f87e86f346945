//! What a container may use, rewritten for the guest (runtime-spec: config-linux.md, Control groups).
//!
//! Zero is Go's way to say nothing, and CRI-O and Docker write it for every limit that a pod does not set. runc takes it for
//! "not set", and so does this; of huge pages alone zero is an amount.

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Process, Spec};

use super::SpecError;
use crate::sizing::Limits;

/// As much as there is.
const UNLIMITED: i64 = -1;

/// Reads an update's resources.
pub fn parse(json: &[u8]) -> Result<LinuxResources, SpecError> {
    serde_json::from_slice(json).map_err(SpecError::Resources)
}

/// Rewrites an update's resources, to JSON.
pub fn translate(mut resources: LinuxResources) -> Result<Vec<u8>, SpecError> {
    strip(&mut resources);
    serde_json::to_vec(&resources).map_err(SpecError::Encode)
}

/// What a container may use.
pub fn limits(spec: &Spec) -> Limits {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let oom_score_adj = spec.process().as_ref().and_then(Process::oom_score_adj).unwrap_or(0);
    Limits { oom_score_adj, ..resources.map(Limits::of).unwrap_or_default() }
}

/// Drops what speaks of the host's CPUs, disks and cgroup v1 classes, and what says nothing.
pub fn strip(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        strip_cpu(cpu);
    }
    if let Some(memory) = resources.memory_mut() {
        strip_memory(memory);
    }
    if resources.pids().as_ref().is_some_and(|pids| pids.limit() == 0) {
        resources.set_pids(None);
    }
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
}

fn strip_cpu(cpu: &mut LinuxCpu) {
    cpu.set_cpus(None);
    cpu.set_mems(None);
    cpu.set_realtime_period(None);
    cpu.set_realtime_runtime(None);
    cpu.set_shares(cpu.shares().filter(|shares| *shares != 0));
    cpu.set_quota(cpu.quota().filter(|quota| *quota != 0));
    cpu.set_period(cpu.period().filter(|period| *period != 0));
}

fn strip_memory(memory: &mut LinuxMemory) {
    memory.set_reservation(memory.reservation().filter(|bytes| *bytes != 0));
    memory.set_swap(memory.swap().filter(|bytes| *bytes != 0));
    let limit = memory.limit().filter(|bytes| *bytes != 0);
    if memory.swap() == Some(UNLIMITED) {
        // Swap without a bound needs no limit of memory, but libcgroups wants one to be named; zero leaves that as it is.
        memory.set_limit(limit.or(Some(0)));
    } else {
        // A bound of swap is one of memory and swap together, and says nothing without that of memory.
        memory.set_swap(memory.swap().filter(|_| limit.is_some()));
        memory.set_limit(limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn translated(resources: &Value) -> Value {
        let resources = parse(resources.to_string().as_bytes()).unwrap();
        serde_json::from_slice(&translate(resources).unwrap()).unwrap()
    }

    #[test]
    fn zero_of_any_limit_is_not_set_but_of_huge_pages() {
        let out = translated(&json!({
            "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": ""},
            "memory": {"limit": 0, "reservation": 0, "swap": 0},
            "pids": {"limit": 0},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}],
        }));
        for set in ["/cpu/shares", "/cpu/quota", "/cpu/period", "/cpu/cpus", "/memory/limit", "/memory/swap", "/pids"] {
            assert!(out.pointer(set).is_none_or(Value::is_null), "{set}: {out}");
        }
        assert_eq!(out["hugepageLimits"][0]["limit"], 0);
    }

    #[test]
    fn what_is_set_beside_a_zero_stays() {
        let out = translated(&json!({
            "cpu": {"shares": 2, "quota": 50_000, "period": 0},
            "memory": {"limit": 1024, "swap": 0},
            "pids": {"limit": -1},
        }));
        assert_eq!((&out["cpu"]["quota"], &out["cpu"]["shares"]), (&json!(50_000), &json!(2)));
        assert_eq!((&out["memory"]["limit"], &out["pids"]["limit"]), (&json!(1024), &json!(-1)));
        let out = translated(&json!({"cpu": {"quota": -1, "period": 0}, "memory": {"limit": 0, "swap": -1}}));
        assert_eq!((&out["cpu"]["quota"], &out["memory"]), (&json!(-1), &json!({"limit": 0, "swap": -1})));
        assert_eq!(translated(&json!({"memory": {"swap": -1}}))["memory"], json!({"limit": 0, "swap": -1}));
    }

    #[test]
    fn swap_has_no_bound_without_one_of_memory() {
        for memory in [json!({"limit": 0, "swap": 5}), json!({"swap": 5})] {
            assert_eq!(translated(&json!({"memory": memory}))["memory"], json!({}));
        }
        let both = json!({"limit": 1000, "swap": 1500});
        assert_eq!(translated(&json!({"memory": both}))["memory"], both);
        let given = json!({"limit": 1000, "swap": 0, "reservation": 0});
        assert_eq!(translated(&json!({"memory": given}))["memory"], json!({"limit": 1000}));
    }
}
