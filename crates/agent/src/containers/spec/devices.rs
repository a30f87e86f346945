//! The guest's devices, for a container that may use every device: a privileged one, or one whose rules say so.
//! As on runc, which gives a privileged container the host's: every node below /dev that is not the container's own business.

use std::fs::{Metadata, read_dir};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use crate::sys;

/// Where the guest's kernel keeps the nodes of its devices (devtmpfs).
const DEV: &str = "/dev";

// The kernel gives its nodes to root alone, and on a host udev corrects that (systemd: rules.d/50-udev-default.rules).
/// Devices that everyone may open, since what can be done with them is looked at then.
const WORLD_ACCESSIBLE: [&str; 3] = ["/dev/fuse", "/dev/net/tun", "/dev/vsock"];

/// Group of block devices and of what makes them (Debian: base-passwd, group disk).
const DISK_GROUP: u32 = 6;
/// Makes block devices.
const LOOP_CONTROL: &str = "/dev/loop-control";

/// Loop devices that a container which may use every device finds, as on a host (`max_loop` of the driver).
const LOOP_DEVICES: u32 = 8;

/// What every container has of its own: nodes that libcontainer makes, its terminals, its shared memory.
const CONTAINERS_OWN: [&str; 12] =
    ["null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts", "shm", "mqueue", "hugepages"];

/// Adds the guest's devices to a container's, if its last rule lets it use them all and its /dev is a file system of its own.
pub fn provide(spec: &mut Spec) {
    if !may_use_all(spec) {
        return;
    }
    // They take memory and time, so that only those pay who can use them.
    if let Err(error) = sys::add_loop_devices(LOOP_DEVICES) {
        tracing::warn!(%error, "a container that may use every device has no loop devices");
    }
    add_all(spec);
}

fn may_use_all(spec: &Spec) -> bool {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let own_dev = mounts.iter().any(|one| one.destination() == Path::new(DEV) && one.typ().as_deref() == Some("tmpfs"));
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    own_dev && rules.last().is_some_and(allows_everything)
}

fn add_all(spec: &mut Spec) {
    let Some(linux) = spec.linux_mut() else { return };
    let mut devices = linux.devices().clone().unwrap_or_default();
    // What cannot be looked at is left out: it went away, with its disk.
    let mut found = Vec::new();
    let _ = collect(Path::new(DEV), &mut found);
    found.retain(|device| !devices.iter().any(|named| named.path() == device.path()));
    devices.append(&mut found);
    linux.set_devices(Some(devices));
}

fn allows_everything(rule: &LinuxDeviceCgroup) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number == -1);
    rule.allow()
        && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
        && any(rule.major())
        && any(rule.minor())
        && rule.access().as_deref().is_none_or(|access| ['r', 'w', 'm'].iter().all(|right| access.contains(*right)))
}

fn collect(dir: &Path, found: &mut Vec<LinuxDevice>) -> io::Result<()> {
    for entry in read_dir(dir)?.flatten() {
        let path = entry.path();
        if dir == Path::new(DEV) && CONTAINERS_OWN.iter().any(|own| entry.file_name() == *own) {
            continue;
        }
        let Ok(meta) = entry.metadata() else { continue };
        if meta.is_dir() {
            let _ = collect(&path, found);
        } else {
            found.extend(device(&path, &meta));
        }
    }
    Ok(())
}

/// `None` for what is no device.
fn device(path: &Path, meta: &Metadata) -> Option<LinuxDevice> {
    let kind = match meta.file_type() {
        kind if kind.is_block_device() => LinuxDeviceType::B,
        kind if kind.is_char_device() => LinuxDeviceType::C,
        _ => return None,
    };
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    let (mode, gid) = if WORLD_ACCESSIBLE.iter().any(|known| path == Path::new(known)) {
        (0o666, meta.gid())
    } else if kind == LinuxDeviceType::B || path == Path::new(LOOP_CONTROL) {
        (0o660, DISK_GROUP)
    } else {
        (meta.mode() & 0o7777, meta.gid())
    };
    let builder = LinuxDeviceBuilder::default().path(path).typ(kind).major(major).minor(minor);
    builder.file_mode(mode).uid(meta.uid()).gid(gid).build().ok()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn devices(rules: Value, mounts: Value) -> Vec<LinuxDevice> {
        let named = json!([{ "type": "c", "path": "/dev/kmsg", "major": 4000, "minor": 1 }]);
        let linux = json!({ "devices": named, "resources": { "devices": rules } });
        let mut spec: Spec =
            serde_json::from_value(json!({ "ociVersion": "1.0.2", "mounts": mounts, "linux": linux })).unwrap();
        if may_use_all(&spec) {
            add_all(&mut spec);
        }
        spec.linux().as_ref().unwrap().devices().clone().unwrap()
    }

    #[test]
    fn who_may_use_every_device_has_all_nodes_and_who_may_not_has_none() {
        let dev = json!([{ "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }]);
        let all = json!([{ "allow": false, "access": "rwm" }, { "allow": true, "access": "rwm" }]);
        let given = devices(all.clone(), dev.clone());
        assert!(given.len() > 1, "this machine has devices");
        assert_eq!(given.iter().filter(|device| device.path() == Path::new("/dev/kmsg")).count(), 1);
        assert!(
            given.iter().all(|device| !CONTAINERS_OWN.iter().any(|own| device.path() == &Path::new(DEV).join(own)))
        );
        let mut for_everyone =
            given.iter().filter(|device| WORLD_ACCESSIBLE.iter().any(|known| device.path() == Path::new(known)));
        assert!(for_everyone.all(|device| device.file_mode() == Some(0o666)));
        let mut disks = given.iter().filter(|device| device.typ() == LinuxDeviceType::B);
        assert!(disks.all(|device| (device.file_mode(), device.gid()) == (Some(0o660), Some(DISK_GROUP))));
        for some in [
            json!([{ "allow": true, "access": "rwm" }, { "allow": false, "access": "rwm" }]),
            json!([{ "allow": true, "access": "rw" }]),
            json!([{ "allow": true, "type": "c", "access": "rwm" }]),
            json!([{ "allow": true, "major": 1, "access": "rwm" }]),
            json!([]),
        ] {
            assert_eq!(devices(some, dev.clone()).len(), 1);
        }
        assert_eq!(devices(all, json!([])).len(), 1, "a /dev of the image");
    }
}
