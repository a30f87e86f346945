//! What a VMM counts of its devices: kicks, interrupts and requests since the machine was built. For measuring: nothing is decided
//! by these numbers, which are the VMM's word and partly the guest's.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What the device in a slot has counted.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceCounters {
    /// The slot, counted from 0 as the guest counts its virtio-mmio devices.
    pub slot: u8,
    /// Device ID (Virtual I/O Device 1.2, section 5).
    pub device: u32,
    /// Notifications by the driver, each of them an exit of a vCPU.
    pub kicks: u64,
    /// Interrupts for used buffers.
    pub interrupts: u64,
    /// Requests by kind, for devices that have kinds of requests; kinds that never came are left out.
    pub requests: Vec<RequestCounters>,
}

/// Requests of one kind.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RequestCounters {
    /// The opcode (include/uapi/linux/fuse.h); 0 for all that are unknown.
    pub kind: u32,
    /// How many there were.
    pub count: u64,
    /// Bytes from the guest, headers included.
    pub received: u64,
    /// Bytes to the guest, headers included.
    pub replied: u64,
}

/// A virtio device's usual name.
pub fn device_name(device: u32) -> &'static str {
    match device {
        1 => "net",
        2 => "block",
        3 => "console",
        4 => "rng",
        5 => "balloon",
        19 => "vsock",
        24 => "mem",
        26 => "fs",
        _ => "other",
    }
}

/// A FUSE request's name in the kernel's header, without FUSE_.
pub fn request_name(kind: u32) -> &'static str {
    const NAMES: [&str; 53] = [
        "OTHER",
        "LOOKUP",
        "FORGET",
        "GETATTR",
        "SETATTR",
        "READLINK",
        "SYMLINK",
        "OTHER",
        "MKNOD",
        "MKDIR",
        "UNLINK",
        "RMDIR",
        "RENAME",
        "LINK",
        "OPEN",
        "READ",
        "WRITE",
        "STATFS",
        "RELEASE",
        "OTHER",
        "FSYNC",
        "SETXATTR",
        "GETXATTR",
        "LISTXATTR",
        "REMOVEXATTR",
        "FLUSH",
        "INIT",
        "OPENDIR",
        "READDIR",
        "RELEASEDIR",
        "FSYNCDIR",
        "GETLK",
        "SETLK",
        "SETLKW",
        "ACCESS",
        "CREATE",
        "INTERRUPT",
        "BMAP",
        "DESTROY",
        "IOCTL",
        "POLL",
        "NOTIFY_REPLY",
        "BATCH_FORGET",
        "FALLOCATE",
        "READDIRPLUS",
        "RENAME2",
        "LSEEK",
        "COPY_FILE_RANGE",
        "SETUPMAPPING",
        "REMOVEMAPPING",
        "SYNCFS",
        "TMPFILE",
        "STATX",
    ];
    usize::try_from(kind).ok().and_then(|kind| NAMES.get(kind)).copied().unwrap_or("OTHER")
}

/// All counters by one name each, as in `fs.kicks`, `fs.requests` and `fs.LOOKUP`; devices of a kind are added up.
pub fn by_name(devices: &[DeviceCounters]) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::<String, u64>::new();
    let mut add = |name: String, count: u64| {
        let sum = sums.entry(name).or_default();
        *sum = sum.saturating_add(count);
    };
    for device in devices {
        let name = device_name(device.device);
        add(format!("{name}.kicks"), device.kicks);
        add(format!("{name}.interrupts"), device.interrupts);
        for request in &device.requests {
            add(format!("{name}.{}", request_name(request.kind)), request.count);
            add(format!("{name}.requests"), request.count);
            add(format!("{name}.received"), request.received);
            add(format!("{name}.replied"), request.replied);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{MAX_MESSAGE, Reply};

    fn request(kind: u32, count: u64) -> RequestCounters {
        RequestCounters { kind, count, received: count.saturating_mul(10), replied: count.saturating_mul(100) }
    }

    #[test]
    fn devices_of_a_kind_are_added_up_under_the_names_of_the_kernels_headers() {
        let fs = |slot, requests| DeviceCounters { slot, device: 26, kicks: 2, interrupts: 1, requests };
        let devices = [fs(0, vec![request(1, 3), request(52, 1)]), fs(1, vec![request(1, 1), request(4096, u64::MAX)])];
        let sums = by_name(&devices);
        let get = |name: &str| sums.get(name).copied();
        assert_eq!([get("fs.LOOKUP"), get("fs.STATX"), get("fs.kicks")], [Some(4), Some(1), Some(4)]);
        assert_eq!(get("fs.requests"), Some(u64::MAX), "no sum overflows");
        assert_eq!(get("fs.READ"), None);
    }

    #[test]
    fn names_are_the_kernels() {
        let names = [(15, "READ"), (16, "WRITE"), (26, "INIT"), (35, "CREATE"), (44, "READDIRPLUS"), (50, "SYNCFS")];
        for (kind, name) in names {
            assert_eq!(request_name(kind), name);
        }
    }

    #[test]
    fn all_counters_of_a_full_machine_fit_into_a_message() {
        let most = RequestCounters { kind: u32::MAX, count: u64::MAX, received: u64::MAX, replied: u64::MAX };
        let plain =
            DeviceCounters { slot: 255, device: 99, kicks: u64::MAX, interrupts: u64::MAX, requests: Vec::new() };
        let mut devices = vec![plain.clone(); 14];
        devices.extend(vec![DeviceCounters { requests: vec![most; 64], ..plain }; 2]);
        let reply = Reply::Counters { id: u64::MAX, devices };
        assert!(serde_json::to_vec(&reply).unwrap().len() < MAX_MESSAGE);
    }
}
