//! The machine that the VMM is asked to build, and the descriptors that come with it.
//!
//! A [`VmSpec`] names no path: every file, tap and pipe is an [`FdIndex`] into the descriptors that arrive in the same
//! message (ARCHITECTURE.md, D1: the VMM opens nothing).

use serde::{Deserialize, Serialize};

/// Most vCPUs of a machine.
pub const MAX_VCPUS: u8 = 64;

/// Unit in MiB of the memory that can be plugged: what Linux manages it in (its memory block).
pub const HOTPLUG_UNIT_MIB: u64 = 128;

/// Index into the descriptors of the message that carries the spec.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(transparent)]
pub struct FdIndex(pub usize);

/// A virtual machine.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// `/dev/kvm`.
    pub kvm: FdIndex,
    /// An uncompressed ELF kernel with a PVH note.
    pub kernel: FdIndex,
    /// An initramfs.
    pub initramfs: Option<FdIndex>,
    /// Kernel parameters beyond those that the VMM itself needs.
    pub cmdline: String,
    /// vCPUs that exist, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// vCPUs that are online when the guest boots; the agent brings up the others. 1 to `vcpus`.
    pub boot_vcpus: u8,
    /// Boot memory in MiB.
    pub memory_mib: u64,
    /// Memory in MiB by which a [`DeviceSpec::Memory`] can grow the guest, a multiple of
    /// [`HOTPLUG_UNIT_MIB`]; 0 for none.
    #[serde(default)]
    pub hotplug_mib: u64,
    /// Devices, in slot order.
    pub devices: Vec<DeviceSpec>,
    /// A 8250 serial port on COM1 whose output goes to this descriptor; for debugging a kernel that dies early.
    #[serde(default)]
    pub serial: Option<FdIndex>,
}

/// Ids of users and groups that have other numbers in the guest than on the host's disks.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IdMaps {
    /// Of users.
    pub uids: Vec<IdMap>,
    /// Of groups.
    pub gids: Vec<IdMap>,
}

/// A range of ids. Those of no range are the same on both sides.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IdMap {
    /// The first in the guest.
    pub guest: u32,
    /// The same on the host.
    pub host: u32,
    /// How many.
    pub count: u32,
}

/// An image of a read-only file system.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// A regular file, opened for reading alone.
    pub file: FdIndex,
    /// Its size in bytes, which it has to have.
    pub size: u64,
}

/// A virtio device in a slot.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case", tag = "type")]
pub enum DeviceSpec {
    /// virtio-balloon, for free page reporting alone: what the guest does not use goes back to the host.
    Balloon,
    /// virtio-blk over a raw image or block device. The format is never probed.
    Block {
        /// The image, opened for writing unless `read_only`.
        file: FdIndex,
        /// Refuse writes.
        read_only: bool,
        /// Serial number that the guest reads, 20 bytes at most.
        serial: String,
    },
    /// virtio-console with one port; what the guest writes goes to the descriptor, the rest of a flood is dropped.
    Console {
        /// A pipe, socket or file; written without blocking where the kernel allows.
        output: FdIndex,
    },
    /// virtio-fs.
    Fs {
        /// Mount tag, 36 bytes at most.
        tag: String,
        /// Directory that is exported.
        root: FdIndex,
        /// Owners of files that the guest knows by other ids.
        #[serde(default)]
        ids: IdMaps,
        /// Nobody but the guest changes its containers' root file systems (`<container id>/rootfs`), so that it may keep what
        /// it knows of them.
        #[serde(default)]
        private_roots: bool,
    },
    /// virtio-mem over the spec's `hotplug_mib`; later sizes come by [`crate::control::Command::ResizeMemory`].
    Memory {
        /// MiB that the guest is to plug when it boots.
        requested_mib: u64,
    },
    /// virtio-net over a tap.
    Net {
        /// A tap device opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; the VMM sets its offloads and header size.
        tap: FdIndex,
        /// MAC address, six bytes.
        mac: [u8; 6],
        /// MTU that the guest is told (VIRTIO_NET_F_MTU).
        mtu: u16,
    },
    /// virtio-pmem over images of read-only file systems, behind each other as [`crate::images`] says: memory of the host's page
    /// cache that the guest can read and nobody can write.
    Pmem {
        /// The images, 1 to [`crate::images::MAX_IMAGES`].
        images: Vec<Image>,
    },
    /// virtio-rng from getrandom(2).
    Rng,
    /// virtio-vsock; connections are started by [`crate::control::Command::ConnectVsock`].
    Vsock,
}
