//! Devices that come while the guest runs: the VMM fills a slot, and the driver is told to look at it (ARCHITECTURE.md,
//! D3).
//!
//! The kernel names the slots of its command line `virtio-mmio.<n>` in their order (drivers/virtio/virtio_mmio.c). Binding
//! returns when the driver has looked, and by then a disk and its node in /dev, or an interface, exist: nothing has to be
//! waited for.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{BlockDevice, ImageRange};

use crate::sys;

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";

/// Makes the driver take the device in a slot; answers with its disk.
pub fn bind(slot: u32) -> Result<BlockDevice, DeviceError> {
    look_at(slot)?;
    match find_disk(&Path::new(DEVICES).join(name(slot))) {
        Some(disk) => Ok(disk),
        None => {
            // Whatever it is, it is of no use.
            let _ = unbind(slot);
            Err(DeviceError::NoDisk { slot })
        }
    }
}

/// The node of a disk.
pub fn node(disk: &BlockDevice) -> io::Result<PathBuf> {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{}:{}/uevent", disk.major, disk.minor))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.map(|name| Path::new("/dev").join(name)).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Makes the driver take the images in a slot; answers with a disk for each, by its node in /dev. None of them can be written.
pub fn bind_images(slot: u32, images: &[ImageRange]) -> Result<Vec<PathBuf>, DeviceError> {
    look_at(slot)?;
    let found = images_in(slot, images);
    if found.is_err() {
        let _ = unbind(slot);
    }
    found
}

fn images_in(slot: u32, images: &[ImageRange]) -> Result<Vec<PathBuf>, DeviceError> {
    let failed = |source| DeviceError::Images { slot, source };
    let virtio = child(&Path::new(DEVICES).join(name(slot)), is_virtio).ok_or(DeviceError::NoDisk { slot })?;
    let bus = child(&virtio, |name| name.starts_with("ndbus")).ok_or(DeviceError::NoDisk { slot })?;
    // Its drivers work on their own. This returns when they are through (drivers/nvdimm/bus.c, wait_probe).
    std::fs::read_to_string(bus.join("wait_probe")).map_err(failed)?;
    let disk = find_memory_disk(&bus).ok_or(DeviceError::NoDisk { slot })?;
    let file = File::open(Path::new("/dev").join(&disk)).map_err(failed)?;
    sys::make_disk_read_only(&file).map_err(|errno| failed(errno.into()))?;
    let add = |(number, image): (u32, &ImageRange)| {
        sys::add_partition(&file, number, image.offset, image.size).map_err(|errno| failed(errno.into()))?;
        Ok(Path::new("/dev").join(format!("{disk}p{number}")))
    };
    (1..).zip(images).map(add).collect()
}

/// The name of the disk below a bus of such memory: `region<n>/namespace<n>.0/block/<name>`.
fn find_memory_disk(bus: &Path) -> Option<String> {
    let region = child(bus, |name| name.starts_with("region"))?;
    // One that has no memory stands beside the other, as a seed for more.
    let spaces = std::fs::read_dir(region).ok()?.filter_map(Result::ok);
    let mut spaces =
        spaces.filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with("namespace")));
    let disk = spaces.find_map(|space| child(&space.path().join("block"), |_| true))?;
    disk.file_name()?.to_str().map(str::to_owned)
}

/// Makes the driver take the devices in some slots: all of them or none.
pub fn bind_all(slots: &[u32]) -> Result<(), DeviceError> {
    for (done, slot) in slots.iter().enumerate() {
        if let Err(error) = look_at(*slot) {
            for slot in &slots[..done] {
                let _ = unbind(*slot);
            }
            return Err(error);
        }
    }
    Ok(())
}

fn look_at(slot: u32) -> Result<(), DeviceError> {
    std::fs::write(Path::new(DRIVER).join("bind"), name(slot)).map_err(|source| DeviceError::Bind { slot, source })
}

fn name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// Makes the driver let go of a slot. One that has no driver is as good.
pub fn unbind(slot: u32) -> Result<(), DeviceError> {
    match std::fs::write(Path::new(DRIVER).join("unbind"), name(slot)) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other.map_err(|source| DeviceError::Unbind { slot, source }),
    }
}

/// The disk below a platform device: `virtio<n>/block/<name>/dev`.
fn find_disk(device: &Path) -> Option<BlockDevice> {
    let virtio = child(device, is_virtio)?;
    let disk = child(&virtio.join("block"), |_| true)?;
    let numbers = std::fs::read_to_string(disk.join("dev")).ok()?;
    let (major, minor) = numbers.trim().split_once(':')?;
    Some(BlockDevice { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() })
}

fn child(dir: &Path, fits: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut entries = std::fs::read_dir(dir).ok()?.filter_map(Result::ok);
    entries.find(|entry| entry.file_name().to_str().is_some_and(&fits)).map(|entry| entry.path())
}

/// The name of the interface in a slot.
pub fn interface(slot: u32) -> io::Result<String> {
    find_interface(&Path::new(DEVICES).join(name(slot))).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// The interface below a platform device: `virtio<n>/net/<name>`.
fn find_interface(device: &Path) -> Option<String> {
    let virtio = child(device, is_virtio)?;
    let interface = child(&virtio.join("net"), |_| true)?;
    interface.file_name()?.to_str().map(str::to_owned)
}

fn is_virtio(name: &str) -> bool {
    name.starts_with("virtio") && !name.contains('-')
}

/// A slot's device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver does not want it.
    #[error("the guest's driver refuses the device in slot {slot}; the VMM may not have filled the slot")]
    Bind { slot: u32, source: io::Error },
    /// The driver does not give it back.
    #[error("the guest's driver does not release the device in slot {slot}; it may still be in use")]
    Unbind { slot: u32, source: io::Error },
    /// What should be images.
    #[error("the images in slot {slot} cannot be used as disks")]
    Images { slot: u32, source: io::Error },
    /// Something else.
    #[error("the device in slot {slot} is no disk")]
    NoDisk { slot: u32 },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_is_found_below_its_platform_device() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("virtio-mmio.7");
        assert_eq!(find_disk(&device), None);
        std::fs::create_dir_all(device.join("virtio6/block/vdb")).unwrap();
        std::fs::create_dir_all(device.join("power")).unwrap();
        std::fs::write(device.join("virtio6/block/vdb/dev"), "254:16\n").unwrap();
        let disk = find_disk(&device).unwrap();
        assert_eq!((disk.major, disk.minor), (254, 16));
    }

    #[test]
    fn disk_of_memory_is_found_below_its_bus() {
        let dir = tempfile::tempdir().unwrap();
        let bus = dir.path().join("ndbus0");
        assert_eq!(find_memory_disk(&bus), None);
        std::fs::create_dir_all(bus.join("region0/namespace0.1")).unwrap();
        std::fs::create_dir_all(bus.join("region0/power")).unwrap();
        assert_eq!(find_memory_disk(&bus), None);
        std::fs::create_dir_all(bus.join("region0/namespace0.0/block/pmem0")).unwrap();
        assert_eq!(find_memory_disk(&bus).as_deref(), Some("pmem0"));
    }

    #[test]
    fn interface_is_found_below_its_platform_device() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("virtio-mmio.5");
        assert_eq!(find_interface(&device), None);
        std::fs::create_dir_all(device.join("virtio4/net/eth0")).unwrap();
        assert_eq!(find_interface(&device).as_deref(), Some("eth0"));
    }
}
