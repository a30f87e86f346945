//! What keeps a machine from being built or changed.

use std::io;

use bulkhead_protocol::vmspec::MAX_VCPUS;

use super::slot::SlotError;
use crate::boot::BootError;
use crate::bus::BusError;
use crate::descriptors::DescriptorError;
use crate::devices::DeviceError;
use crate::jail::JailError;
use crate::kvm::KvmError;
use crate::layout::SLOTS;
use crate::memory::MemoryError;

/// A machine that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Too many or none.
    #[error("a guest with {0} vCPUs is not possible; give it 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    /// More than there are, or none.
    #[error("{boot} of {all} vCPUs cannot be online at boot; at least one and at most all can")]
    BootVcpus {
        /// Asked for.
        boot: u8,
        /// There are.
        all: u8,
    },
    /// More than the slots.
    #[error("{0} devices do not fit the machine's {SLOTS} slots")]
    TooManyDevices(usize),
    /// All are taken.
    #[error("all {SLOTS} slots of the machine are taken; remove a device or use fewer block volumes in the pod")]
    NoSlot,
    /// Beyond the last.
    #[error("there is no slot {0}; the machine has {SLOTS}")]
    UnknownSlot(u8),
    /// The spec and the descriptors.
    #[error(transparent)]
    Descriptors(#[from] DescriptorError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The layout, which is fixed.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A thread, a signal or an event descriptor.
    #[error("the host refused a thread, signal or event descriptor for the machine")]
    Host(#[source] io::Error),
}
