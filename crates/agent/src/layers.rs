//! Root file systems of image layers that the host shows in the guest's memory: each layer is an EROFS, and an overlay makes one
//! tree of them. Containers that have a layer in common have one mount of it.
//!
//! What is in an image is not trusted: it can confuse the kernel of this guest, which is the pod's own, and nobody else's.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::agent::{BlockDevice, Image, ImageDevice, Layer, LayeredRoot};
use bulkhead_protocol::guest::{LAYERS_DIR, ROOT_DIR, SHARE_DIR, UPPER_DIR, UPPER_NAMES};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount, mount_bind, move_mount, unmount,
};

use crate::devices::{self, DeviceError};

/// Upper and work directory on a disk that a container writes to: names of containerd's.
const DISK_NAMES: [&str; 2] = ["upper", "work"];

/// Images and their mounts. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Layers(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The disks of images, by slot and in their order.
    disks: HashMap<u32, Vec<PathBuf>>,
    mounted: Vec<Mounted>,
    /// Containers with a root of layers, and the mount that they write to.
    roots: HashMap<String, Option<PathBuf>>,
}

/// A layer that is mounted.
#[derive(Debug)]
struct Mounted {
    images: Vec<(u32, u32)>,
    /// Containers.
    users: BTreeSet<String>,
}

impl Mounted {
    /// Where: the first image says which it is, as long as its slot is bound.
    fn path(&self) -> PathBuf {
        let name = self.images.first().map_or_else(String::new, |(slot, number)| format!("{slot}-{number}"));
        Path::new(LAYERS_DIR).join(name)
    }
}

impl Layers {
    /// Makes disks of the images in a slot. Waits for the kernel.
    pub fn bind(&self, device: &ImageDevice) -> Result<(), DeviceError> {
        let disks = devices::bind_images(device.slot, &device.images)?;
        self.state().disks.insert(device.slot, disks);
        Ok(())
    }

    /// Lets go of what is in a slot, images or another device. Waits for the kernel.
    pub fn unbind(&self, slot: u32) -> Result<(), DeviceError> {
        self.state().disks.remove(&slot);
        devices::unbind(slot)
    }

    /// Mounts a container's root file system. [`Self::remove`] takes back what there is of it, on an error too. Waits for the
    /// host, which reads images and serves the share.
    pub fn create(&self, id: &str, root: &LayeredRoot) -> Result<(), LayerError> {
        let layers = root.layers.iter().map(|layer| self.mount_layer(id, layer)).collect::<Result<Vec<_>, _>>()?;
        let own = Path::new(SHARE_DIR).join(id);
        let (written, names) = match root.disk.as_ref() {
            Some(disk) => (Some(Path::new(LAYERS_DIR).join(format!("disk-{}-{}", disk.major, disk.minor))), DISK_NAMES),
            None => (root.writable.then(|| own.join(UPPER_DIR)), UPPER_NAMES),
        };
        // Before the mounts, so that a failure in between leaves none.
        self.state().roots.insert(id.to_owned(), written.clone());
        if let (Some(disk), Some(path)) = (root.disk.as_ref(), &written) {
            mount_disk(disk, path).map_err(|source| LayerError::Disk { path: path.clone(), source })?;
        }
        let top = written.map(|path| names.map(|name| path.join(name)));
        overlay(&layers, top.as_ref(), root.volatile, &own.join(ROOT_DIR))
            .map_err(|source| LayerError::Overlay { id: id.to_owned(), source })
    }

    /// Mounts a layer if it is not, and answers where.
    fn mount_layer(&self, id: &str, layer: &Layer) -> Result<PathBuf, LayerError> {
        let images: Vec<_> = layer.images.iter().map(|Image { slot, number, .. }| (*slot, *number)).collect();
        // Held while the kernel mounts, so that two containers do not mount the same one. What it reads is in the host's memory,
        // or on a disk that has had an image written to it before.
        let mut state = self.state();
        if let Some(mounted) = state.mounted.iter_mut().find(|mounted| mounted.images == images) {
            mounted.users.insert(id.to_owned());
            return Ok(mounted.path());
        }
        let disk = |(slot, number): &(u32, u32)| {
            let disks = state.disks.get(slot);
            let disk = usize::try_from(*number).ok().and_then(|number| disks?.get(number));
            disk.cloned().ok_or(LayerError::NoImage { slot: *slot, number: *number })
        };
        let disks = images.iter().map(disk).collect::<Result<Vec<_>, _>>()?;
        let mounted = Mounted { images, users: BTreeSet::from([id.to_owned()]) };
        let path = mounted.path();
        mount_image(&disks, &path).map_err(|source| LayerError::Mount { path: path.clone(), source })?;
        state.mounted.push(mounted);
        Ok(path)
    }

    /// Unmounts what a container had, as far as no other has it. Waits for the host, which is given what is not written yet.
    pub fn remove(&self, id: &str) -> Result<(), LayerError> {
        let mut result = Ok(());
        let root = self.state().roots.remove(id);
        if let Some(written) = root {
            result = take_off(&Path::new(SHARE_DIR).join(id).join(ROOT_DIR));
            // The overlay's end has written back what is there, unless it was a volatile one. This one's end does in any case.
            if let Some(path) = written {
                result = result.and(take_off(&path));
            }
        }
        let mut state = self.state();
        let unused = |mounted: &mut Mounted| mounted.users.remove(id) && mounted.users.is_empty();
        for mounted in state.mounted.extract_if(.., unused) {
            let path = mounted.path();
            result = result.and(take_off(&path));
            let _ = std::fs::remove_dir(path);
        }
        result
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take_off(path: &Path) -> Result<(), LayerError> {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(errno) => Err(LayerError::Unmount { path: path.to_path_buf(), source: errno.into() }),
    }
}

/// Mounts the file system on the first disk, which may name the others. Files are mapped straight from the host's memory where
/// the image's layout allows it (DAX: blocks of a page, not compressed); the kernel reads others into its own.
fn mount_image(disks: &[PathBuf], path: &Path) -> io::Result<()> {
    let (first, others) = disks.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let options = others.iter().map(|disk| format!(",device={}", disk.display())).collect::<String>();
    let options = CString::new(format!("dax=always{options}"))?;
    std::fs::create_dir_all(path)?;
    let flags = MountFlags::RDONLY | MountFlags::NODEV;
    mount(first, path, "erofs", flags, Some(options.as_c_str())).map_err(io::Error::from).inspect_err(|_| {
        let _ = std::fs::remove_dir(path);
    })
}

/// Mounts the disk that a container writes to, with its upper and its work directory.
fn mount_disk(disk: &BlockDevice, path: &Path) -> io::Result<()> {
    let node = devices::node(disk)?;
    std::fs::create_dir_all(path)?;
    mount(&node, path, "ext4", MountFlags::NODEV, None::<&CStr>)?;
    for name in DISK_NAMES {
        match std::fs::DirBuilder::new().mode(0o755).create(path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Makes one tree of layers, the topmost first, at `target`; what is written goes to an upper directory that has a work directory.
fn overlay(layers: &[PathBuf], top: Option<&[PathBuf; 2]>, volatile: bool, target: &Path) -> io::Result<()> {
    // An overlay has two directories at least.
    if let ([only], None) = (layers, top) {
        return Ok(mount_bind(only, target)?);
    }
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Files of all layers have one device number, as in any file system; `tar --one-file-system` would leave out the others.
    fsconfig_set_string(&context, "xino", "on")?;
    for layer in layers {
        fsconfig_set_string(&context, "lowerdir+", layer)?;
    }
    if let Some([upper, work]) = top {
        fsconfig_set_string(&context, "upperdir", upper)?;
        fsconfig_set_string(&context, "workdir", work)?;
        if volatile {
            fsconfig_set_flag(&context, "volatile")?;
        }
    }
    fsconfig_create(&context)?;
    let tree = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NODEV)?;
    Ok(move_mount(&tree, "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// A container cannot have its root file system.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Not bound.
    #[error("there is no image {number} in slot {slot} of the guest")]
    NoImage { slot: u32, number: u32 },
    /// EROFS.
    #[error(
        "the guest cannot mount an image layer at {path}; is it an EROFS, and one that Linux 6.12 knows, not compressed but with LZ4?"
    )]
    Mount { path: PathBuf, source: io::Error },
    /// What the container writes to.
    #[error("the guest cannot mount the disk that the container writes to at {path}; is it an ext4?")]
    Disk { path: PathBuf, source: io::Error },
    /// Overlay.
    #[error("the guest cannot make a root file system of the image layers of container {id}")]
    Overlay { id: String, source: io::Error },
    /// umount(2).
    #[error("cannot unmount {path}")]
    Unmount { path: PathBuf, source: io::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(images: &[(u32, u32)]) -> Layer {
        let image = |(slot, number): &(u32, u32)| Image { slot: *slot, number: *number, ..Image::default() };
        Layer { images: images.iter().map(image).collect(), ..Layer::default() }
    }

    #[test]
    fn hostile_24_image_that_is_not_there_is_refused() {
        let layers = Layers::default();
        layers.state().disks.insert(3, vec!["/nowhere".into()]);
        for images in [&[(2, 0)][..], &[(3, 1)], &[(3, 0), (3, u32::MAX)]] {
            let error = layers.mount_layer("c1", &layer(images)).unwrap_err();
            assert!(matches!(error, LayerError::NoImage { .. }), "{error}");
        }
        assert!(matches!(layers.mount_layer("c1", &layer(&[])), Err(LayerError::Mount { .. })));
        assert!(layers.state().mounted.is_empty());
    }

    #[test]
    fn layer_is_mounted_for_as_long_as_a_container_has_it() {
        let layers = Layers::default();
        let users = BTreeSet::from(["c1".to_owned()]);
        layers.state().mounted.push(Mounted { images: vec![(3, 0), (3, 1)], users });
        let path = layers.mount_layer("c2", &layer(&[(3, 0), (3, 1)])).unwrap();
        assert_eq!(path, Path::new("/run/bulkhead/layers/3-0"));
        layers.remove("c1").unwrap();
        assert_eq!(layers.state().mounted.len(), 1);
        layers.remove("c3").unwrap();
        assert_eq!(layers.state().mounted.len(), 1);
        // Nothing is mounted there, which is as good.
        layers.remove("c2").unwrap();
        assert!(layers.state().mounted.is_empty());
    }
}
