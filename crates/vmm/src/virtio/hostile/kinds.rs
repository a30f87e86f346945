//! What tells the kinds of devices apart: which there are, what they are built of, what a driver sees of them, and whose
//! thread a slow one holds up.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, IdMaps, Image};

use super::{NET, Rig, SIZE, for_every_device, rig};
use crate::descriptors::Descriptors;
use crate::devices::DeviceBuilder;
use crate::event_loop::EventLoop;
use crate::kvm::{ImageSpace, Vm};
use crate::layout;
use crate::memory::create_memory;
use crate::virtio::Interrupt;
use crate::virtio::testing::{DriverQueue, activation, memory};

/// The header before each frame (section 5.1.6).
const NET_HEADER: usize = 12;

#[test]
fn hostile_02_configuration_reads_beyond_the_end_and_of_any_width_are_zero_or_what_is_there() {
    for_every_device(|rig, _| {
        let mut space = [0; 256];
        for (offset, byte) in (0..).zip(&mut space) {
            rig.device.read_config(offset, std::slice::from_mut(byte));
        }
        assert!(space[64..].iter().all(|byte| *byte == 0), "{}", rig.name);
        for width in [1, 2, 4, 8] {
            for offset in 0..space.len() - width {
                let mut data = vec![0; width];
                rig.device.read_config(u64::try_from(offset).unwrap(), &mut data);
                assert_eq!(data, space[offset..offset + width], "{} {offset} {width}", rig.name);
            }
            for offset in [0xf00, u64::from(u32::MAX), u64::MAX - 3, u64::MAX] {
                let mut data = vec![0; width];
                rig.device.read_config(offset, &mut data);
                assert_eq!(data, vec![0; width], "{} {offset:#x} {width}", rig.name);
            }
            rig.device.write_config(u64::MAX, &vec![0xff; width]);
            rig.device.write_config(0, &vec![0xff; width]);
        }
        let mut again = [0; 256];
        rig.device.read_config(0, &mut again);
        assert_eq!(again, space, "{}: nothing of it can be written", rig.name);
    });
}

/// An interrupt that takes for ever, as a request to a hanging disk would.
struct Stuck {
    reached: Mutex<Sender<()>>,
    released: Mutex<Receiver<()>>,
}

impl Interrupt for Stuck {
    fn notify_queue(&self, _index: u16) {
        let _ = self.reached.lock().unwrap().send(());
        // Its end is the release.
        let _ = self.released.lock().unwrap().recv();
    }
    fn notify_config(&self) {}
    fn needs_reset(&self) {}
}

#[test]
fn hostile_08_disk_whose_thread_hangs_starves_no_other_device_and_no_other_disk() {
    let mut builder = DeviceBuilder::new(None, None, Box::new(|| {}), 2).unwrap();
    let device_loop = builder.event_loop();
    let mut build = |spec: DeviceSpec, file: Option<File>| {
        let fds = file.into_iter().map(OwnedFd::from).collect();
        let device = builder.build(&spec, &mut Descriptors::new(fds)).unwrap();
        Rig { device, ..rig(&spec, EventLoop::spawn().unwrap()) }
    };
    let block = DeviceSpec::Block { file: FdIndex(0), read_only: false, serial: String::new() };
    let image = || {
        let image = tempfile::tempfile().unwrap();
        image.set_len(4096).unwrap();
        Some(image)
    };
    let mut disk = build(block.clone(), image());

    let ((reached, hangs), (release, released)) = (channel(), channel());
    let memory = memory();
    let mut queue = DriverQueue::new(&memory, 0x1_0000, SIZE);
    let mut activation = activation(&memory, 0, &[&queue], &Arc::default());
    activation.interrupt = Arc::new(Stuck { reached: Mutex::new(reached), released: Mutex::new(released) });
    disk.device.activate(activation).unwrap();
    queue.add(&disk.buffers());
    queue.kick();
    hangs.recv().unwrap();
    assert!(queue.take_used().is_some());
    queue.add(&disk.buffers());
    queue.kick();

    // With a frame that is one, so that it reaches the wire.
    let mut net = Rig { request: vec![0; NET_HEADER + 60], ..rig(&NET, device_loop) };
    let mut session = net.start();
    assert!(net.ask(&mut session).is_some());
    let wire = net.host.downcast_ref::<OwnedFd>().unwrap();
    let crossed = rustix::net::recv(wire, &mut [0; 128][..], rustix::net::RecvFlags::empty());
    assert_eq!(crossed.unwrap().1, NET_HEADER + 60);
    net.device.reset();

    let share = tempfile::tempdir().unwrap();
    for mut other in [
        net,
        build(block, image()),
        build(DeviceSpec::Rng, None),
        build(DeviceSpec::Vsock, None),
        build(DeviceSpec::Balloon, None),
        build(DeviceSpec::Console { output: FdIndex(0) }, Some(File::create("/dev/null").unwrap())),
        build(
            DeviceSpec::Fs { tag: "x".into(), root: FdIndex(0), ids: IdMaps::default(), private_roots: true },
            Some(File::open(share.path()).unwrap()),
        ),
    ] {
        let mut session = other.start();
        assert!(other.ask(&mut session).is_some(), "{}", other.name);
        other.works_after_a_reset();
    }
    assert_eq!(queue.take_used(), None, "the disk hangs as long as that");
    drop(release);
    // Its reset waits for the request.
    disk.device.reset();
    assert!(queue.take_used().is_some() || hangs.try_recv().is_err());
}

/// Section 5 of the specification has more than a machine can be built of. That memory of the host which a guest is shown as a
/// disk (virtio-pmem, 27) cannot be written is the matter of `kvm::images` (CVE-2026-24834); virtio-fs has no window of such.
#[test]
fn hostile_12_there_is_no_other_kind_of_device_than_these() {
    let mut types = Vec::new();
    for_every_device(|rig, _| types.push(rig.device.device_type()));
    types.sort_unstable();
    assert_eq!(types, [1, 2, 3, 4, 5, 19, 24, 26, 27]);
    for name in ["gpu", "scsi", "iommu", "vhost"] {
        let spec = serde_json::from_value::<DeviceSpec>(serde_json::json!({ "type": name, "file": 0 }));
        assert!(spec.is_err(), "{name}");
    }
    // Nor a way to ask for one that can be written.
    for more in ["writable", "read_only", "sync"] {
        let image = serde_json::json!({ "file": 0, "size": 4096, more: true });
        let spec = serde_json::from_value::<DeviceSpec>(serde_json::json!({ "type": "pmem", "images": [image] }));
        assert!(spec.is_err(), "{more}");
    }
}

fn image_space() -> ImageSpace {
    let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("needs a /dev/kvm");
    let vm = Vm::new(kvm.into(), create_memory(16, 0).unwrap(), layout::hotplug_start(16)).unwrap();
    vm.image_space(layout::images_start(16, 0))
}

/// What a device is built of comes from the shim; an index that is wrong, or a descriptor of the wrong kind, is one error.
#[test]
fn hostile_15_device_whose_descriptor_is_missing_or_of_the_wrong_kind_is_refused_with_a_reason() {
    let refusal = |spec: &DeviceSpec, fds: Vec<OwnedFd>| {
        let mut builder = DeviceBuilder::new(None, Some(image_space()), Box::new(|| {}), 1).unwrap();
        builder.build(spec, &mut Descriptors::new(fds)).err().map(|error| error.to_string())
    };
    let wrong = FdIndex(usize::MAX);
    let needy = [
        (DeviceSpec::Block { file: wrong, read_only: true, serial: String::new() }, "disk"),
        (DeviceSpec::Console { output: wrong }, "console"),
        (DeviceSpec::Fs { tag: "share".into(), root: wrong, ids: IdMaps::default(), private_roots: true }, "share"),
        (DeviceSpec::Net { tap: wrong, mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }, "tap"),
        (DeviceSpec::Pmem { images: vec![Image { file: wrong, size: 4096 }] }, "image"),
    ];
    for (spec, name) in needy {
        let error = refusal(&spec, vec![File::open("/dev/null").unwrap().into()]).unwrap();
        assert_eq!(error, format!("descriptor {} for the {name} did not come with the spec", usize::MAX));
    }
    let pipe = || vec![std::io::pipe().unwrap().0.into()];
    let index = FdIndex(0);
    for (spec, words) in [
        (DeviceSpec::Block { file: index, read_only: true, serial: String::new() }, "is it an image file"),
        (DeviceSpec::Block { file: index, read_only: true, serial: "x".repeat(21) }, "disk"),
        (
            DeviceSpec::Fs { tag: "share".into(), root: index, ids: IdMaps::default(), private_roots: true },
            "no directory",
        ),
        (DeviceSpec::Fs { tag: String::new(), root: index, ids: IdMaps::default(), private_roots: true }, "tag"),
        (DeviceSpec::Net { tap: index, mac: [2, 0, 0, 0, 0, 1], mtu: 1500 }, "tap"),
        (DeviceSpec::Net { tap: index, mac: [2, 0, 0, 0, 0, 1], mtu: 67 }, "MTU"),
        (DeviceSpec::Memory { requested_mib: u64::MAX }, "hotplug_mib"),
        (DeviceSpec::Pmem { images: vec![Image { file: index, size: 4096 }] }, "no regular file"),
        (DeviceSpec::Pmem { images: vec![] }, "1 to 60 images"),
    ] {
        let error = refusal(&spec, pipe()).unwrap();
        assert!(error.contains(words), "{error}");
    }
}
