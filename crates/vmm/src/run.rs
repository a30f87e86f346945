//! `run`: opens what a shim would hand over, and goes the same way from there.

mod tap;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use bulkhead_protocol::control::ExitReason;
use bulkhead_protocol::guest::SHARE_TAG;
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, IdMaps, VmSpec};
use bulkhead_vmm::descriptors::Descriptors;
use bulkhead_vmm::machine::Machine;
use rustix::event::{PollFd, PollFlags, poll};

use crate::args::RunOptions;

/// Descriptors in the order in which they were opened.
#[derive(Default)]
struct Opened(Vec<OwnedFd>);

impl Opened {
    fn push(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        FdIndex(self.0.len() - 1)
    }
}

/// Runs a machine to its end.
pub fn run(options: &RunOptions) -> anyhow::Result<ExitReason> {
    let start = Instant::now();
    let mut opened = Opened::default();
    let spec = open(options, &mut opened)?;
    let on_ready = Box::new(move || eprintln!("bulkhead-vmm: guest is ready after {:.1?}", start.elapsed()));
    let mut machine = Machine::build(&spec, Descriptors::new(opened.0), on_ready)?;
    let built = start.elapsed();
    machine.start()?;
    let reason = wait(&machine)?;
    let ended = start.elapsed();
    let counts = machine.stop();
    if options.timing {
        eprintln!("bulkhead-vmm: built {built:.1?}, guest ended {ended:.1?}, stopped {:.1?}", start.elapsed());
        eprintln!("bulkhead-vmm: exits: {counts}");
    }
    Ok(reason)
}

fn wait(machine: &Machine) -> anyhow::Result<ExitReason> {
    loop {
        if let Some(reason) = machine.exit().reason() {
            return Ok(reason);
        }
        let mut fds = [PollFd::from_borrowed_fd(machine.exit().as_fd(), PollFlags::IN)];
        rustix::io::retry_on_intr(|| poll(&mut fds, None)).context("cannot wait for the guest")?;
    }
}

/// Opens everything and describes it.
fn open(options: &RunOptions, opened: &mut Opened) -> anyhow::Result<VmSpec> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    let kvm = kvm.context("cannot open /dev/kvm; is KVM available here, and may this user use it?")?;
    let kvm = opened.push(kvm);
    let kernel = opened.push(open_file(&options.kernel, false, "kernel")?);
    let initramfs = match &options.initrd {
        Some(path) => Some(opened.push(open_file(path, false, "initramfs")?)),
        None => None,
    };
    let serial = if options.serial { Some(opened.push(standard_output()?)) } else { None };
    Ok(VmSpec {
        kvm,
        kernel,
        initramfs,
        cmdline: options.cmdline.clone(),
        vcpus: options.vcpus,
        boot_vcpus: options.boot_vcpus.unwrap_or(options.vcpus),
        memory_mib: options.memory,
        hotplug_mib: 0,
        devices: open_devices(options, opened)?,
        serial,
    })
}

fn open_devices(options: &RunOptions, opened: &mut Opened) -> anyhow::Result<Vec<DeviceSpec>> {
    let mut devices = vec![DeviceSpec::Console { output: opened.push(standard_output()?) }, DeviceSpec::Rng];
    if let Some(name) = &options.tap {
        let tap = opened.push(tap::open(name).with_context(|| format!("cannot open the tap device {name:?}"))?);
        devices.push(DeviceSpec::Net { tap, mac: parse_mac(&options.mac)?, mtu: 1500 });
    }
    if options.vsock {
        devices.push(DeviceSpec::Vsock);
    }
    if let Some(path) = &options.share {
        let root = opened.push(File::open(path).with_context(|| format!("cannot open the share {path:?}"))?);
        devices.push(DeviceSpec::Fs { tag: SHARE_TAG.into(), root, ids: IdMaps::default(), private_roots: false });
    }
    for (number, disk) in options.disk.iter().enumerate() {
        let (path, read_only) = disk.strip_suffix(":ro").map_or((disk.as_str(), false), |path| (path, true));
        let file = opened.push(open_file(Path::new(path), !read_only, "disk")?);
        devices.push(DeviceSpec::Block { file, read_only, serial: format!("disk{number}") });
    }
    Ok(devices)
}

fn open_file(path: &Path, write: bool, what: &str) -> anyhow::Result<File> {
    let file = OpenOptions::new().read(true).write(write).open(path);
    file.with_context(|| format!("cannot open the {what} {path:?}"))
}

fn standard_output() -> anyhow::Result<OwnedFd> {
    std::io::stdout().as_fd().try_clone_to_owned().context("cannot duplicate standard output")
}

fn parse_mac(text: &str) -> anyhow::Result<[u8; 6]> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    match bytes.ok().and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
        Some(mac) if mac[0] & 1 == 0 => Ok(mac),
        _ => bail!("{text:?} is not a unicast MAC address"),
    }
}
