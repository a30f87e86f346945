//! What is counted of a pod's VM: by its VMM, which the shim tells, and by KVM in debugfs (Linux: virt/kvm/kvm_main.c,
//! arch/x86/kvm/x86.c, kvm_vcpu_stats_desc).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bulkhead_cli::counters::PodCounters;
use bulkhead_protocol::counters::by_name;
use bulkhead_protocol::node::RUN_ROOT;

use super::results::Counts;

/// Has a directory for each VM, with a file for each number. A vCPU's numbers are in it as sums over the VM's vCPUs.
const KVM: &str = "/sys/kernel/debug/kvm";

/// All exits; those to the VMM for a device's register and for a port; of a vCPU with nothing to do; interrupts that came in.
const STATS: [&str; 5] = ["exits", "mmio_exits", "io_exits", "halt_exits", "irq_injections"];

/// Where KVM's numbers are, if debugfs can be had.
pub fn mount_debugfs() -> Result<()> {
    if !Path::new(KVM).exists() && Path::new("/sys/kernel/debug").exists() {
        crate::node_command("mount", &["-t", "debugfs", "debugfs", "/sys/kernel/debug"])?;
    }
    Ok(())
}

/// The directories of the VMs that are there.
pub fn machines() -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(KVM).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| path.is_dir()).collect()
}

/// The counters of one pod.
pub struct Counters {
    vmm: PodCounters,
    kvm: Option<PathBuf>,
}

impl Counters {
    /// Those of the one pod that was started since `machines` were there. A directory has the name of a process as the kernel's
    /// first pid namespace has it, which may be another one here.
    pub async fn of(pod: &str, machines: &BTreeSet<PathBuf>) -> Result<Self> {
        let vmm = PodCounters::connect(&Path::new(RUN_ROOT).join("k8s.io").join(pod)).await?;
        let mut new = self::machines();
        new.retain(|machine| !machines.contains(machine));
        let kvm = new.pop_first().filter(|_| new.is_empty());
        if kvm.is_none() {
            println!("bench: no single directory of the pod's in {KVM}: exits are not counted");
        }
        Ok(Self { vmm, kvm })
    }

    /// All of them, as they are now.
    pub async fn read(&self) -> Result<Counts> {
        let mut counts = by_name(&self.vmm.read().await?);
        let Some(machine) = &self.kvm else { return Ok(counts) };
        for name in STATS {
            let file = machine.join(name);
            let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            counts.insert(format!("kvm.{name}"), text.trim().parse().with_context(|| format!("{name}: {text:?}"))?);
        }
        Ok(counts)
    }
}

/// What has come in between. What has not is 0, so that it shows when it comes.
pub fn difference(before: &Counts, after: &Counts) -> Counts {
    let since =
        |(name, count): (&String, &u64)| (name.clone(), count.saturating_sub(before.get(name).copied().unwrap_or(0)));
    after.iter().map(since).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn difference_has_what_was_not_there_before() {
        let counts = |pairs: &[(&str, u64)]| pairs.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect();
        let (before, after) = (counts(&[("a", 3), ("b", 1)]), counts(&[("a", 5), ("b", 1), ("c", 2)]));
        assert_eq!(difference(&before, &after), counts(&[("a", 2), ("b", 0), ("c", 2)]));
    }
}
