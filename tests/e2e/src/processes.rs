//! What runs on the host for a pod.

use std::fs;

use anyhow::{Context, Result};

use crate::TestPod;

/// A pod's processes, by their pids.
#[derive(Clone, Copy, Debug)]
pub struct Processes {
    /// The shim's daemon.
    pub shim: u32,
    /// The VMM.
    pub vmm: u32,
}

impl Processes {
    /// As the shim has noted them for `bulkhead check`.
    pub fn of(pod: &TestPod) -> Result<Self> {
        let noted = |name: &str| -> Result<u32> {
            let note = format!("/run/bulkhead/k8s.io/{}/{name}.pid", pod.id);
            let note = fs::read_to_string(&note).with_context(|| format!("cannot read {note}"))?;
            note.split(' ').next().and_then(|pid| pid.parse().ok()).with_context(|| format!("{note:?} is no pid"))
        };
        Ok(Self { shim: noted("shim")?, vmm: noted("vmm")? })
    }
}

/// What a process has in memory beside mappings as large as a guest's memory, in KiB: its share of what it shares counts
/// (Pss of proc_pid_smaps(5)).
pub fn own_kib(pid: u32) -> Result<u64> {
    let (mut sum, mut is_guest) = (0, false);
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let mut words = line.split_whitespace();
        match words.next().unwrap_or_default() {
            "Size:" => is_guest = words.next().unwrap_or_default().parse::<u64>()? >= 64 * 1024,
            "Pss:" if !is_guest => sum += words.next().unwrap_or_default().parse::<u64>()?,
            _ => {}
        }
    }
    Ok(sum)
}

/// How many descriptors a process has open.
pub fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}
