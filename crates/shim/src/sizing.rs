//! How large a pod's VM is: at boot, at most, and at any time in between by the limits of the containers that are in it.
//!
//! A VM boots with the configured memory, which is for the guest's kernel and for containers without a limit, and grows by
//! what its containers' limits come to in sum. It has a few CPUs, or as many as their limits or their requests come to if those
//! are more. All of it is arithmetic; [`crate::sandbox`] makes it so.

use std::collections::BTreeMap;

use bulkhead_protocol::huge_pages::page_kib;
use bulkhead_protocol::vmspec::HOTPLUG_UNIT_MIB;
use oci_spec::runtime::LinuxResources;

use crate::annotations::Request;
use crate::config::{Config, ConfigError, LEAST_MEMORY_MIB, bounded};

/// What the kubelet makes of a request for one CPU (MilliCPUToShares).
const SHARES_PER_CPU: u64 = 1024;

/// What it makes of a request for none: the least that cgroup v1 takes.
const LEAST_SHARES: u64 = 2;

/// Bytes of an image for each byte of the notes that the guest's kernel makes of its pages: 64 bytes for 4 KiB (struct page).
const IMAGE_BYTES_PER_NOTE: u64 = 64;

/// Bytes of such notes that the boot memory bears: those of 1 GiB of images. A memory block that is plugged for less would itself cost
/// as much.
const BORNE_NOTES: u64 = 16 << 20;

/// What a container may use; `None` for as much as there is.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub millicpus: Option<u64>,
    /// What is requested of CPUs, 1024 for each; 0 for nothing.
    pub shares: u64,
    /// Bytes.
    pub memory: Option<u64>,
    /// Bytes of huge pages by the size of a page in KiB. What is not named is none.
    pub huge_pages: BTreeMap<u64, u64>,
    /// Bytes of its image's layers, for each page of which the guest's kernel needs a note of its own.
    pub image_bytes: u64,
    /// CPUs of the host, as cpuset(7) lists them.
    pub host_cpus: Option<String>,
    /// How much sooner or later than others its processes are killed when there is no more memory (proc_pid_oom_score_adj(5)).
    pub oom_score_adj: i32,
}

impl Limits {
    /// What resources say.
    pub fn of(resources: &LinuxResources) -> Self {
        let mut limits = Self::default();
        limits.update(resources);
        limits
    }

    /// Takes over what an update says; what it does not mention stays.
    pub fn update(&mut self, resources: &LinuxResources) {
        if let Some(cpu) = resources.cpu() {
            if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
                let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
                self.millicpus = u64::try_from(quota).ok().map(|quota| quota.saturating_mul(1000).div_ceil(period));
            }
            if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
                self.shares = if shares > LEAST_SHARES { shares } else { 0 };
            }
            if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
                self.host_cpus = Some(cpus.clone());
            }
        }
        if let Some(limit) = resources.memory().as_ref().and_then(|memory| memory.limit()).filter(|limit| *limit != 0) {
            self.memory = u64::try_from(limit).ok();
        }
        for limit in resources.hugepage_limits().iter().flatten() {
            if let (Some(kib), Ok(bytes)) = (page_kib(limit.page_size()), u64::try_from(limit.limit())) {
                self.huge_pages.insert(kib, bytes);
            }
        }
    }

    /// What covers both.
    pub fn larger(&self, other: &Self) -> Self {
        let larger = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).max();
        let mut huge_pages = self.huge_pages.clone();
        for (kib, bytes) in &other.huge_pages {
            let entry = huge_pages.entry(*kib).or_default();
            *entry = (*entry).max(*bytes);
        }
        Self {
            millicpus: larger(self.millicpus, other.millicpus),
            shares: self.shares.max(other.shares),
            memory: larger(self.memory, other.memory),
            huge_pages,
            image_bytes: self.image_bytes.max(other.image_bytes),
            host_cpus: other.host_cpus.clone(),
            oom_score_adj: self.oom_score_adj.min(other.oom_score_adj),
        }
    }
}

/// How large a VM is at some time.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Target {
    /// CPUs that are online.
    pub cpus: u8,
    /// MiB beyond the boot memory.
    pub plugged_mib: u64,
    /// Huge pages by their size in KiB.
    pub huge_pages: BTreeMap<u64, u64>,
}

impl Target {
    /// What covers both.
    pub fn larger(&self, other: &Self) -> Self {
        let mut huge_pages = self.huge_pages.clone();
        for (kib, pages) in &other.huge_pages {
            let entry = huge_pages.entry(*kib).or_default();
            *entry = (*entry).max(*pages);
        }
        let plugged_mib = self.plugged_mib.max(other.plugged_mib);
        Self { cpus: self.cpus.max(other.cpus), plugged_mib, huge_pages }
    }
}

/// What a pod's VM is built for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Plan {
    /// vCPUs that exist.
    pub vcpus: u8,
    /// Memory at boot.
    pub boot_mib: u64,
    /// Memory that can be plugged.
    pub hotplug_mib: u64,
    /// As large as the pod's annotations let expect; containers make it more or less.
    pub initial: Target,
    default_vcpus: u8,
    /// The pod has chosen for itself.
    fixed_vcpus: bool,
    fixed_memory: bool,
    max_memory_mib: u64,
}

impl Plan {
    /// Plans a pod's VM.
    pub fn new(config: &Config, request: &Request) -> Result<Self, SizeError> {
        let own_vcpus = request.own_vcpus.map(|own| bounded("the pod's vCPUs", own, 1, u64::from(config.max_vcpus)));
        let own_vcpus = own_vcpus.transpose()?.and_then(|own| u8::try_from(own).ok());
        let boot_mib = request.own_memory_mib.unwrap_or(config.default_memory_mib);
        bounded("the pod's memory in MiB", boot_mib, LEAST_MEMORY_MIB, config.max_memory_mib)?;
        let most_mib = if request.own_memory_mib.is_some() {
            boot_mib
        } else {
            // No pod can use more than the node has; a limit beyond that is kept by the node.
            config.max_memory_mib.min(config.node.memory_mib)
        };
        let hotplug_mib = most_mib.saturating_sub(boot_mib) / HOTPLUG_UNIT_MIB * HOTPLUG_UNIT_MIB;
        let mut plan = Self {
            vcpus: own_vcpus.unwrap_or(config.max_vcpus),
            boot_mib,
            hotplug_mib,
            initial: Target::default(),
            default_vcpus: own_vcpus.unwrap_or(config.default_vcpus),
            fixed_vcpus: own_vcpus.is_some(),
            fixed_memory: request.own_memory_mib.is_some(),
            max_memory_mib: config.max_memory_mib,
        };
        let millicpus = request.cpus.map(|cpus| cpus.saturating_mul(1000));
        let all = Limits { millicpus, memory: request.memory, ..Limits::default() };
        plan.initial = plan.target([&all])?;
        Ok(plan)
    }

    /// How large the VM must be for these containers.
    pub fn target<'a>(&self, containers: impl IntoIterator<Item = &'a Limits>) -> Result<Target, SizeError> {
        let (mut millicpus, mut shares, mut bytes, mut images) = (0u64, 0u64, 0u64, 0u64);
        let mut huge_bytes = BTreeMap::<u64, u64>::new();
        for limits in containers {
            millicpus = millicpus.saturating_add(limits.millicpus.unwrap_or(0));
            shares = shares.saturating_add(limits.shares);
            bytes = bytes.saturating_add(limits.memory.unwrap_or(0));
            images = images.saturating_add(limits.image_bytes);
            for (kib, amount) in &limits.huge_pages {
                bytes = bytes.saturating_add(*amount);
                let sum = huge_bytes.entry(*kib).or_default();
                *sum = sum.saturating_add(*amount);
            }
        }
        let huge_pages = huge_bytes.into_iter().map(|(kib, bytes)| (kib, bytes / kib.max(1) / 1024)).collect();
        let notes = images / IMAGE_BYTES_PER_NOTE;
        if notes > BORNE_NOTES {
            bytes = bytes.saturating_add(notes);
        }
        let needed = bytes.div_ceil(1 << 20);
        if !self.fixed_memory && self.boot_mib.saturating_add(needed) > self.max_memory_mib {
            return Err(SizeError::Memory { needed, base: self.boot_mib, most: self.max_memory_mib });
        }
        // A limit beyond the CPUs there are is still kept by the container's own quota.
        let asked = millicpus.div_ceil(1000).max(shares.div_ceil(SHARES_PER_CPU));
        let cpus = if self.fixed_vcpus { self.default_vcpus.into() } else { asked };
        let cpus = u8::try_from(cpus).unwrap_or(u8::MAX).clamp(self.default_vcpus, self.vcpus);
        Ok(Target { cpus, plugged_mib: needed.min(self.hotplug_mib), huge_pages })
    }
}

/// Memory for what has no limit: steps that the guest asks for, beyond what its containers' limits need.
impl Plan {
    /// What is plugged on demand after one step more: so much that there is twice as much as before for what has no limit, but no
    /// more than `most_mib` in all with the `limits_mib` of the others. `None` if there is no more.
    pub fn step_up(&self, on_demand_mib: u64, limits_mib: u64, most_mib: u64) -> Option<u64> {
        let twice = self.boot_mib.saturating_add(on_demand_mib.saturating_mul(2));
        let room = most_mib.saturating_sub(self.boot_mib).min(self.hotplug_mib).saturating_sub(limits_mib);
        let whole = twice.next_multiple_of(HOTPLUG_UNIT_MIB).min(room / HOTPLUG_UNIT_MIB * HOTPLUG_UNIT_MIB);
        (whole > on_demand_mib).then_some(whole)
    }

    /// What is plugged on demand after one step less: half of what there was. `None` if that is nothing.
    pub fn step_down(&self, on_demand_mib: u64) -> Option<u64> {
        let half = (self.boot_mib.saturating_add(on_demand_mib) / 2).saturating_sub(self.boot_mib);
        let kept = half.next_multiple_of(HOTPLUG_UNIT_MIB);
        (kept < on_demand_mib).then_some(kept)
    }
}

/// A pod that is too large.
#[derive(Debug, thiserror::Error)]
pub enum SizeError {
    /// An annotation.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The sum of the limits.
    #[error(
        "the pod's memory limits come to {needed} MiB beside {base} MiB for the guest, but a pod on this node can have {most} MiB; lower the limits or raise max_memory_mib in /etc/bulkhead/config.toml"
    )]
    Memory {
        /// The limits' sum.
        needed: u64,
        /// The boot memory.
        base: u64,
        /// The ceiling.
        most: u64,
    },
}

#[cfg(test)]
mod tests;
