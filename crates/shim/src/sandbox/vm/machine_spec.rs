//! The machine that a pod gets, as the VMM is told: descriptors, devices and kernel parameters (ARCHITECTURE.md, D1).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use bulkhead_protocol::guest::SHARE_TAG;
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, IdMaps, VmSpec};
use rustix::fs::{Mode, OFlags};

use super::VmError;
use crate::config::Config;
use crate::network::NetDevice;
use crate::sandbox::Cgroup;
use crate::sizing::Plan;

/// Our own kernel parameters beside the VMM's, which make a quiet boot and have a panic end the guest: a console, so that
/// panics reach the log. The kernel has some of its own (guest-kernel/node.config).
const CMDLINE: &str = "console=hvc0 rdinit=/init";

/// Devices that every machine has, in the first slots.
const FIRST_DEVICES: u8 = 5;

/// What every machine is made from.
#[derive(Debug)]
pub struct Files {
    kvm: OwnedFd,
    kernel: OwnedFd,
    initramfs: OwnedFd,
}

impl Files {
    /// Opens what the configuration names; fails with the remedy before anything is made.
    pub fn open(config: &Config) -> Result<Self, VmError> {
        let kvm = rustix::fs::open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| VmError::NoKvm(error.into()))?;
        let file =
            |what, path: &Path| {
                rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|error| VmError::NoFile { what, path: path.to_path_buf(), source: error.into() })
            };
        if let Err(source) = std::fs::metadata(&config.vmm) {
            return Err(VmError::NoFile { what: "vmm", path: config.vmm.clone(), source });
        }
        Ok(Self { kvm, kernel: file("kernel", &config.kernel)?, initramfs: file("initramfs", &config.initramfs)? })
    }
}

/// A machine to build.
pub struct Machine<'a> {
    /// Kernel and image.
    pub files: Files,
    /// CPUs and memory.
    pub plan: &'a Plan,
    /// The pod's network.
    pub devices: Vec<NetDevice>,
    /// The pod's share.
    pub share: OwnedFd,
    /// Owners of the share's files that the guest knows by other ids.
    pub share_ids: IdMaps,
    /// Nobody else writes to the root file systems of its containers.
    pub private_roots: bool,
    /// Where the VMM is accounted.
    pub cgroup: Option<&'a Cgroup>,
}

/// Descriptors in the order of their indices.
struct Fds<'a>(Vec<BorrowedFd<'a>>);

impl<'a> Fds<'a> {
    fn add(&mut self, fd: &'a OwnedFd) -> FdIndex {
        self.0.push(fd.as_fd());
        FdIndex(self.0.len() - 1)
    }
}

impl Machine<'_> {
    /// The slots of the pod's network devices, with the interfaces that they carry. Slots are filled in the order of the
    /// devices in the message.
    pub fn net_slots(&self) -> Vec<(u8, u32)> {
        let before = FIRST_DEVICES + u8::from(self.plan.hotplug_mib > 0);
        (before..).zip(self.devices.iter().map(|device| device.link)).collect()
    }

    /// The message that boots the machine, with its descriptors.
    pub fn spec<'a>(&'a self, config: &Config, console: &'a OwnedFd) -> (VmSpec, Vec<BorrowedFd<'a>>) {
        let mut fds = Fds(Vec::new());
        let kvm = fds.add(&self.files.kvm);
        let kernel = fds.add(&self.files.kernel);
        let initramfs = Some(fds.add(&self.files.initramfs));
        let mut devices = vec![
            DeviceSpec::Console { output: fds.add(console) },
            DeviceSpec::Vsock,
            DeviceSpec::Fs {
                tag: SHARE_TAG.to_owned(),
                root: fds.add(&self.share),
                ids: self.share_ids.clone(),
                private_roots: self.private_roots,
            },
            DeviceSpec::Rng,
            DeviceSpec::Balloon,
        ];
        if self.plan.hotplug_mib > 0 {
            devices.push(DeviceSpec::Memory { requested_mib: self.plan.initial.plugged_mib });
        }
        for device in &self.devices {
            devices.push(DeviceSpec::Net { tap: fds.add(&device.tap), mac: device.mac, mtu: device.mtu });
        }
        let cmdline = format!("{CMDLINE} {}", config.kernel_params).trim_end().to_owned();
        let spec = VmSpec {
            kvm,
            kernel,
            initramfs,
            cmdline,
            vcpus: self.plan.vcpus,
            boot_vcpus: 1,
            memory_mib: self.plan.boot_mib,
            hotplug_mib: self.plan.hotplug_mib,
            devices,
            serial: None,
        };
        (spec, fds.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::annotations::Request;
    use crate::config::{Node, RawConfig};
    use crate::deadlines::{Deadline, Operation};
    use crate::sandbox::Vm;

    /// The test's own score, as it was.
    struct OwnScore(String);

    const OWN_SCORE: &str = "/proc/self/oom_score_adj";

    impl Drop for OwnScore {
        fn drop(&mut self) {
            let _ = std::fs::write(OWN_SCORE, &self.0);
        }
    }

    #[tokio::test]
    async fn vmm_without_a_cgroup_is_no_less_likely_to_be_killed_than_any_process() {
        assert!(rustix::process::geteuid().is_root(), "scores are lowered as root");
        let dir = tempfile::tempdir().unwrap();
        let vmm = dir.path().join("vmm");
        // Says its score when it has been told what to boot. Written by a process of its own, so that no other that is started
        // meanwhile holds the file open for writing: it could not be executed then.
        let script = "#!/bin/sh\nhead -c 1 > /dev/null\necho score $(cat /proc/self/oom_score_adj) >&2\n";
        let write = r#"printf '%s' "$1" > "$0" && chmod +x "$0""#;
        let written = std::process::Command::new("sh").args(["-c", write]).arg(&vmm).arg(script).status();
        assert!(written.unwrap().success());
        let _own = OwnScore(std::fs::read_to_string(OWN_SCORE).unwrap());
        std::fs::write(OWN_SCORE, "7").unwrap();
        let config = Config::validate(RawConfig::default(), Node { cpus: 2, memory_mib: 4096 }).unwrap();
        let config = Config { vmm, ..config };
        let plan = Plan::new(&config, &Request::default()).unwrap();
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let files = Files { kvm: null(), kernel: null(), initramfs: null() };
        let machine = Machine {
            files,
            plan: &plan,
            devices: Vec::new(),
            share: null(),
            share_ids: IdMaps::default(),
            private_roots: true,
            cgroup: None,
        };
        let deadline = Deadline::begin(Operation::CreatePod);
        match Vm::boot(deadline, &config, machine, &dir.path().join("pid")).await {
            Err(VmError::DiedEarly { last_words, .. }) => assert_eq!(last_words, "score 0"),
            other => panic!("{other:?}"),
        }
    }
}
