//! Devices that a container's spec names by numbers of the host. Block devices become disks of the guest; what every guest
//! has under the same numbers stays; any other device of the host is out of a guest's reach and refused.

use std::fmt;

use oci_spec::runtime::{Capability, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Mount, Spec};

use super::{Asker, SpecError};

/// Character devices that every kernel has, by the same numbers (Documentation/admin-guide/devices.txt), and that behave the
/// same: a bind of one means the guest's own. They are also the ones that every container has.
pub(super) const COMMON_DEVICES: [(&str, (i64, i64)); 6] = [
    ("/dev/null", (1, 3)),
    ("/dev/zero", (1, 5)),
    ("/dev/full", (1, 7)),
    ("/dev/random", (1, 8)),
    ("/dev/urandom", (1, 9)),
    ("/dev/tty", (5, 0)),
];

/// Those that every guest has beside, by the same numbers: ptmx, tun, fuse.
const GUEST_DEVICES: [(i64, i64); 3] = [(5, 2), (10, 200), (10, 229)];

/// A device's number.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct DeviceNumber {
    /// The driver's.
    pub major: u32,
    /// The device's.
    pub minor: u32,
}

impl DeviceNumber {
    /// From the form that stat(2) has it in.
    pub fn of(raw: u64) -> Self {
        Self { major: rustix::fs::major(raw), minor: rustix::fs::minor(raw) }
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A block device of the host that a container wants.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HostDisk {
    /// Its number on the host.
    pub number: DeviceNumber,
    /// Whether a rule lets the container write to it.
    pub writable: bool,
}

/// A block device of the host that is a disk of the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GuestDisk {
    /// Its number on the host.
    pub host: DeviceNumber,
    /// Its number in the guest.
    pub guest: DeviceNumber,
}

/// The block devices that a spec names, each once.
pub fn disks(spec: &Spec) -> Result<Vec<HostDisk>, SpecError> {
    let linux = spec.linux().as_ref();
    let devices = linux.and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let mut disks: Vec<HostDisk> = Vec::new();
    for device in devices {
        let refused = || SpecError::Device(device.path().clone(), Asker::of(spec));
        match device.typ() {
            LinuxDeviceType::B => {
                let number = number(device.major(), device.minor()).ok_or_else(refused)?;
                if !disks.iter().any(|disk| disk.number == number) {
                    disks.push(HostDisk { number, writable: is_writable(rules, number) });
                }
            }
            LinuxDeviceType::C | LinuxDeviceType::U if is_the_guests(device) => {}
            LinuxDeviceType::P => {}
            _ => return Err(refused()),
        }
    }
    Ok(disks)
}

/// Whether every guest has this character device.
fn is_the_guests(device: &LinuxDevice) -> bool {
    let common = COMMON_DEVICES.iter().map(|(_, number)| number);
    common.chain(&GUEST_DEVICES).any(|number| *number == (device.major(), device.minor()))
}

fn number(major: i64, minor: i64) -> Option<DeviceNumber> {
    Some(DeviceNumber { major: u32::try_from(major).ok()?, minor: u32::try_from(minor).ok()? })
}

/// Whether the last rule about writing to a device allows it.
fn is_writable(rules: &[LinuxDeviceCgroup], device: DeviceNumber) -> bool {
    let same = |rule: Option<i64>, number: u32| rule.is_none_or(|rule| rule == -1 || rule == i64::from(number));
    let about = |rule: &&LinuxDeviceCgroup| {
        matches!(rule.typ(), None | Some(LinuxDeviceType::A | LinuxDeviceType::B))
            && same(rule.major(), device.major)
            && same(rule.minor(), device.minor)
            && rule.access().as_deref().is_none_or(|access| access.contains('w'))
    };
    rules.iter().rev().find(about).is_some_and(LinuxDeviceCgroup::allow)
}

/// Gives the disks of a spec the numbers that they have in the guest, in the devices and in the rules about them. A rule
/// about any other block device of the host would be about a disk of the guest that happens to have its number.
pub fn renumber(spec: &mut Spec, disks: &[GuestDisk]) {
    let Some(linux) = spec.linux_mut() else { return };
    let guest = |major: Option<i64>, minor: Option<i64>| {
        let host = number(major?, minor?)?;
        disks.iter().find(|disk| disk.host == host).map(|disk| disk.guest)
    };
    for device in linux.devices_mut().iter_mut().flatten().filter(|device| device.typ() == LinuxDeviceType::B) {
        if let Some(number) = guest(Some(device.major()), Some(device.minor())) {
            set_number(device, number);
        }
    }
    let rules = linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().as_mut());
    let Some(rules) = rules else { return };
    rules.retain_mut(|rule| {
        let any = rule.major().is_none_or(|major| major == -1);
        if any || rule.typ() != Some(LinuxDeviceType::B) {
            return true;
        }
        let Some(number) = guest(rule.major(), rule.minor()) else { return false };
        rule.set_major(Some(number.major.into())).set_minor(Some(number.minor.into()));
        true
    });
}

/// Lets a privileged container use all devices, which are its guest's: with `privileged_without_host_devices` CRI implementations
/// leave the rules as those of any container. The agent makes the nodes.
pub fn open_to_privileged(spec: &mut Spec) {
    if !is_privileged(spec) {
        return;
    }
    let Some(linux) = spec.linux_mut() else { return };
    let mut all = LinuxDeviceCgroup::default();
    all.set_allow(true).set_access(Some("rwm".into()));
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    rules.push(all);
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
}

/// Leaves out the host's devices that an engine lists for a privileged container without a pod (`docker run --privileged`): what
/// the guest has of its own the agent gives it, and the rest is left out as with `privileged_without_host_devices`. Of a pod's
/// container it is not: a block device may be a volume of its.
pub fn leave_out_hosts(spec: &mut Spec) {
    let privileged = is_privileged(spec);
    let Some(linux) = spec.linux_mut() else { return };
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_ref());
    if !privileged || !rules.and_then(|rules| rules.last()).is_some_and(allows_everything) {
        return;
    }
    if let Some(devices) = linux.devices_mut() {
        devices.retain(|device| match device.typ() {
            LinuxDeviceType::C | LinuxDeviceType::U => is_the_guests(device),
            LinuxDeviceType::P => true,
            _ => false,
        });
    }
}

fn allows_everything(rule: &LinuxDeviceCgroup) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number == -1);
    let rights = |access: &str| ['r', 'w', 'm'].iter().all(|right| access.contains(*right));
    rule.allow()
        && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
        && any(rule.major())
        && any(rule.minor())
        && rule.access().as_deref().is_none_or(rights)
}

/// No part of a spec says so. But only a privileged container may administer the system and has a /sys that it can write to.
fn is_privileged(spec: &Spec) -> bool {
    let sys = |mount: &Mount| mount.typ().as_deref() == Some("sysfs");
    let writable = |mount: &Mount| !mount.options().iter().flatten().any(|option| option == "ro");
    let capabilities = spec.process().as_ref().and_then(|process| process.capabilities().as_ref());
    let bounding = capabilities.and_then(|sets| sets.bounding().as_ref());
    bounding.is_some_and(|set| set.contains(&Capability::SysAdmin))
        && spec.mounts().iter().flatten().any(|mount| sys(mount) && writable(mount))
}

fn set_number(device: &mut LinuxDevice, number: DeviceNumber) {
    device.set_major(number.major.into()).set_minor(number.minor.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(devices: Value, rules: Value) -> Spec {
        let linux = json!({"devices": devices, "resources": {"devices": rules}});
        serde_json::from_value(json!({"ociVersion": "1.0.2", "linux": linux})).unwrap()
    }

    fn device(kind: &str, path: &str, major: i64, minor: i64) -> Value {
        json!({"type": kind, "path": path, "major": major, "minor": minor, "fileMode": 0o660, "uid": 0, "gid": 6})
    }

    fn rule(allow: bool, kind: &str, major: i64, minor: i64, access: &str) -> Value {
        json!({"allow": allow, "type": kind, "major": major, "minor": minor, "access": access})
    }

    #[test]
    fn disk_is_writable_if_the_last_rule_about_it_says_so() {
        let devices = json!([device("b", "/dev/xvda", 7, 0), device("b", "/dev/xvdb", 7, 1), device("b", "/a", 7, 0)]);
        let rules =
            json!([{"allow": false, "access": "rwm"}, rule(true, "b", 7, 0, "rwm"), rule(true, "b", 7, 1, "rm")]);
        let disk = |minor, writable| HostDisk { number: DeviceNumber { major: 7, minor }, writable };
        assert_eq!(disks(&spec(devices, rules)).unwrap(), [disk(0, true), disk(1, false)]);
    }

    #[test]
    fn character_devices_are_refused_unless_every_guest_has_them() {
        let fine = json!([device("c", "/dev/zero", 1, 5), device("c", "/dev/fuse", 10, 229)]);
        assert_eq!(disks(&spec(fine, json!([]))).unwrap(), []);
        for other in [device("c", "/dev/kvm", 10, 232), device("c", "/dev/mem", 1, 1), device("b", "/dev/x", -1, 0)] {
            let path = other["path"].as_str().unwrap().to_owned();
            let error = disks(&spec(json!([other]), json!([]))).unwrap_err().to_string();
            assert!(error.contains(&path) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn privileged_container_may_use_all_devices_of_its_guest() {
        let open = |capability: &str, option: &str| {
            let mut spec: Spec = serde_json::from_value(json!({
                "ociVersion": "1.0.2",
                "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "capabilities": { "bounding": [capability] } },
                "mounts": [{ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", option] }],
                "linux": { "resources": { "devices": [{ "allow": false, "access": "rwm" }] } },
            }))
            .unwrap();
            open_to_privileged(&mut spec);
            let linux = serde_json::to_value(spec.linux()).unwrap();
            linux["resources"]["devices"].as_array().unwrap().clone()
        };
        let rules = open("CAP_SYS_ADMIN", "rw");
        assert_eq!((rules.len(), &rules[1]["allow"], &rules[1]["access"]), (2, &json!(true), &json!("rwm")));
        assert_eq!(open("CAP_SYS_ADMIN", "ro").len(), 1);
        assert_eq!(open("CAP_CHOWN", "rw").len(), 1);
    }

    #[test]
    fn hosts_devices_that_an_engine_lists_for_a_privileged_container_are_left_out() {
        let left = |capability: &str, rules: Value| {
            let mut spec: Spec = serde_json::from_value(json!({
                "ociVersion": "1.0.2",
                "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "capabilities": { "bounding": [capability] } },
                "mounts": [{ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["rw"] }],
                "linux": {
                    "devices": [device("c", "/dev/kvm", 10, 232), device("b", "/dev/sda", 8, 0), device("c", "/dev/fuse", 10, 229)],
                    "resources": { "devices": rules },
                },
            }))
            .unwrap();
            leave_out_hosts(&mut spec);
            spec.linux().as_ref().unwrap().devices().as_ref().unwrap().len()
        };
        let all = json!([{ "allow": true, "access": "rwm" }]);
        assert_eq!(left("CAP_SYS_ADMIN", all.clone()), 1);
        assert_eq!(left("CAP_CHOWN", all), 3);
        assert_eq!(left("CAP_SYS_ADMIN", json!([{ "allow": false, "access": "rwm" }])), 3);
    }

    #[test]
    fn numbers_become_the_guests_and_rules_about_the_hosts_disks_go() {
        let devices = json!([device("b", "/dev/xvda", 7, 0), device("c", "/dev/zero", 1, 5)]);
        let rules = json!([
            {"allow": false, "access": "rwm"},
            rule(true, "b", 7, 0, "rwm"),
            rule(true, "b", 254, 0, "rwm"),
            rule(true, "c", 1, 5, "rwm"),
            rule(true, "b", -1, -1, "m")
        ]);
        let mut spec = spec(devices, rules);
        let (host, guest) = (DeviceNumber { major: 7, minor: 0 }, DeviceNumber { major: 254, minor: 16 });
        renumber(&mut spec, &[GuestDisk { host, guest }]);
        let spec = serde_json::to_value(spec).unwrap();
        let device = &spec["linux"]["devices"][0];
        assert_eq!(
            (&device["path"], &device["major"], &device["minor"]),
            (&json!("/dev/xvda"), &json!(254), &json!(16))
        );
        let rules = spec["linux"]["resources"]["devices"].as_array().unwrap();
        assert_eq!(rules.len(), 4);
        assert_eq!((&rules[1]["major"], &rules[1]["minor"], &rules[2]["type"]), (&json!(254), &json!(16), &json!("c")));
    }
}
