//! What KVM does not do.

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use vmm_sys_util::errno;

/// Names the ioctl that failed.
pub(super) fn call(name: &'static str) -> impl Fn(errno::Error) -> KvmError {
    move |source| KvmError::Call { name, source: source.into() }
}

/// KVM would not do what the machine needs.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The descriptor is something else, or a KVM from before Linux 2.6.22.
    #[error(
        "the descriptor handed over as /dev/kvm does not speak version {KVM_API_VERSION} of KVM's interface (it says {0})"
    )]
    NotKvm(i32),
    /// A capability is missing.
    #[error("this host's KVM lacks {0}; a newer kernel or a host with hardware virtualization is needed")]
    Missing(&'static str),
    /// The CPUID table has no room for the leaves that were added.
    #[error("this host's CPUID table has more than {KVM_MAX_CPUID_ENTRIES} entries")]
    CpuidFull,
    /// memfd_create(2) or mmap(2).
    #[error("cannot map the memory that can be plugged; is vm.max_map_count of the host too low?")]
    Hotplug(#[source] std::io::Error),
    /// mmap(2).
    #[error("cannot map a page for a slot's registers")]
    RegisterPage(#[source] std::io::Error),
    /// An ioctl failed.
    #[error("KVM refused {name}")]
    Call {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}
