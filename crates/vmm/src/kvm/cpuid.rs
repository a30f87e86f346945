//! What CPUID says in the guest: what the host and KVM support, with each vCPU's own place in the topology.
//!
//! One socket, one core per vCPU, no hyperthreads, APIC id = index. Intel SDM volume 2A (CPUID), AMD APM volume 3
//! appendix E, Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::KvmError;

/// A vCPU's place.
#[derive(Clone, Copy)]
pub struct Topology {
    /// Index and APIC id.
    pub id: u8,
    /// Number of vCPUs.
    pub count: u8,
}

impl Topology {
    /// Bits of an APIC id that tell the vCPUs apart.
    fn id_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }
}

/// Extended topology leaves, version 1 and 2. They are made anew.
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];
/// AMD's own extended topology leaf. It is left out: the others say all there is.
const AMD_TOPOLOGY_LEAF: u32 = 0x8000_0026;

/// Leaves that are left out as a whole: SGX, processor trace, performance monitoring, SVM's features, AMD's performance
/// monitoring.
const HIDDEN_LEAVES: [u32; 5] = [0xa, 0x12, 0x14, 0x8000_000a, 0x8000_0022];

/// Bits of a physical address (leaf 0x80000008); 36 for a processor that does not say.
pub fn address_bits(supported: &CpuId) -> u32 {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    leaf.map(|entry| entry.eax & 0xff).filter(|bits| *bits > 0).unwrap_or(36)
}

/// The table for one vCPU.
pub fn for_vcpu(supported: &CpuId, topology: Topology, deadline_timer: bool) -> Result<CpuId, KvmError> {
    let mut entries = Vec::with_capacity(supported.as_slice().len() + 4);
    for entry in supported.as_slice() {
        let made_anew = TOPOLOGY_LEAVES.contains(&entry.function) || entry.function == AMD_TOPOLOGY_LEAF;
        if made_anew || HIDDEN_LEAVES.contains(&entry.function) {
            continue;
        }
        let mut entry = *entry;
        hide(&mut entry);
        adjust(&mut entry, topology, deadline_timer);
        entries.push(entry);
    }
    let highest = entries.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for leaf in TOPOLOGY_LEAVES.into_iter().filter(|leaf| *leaf <= highest) {
        entries.extend(topology_leaf(leaf, topology));
    }
    CpuId::from_entries(&entries).map_err(|_| KvmError::CpuidFull)
}

/// Takes away what a pod has no use for and what much of KVM's history of holes is in: nested virtualization, enclaves,
/// performance counters and traces.
fn hide(entry: &mut kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        (1, _) => {
            set_bit(&mut entry.ecx, 5, false); // VMX
            set_bit(&mut entry.ecx, 15, false); // PDCM
        }
        (7, 0) => {
            set_bit(&mut entry.ebx, 2, false); // SGX
            set_bit(&mut entry.ebx, 25, false); // processor trace
            set_bit(&mut entry.ecx, 30, false); // SGX launch control
        }
        (0x8000_0001, _) => {
            set_bit(&mut entry.ecx, 2, false); // SVM
            set_bit(&mut entry.ecx, 23, false); // core performance counters
        }
        _ => {}
    }
}

/// Fits an entry of the host to the vCPU.
fn adjust(entry: &mut kvm_cpuid_entry2, topology: Topology, deadline_timer: bool) {
    let (id, count) = (u32::from(topology.id), u32::from(topology.count));
    match entry.function {
        // The extended topology leaf is always there.
        0 => entry.eax = entry.eax.max(0xb),
        1 => {
            entry.ebx = (entry.ebx & 0xffff) | (id << 24) | (count << 16);
            entry.ecx |= 1 << 31; // there is a hypervisor
            set_bit(&mut entry.ecx, 24, deadline_timer);
            set_bit(&mut entry.edx, 28, count > 1);
        }
        // Caches: the last level is everybody's, the others are each vCPU's own.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if (entry.eax >> 5) & 7 >= 3 { count - 1 } else { 0 };
            let cores = if entry.function == 4 { (1 << topology.id_bits()) - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores << 26);
        }
        0x8000_0008 => entry.ecx = (entry.ecx & !0xf0ff) | (topology.id_bits() << 12) | (count - 1),
        // One thread per core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Subleaves of an extended topology leaf: threads of a core, then cores of the package.
fn topology_leaf(function: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const SMT: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    let entry = |index, eax, ebx, kind| kvm_cpuid_entry2 {
        function,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | kind,
        edx: u32::from(topology.id),
        ..Default::default()
    };
    [entry(0, 0, 1, SMT), entry(1, topology.id_bits(), u32::from(topology.count), CORE), entry(2, 0, 0, 0)]
}

fn set_bit(word: &mut u32, bit: u32, on: bool) {
    *word = (*word & !(1 << bit)) | (u32::from(on) << bit);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    fn table(topology: Topology) -> Vec<kvm_cpuid_entry2> {
        let host = [leaf(0, 0x10), leaf(1, 0), leaf(0xb, 7), leaf(0x8000_0008, 0), leaf(0x8000_0026, 1)];
        for_vcpu(&CpuId::from_entries(&host).unwrap(), topology, true).unwrap().as_slice().to_vec()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for id in 0..3 {
            let table = table(Topology { id, count: 3 });
            let get = |function| table.iter().filter(move |e| e.function == function);
            assert_eq!(get(1).next().unwrap().ebx >> 16, (u32::from(id) << 8) | 3);
            assert!(get(0xb).count() == 3 && get(0xb).all(|e| e.edx == u32::from(id)));
            assert_eq!(get(0x8000_0008).next().unwrap().ecx, (2 << 12) | 2);
            assert_eq!(get(0x8000_0026).count(), 0);
        }
    }

    #[test]
    fn nested_virtualization_is_hidden() {
        let all = |function| kvm_cpuid_entry2 { function, ecx: u32::MAX, ..Default::default() };
        let host = [leaf(0, 0xd), all(1), all(0x8000_0001), all(0x8000_000a), all(0xa)];
        let table = for_vcpu(&CpuId::from_entries(&host).unwrap(), Topology { id: 0, count: 1 }, true).unwrap();
        let table = table.as_slice();
        assert!(table.iter().all(|e| e.function != 1 || e.ecx & (1 << 5) == 0));
        assert!(table.iter().all(|e| e.function != 0x8000_0001 || e.ecx & (1 << 2) == 0));
        assert!(table.iter().all(|e| ![0xa, 0x8000_000a].contains(&e.function)));
    }

    #[test]
    fn hypervisor_and_deadline_timer_are_announced() {
        let table = table(Topology { id: 0, count: 1 });
        let features = table.iter().find(|e| e.function == 1).unwrap();
        assert_eq!(features.ecx & ((1 << 31) | (1 << 24)), (1 << 31) | (1 << 24));
        assert_eq!(features.edx & (1 << 28), 0);
    }
}
