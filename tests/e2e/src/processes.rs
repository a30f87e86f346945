//! What runs on the host for a pod.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use bulkhead_protocol::node::{ProcessRecord, RUN_ROOT, SHIM_RECORD, VMM_RECORD};

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
        Self::of_sandbox(&pod.id)
    }

    /// Those of a sandbox that the CRI need not know.
    pub fn of_sandbox(id: &str) -> Result<Self> {
        let directory = Path::new(RUN_ROOT).join("k8s.io").join(id);
        Ok(Self { shim: recorded(&directory.join(SHIM_RECORD))?, vmm: recorded(&directory.join(VMM_RECORD))? })
    }
}

/// The pid in a record of the shim's.
pub fn recorded(file: &Path) -> Result<u32> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let record: ProcessRecord = text.parse().with_context(|| format!("cannot read {}", file.display()))?;
    Ok(record.pid)
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
