//! Image layers that containers of the pod have: the files are shown to the guest in its memory, from the host's page cache, which
//! all pods of an image have in common (ARCHITECTURE.md, D5). An image is shown to a pod once, whatever containers have it, and
//! those that come with one container are one device of the VM, which goes with the last container that has one of them.
//!
//! Where what a container writes is a file system in a file, that is a disk of the VM.

mod guard;

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::agent as proto;
use bulkhead_protocol::images::{MAX_IMAGES, layout, taken};
use rustix::fs::{FileType, OFlags};

use super::agent::{Agent, AgentError};
use super::inotify::Inotify;
use super::vm::{Vm, VmError};
use crate::about;
use crate::deadlines::{Deadline, Operation};
use crate::layers::{Layered, Top};
use crate::share;
use guard::Guard;

/// Where an EROFS has its superblock, in bytes, and what that begins with.
const SUPERBLOCK: u64 = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;

/// The pod's images.
#[derive(Debug)]
pub struct Images {
    inotify: Inotify,
    /// Held while some come or go, so that two containers do not bring the same one.
    devices: Arc<tokio::sync::Mutex<Vec<Device>>>,
    /// Containers that have images or are about to: the others wait for nobody.
    users: Mutex<HashSet<String>>,
}

/// A slot of the VM.
#[derive(Debug)]
struct Device {
    slot: u8,
    /// In their order. None for a disk, which is one container's.
    images: Vec<Identity>,
    /// Containers.
    users: HashSet<String>,
    _guard: Option<Guard>,
}

/// What tells an image from every other, as long as nobody changes it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// An image that is open for reading.
#[derive(Debug)]
pub struct OpenImage {
    file: OwnedFd,
    identity: Identity,
}

/// The files of a root file system of layers.
#[derive(Debug)]
pub struct OpenLayers {
    layers: Vec<Vec<OpenImage>>,
    /// Where the container writes, if that is a file system in a file.
    disk: Option<OwnedFd>,
    writable: bool,
    volatile: bool,
}

impl OpenLayers {
    /// Opens the files. Waits for the host.
    pub fn open(layered: &Layered) -> Result<Self, ImagesError> {
        let open = |images: &Vec<PathBuf>| {
            let open: Vec<_> = images.iter().map(|path| OpenImage::open(path)).collect::<Result<_, _>>()?;
            // The others of a layer have what is in files, in no form that could be told.
            match (images.first(), open.first()) {
                (Some(path), Some(first)) if !first.is_erofs() => Err(ImagesError::NoErofs(path.clone())),
                _ => Ok(open),
            }
        };
        let layers = layered.layers.iter().map(open).collect::<Result<_, _>>()?;
        let disk = match &layered.top {
            Some(Top::Disk(file)) => Some(open_file(file, OFlags::RDWR)?.0),
            _ => None,
        };
        Ok(Self { layers, disk, writable: layered.top.is_some(), volatile: layered.volatile })
    }

    /// The size of all images.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().flatten().fold(0, |sum, image| sum.saturating_add(image.identity.size))
    }
}

impl OpenImage {
    fn open(path: &Path) -> Result<Self, ImagesError> {
        let (file, stat) = open_file(path, OFlags::RDONLY)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if taken(size).is_none() {
            return Err(ImagesError::Empty(path.into()));
        }
        let changed = (stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or(0));
        Ok(Self { file, identity: Identity { device: stat.st_dev, inode: stat.st_ino, size, changed } })
    }

    /// Whether it begins as such a file system does (Documentation/filesystems/erofs.rst). The guest looks at all else.
    fn is_erofs(&self) -> bool {
        let mut magic = [0; 4];
        rustix::io::pread(&self.file, &mut magic, SUPERBLOCK) == Ok(magic.len()) && u32::from_le_bytes(magic) == MAGIC
    }
}

/// Opens a regular file. What containerd names may be a link, to a cache of the operator's; what is at its end has to be a file: a
/// device would be one of the node's.
fn open_file(path: &Path, access: OFlags) -> Result<(OwnedFd, rustix::fs::Stat), ImagesError> {
    let failed = |source| ImagesError::Open { path: path.into(), source };
    let found = std::fs::canonicalize(path).map_err(failed)?;
    // A device would be opened by what comes, and some do something then.
    if !std::fs::symlink_metadata(&found).map_err(failed)?.is_file() {
        return Err(ImagesError::NoFile(path.into()));
    }
    let file = share::open_file(&found, access).map_err(|errno| failed(errno.into()))?;
    let stat = rustix::fs::fstat(&file).map_err(|errno| failed(errno.into()))?;
    let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if is_file { Ok((file, stat)) } else { Err(ImagesError::NoFile(path.into())) }
}

impl Images {
    /// None yet.
    pub fn new(inotify: Inotify) -> Self {
        Self { inotify, devices: Arc::default(), users: Mutex::default() }
    }

    #[cfg(test)]
    pub async fn lock(&self) -> impl Drop {
        self.devices.lock().await
    }

    fn users(&self) -> MutexGuard<'_, HashSet<String>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a container's layers to the guest; answers what the guest mounts. On an error, [`Self::detach`] takes back what it has
    /// got.
    pub async fn attach(
        &self,
        deadline: Deadline,
        vm: &Vm,
        agent: &Agent,
        id: &str,
        open: OpenLayers,
    ) -> Result<proto::LayeredRoot, ImagesError> {
        self.users().insert(id.to_owned());
        let OpenLayers { layers, disk, writable, volatile } = open;
        let wanted: Vec<Vec<_>> =
            layers.iter().map(|images| images.iter().map(|image| image.identity).collect()).collect();
        let mut devices = deadline.timeout(self.devices.lock()).await.map_err(ImagesError::Busy)?;
        let missing = note_user(&mut devices, id, layers.into_iter().flatten());
        for images in missing {
            let device = show(deadline, vm, agent, id, images, &self.inotify).await?;
            devices.push(device);
        }
        let disk = match disk {
            Some(file) => Some(add_disk(deadline, vm, agent, id, file, &mut devices).await?),
            None => None,
        };
        let image = |identity: &Identity| place(&devices, identity).ok_or(ImagesError::Lost);
        let layer = |images: &Vec<Identity>| {
            let images = images.iter().map(image).collect::<Result<_, _>>()?;
            Ok::<_, ImagesError>(proto::Layer { images, ..proto::Layer::default() })
        };
        let layers = wanted.iter().map(layer).collect::<Result<_, _>>()?;
        Ok(proto::LayeredRoot { layers, writable, volatile, disk: disk.into(), ..proto::LayeredRoot::default() })
    }

    /// Takes a container's images away, as far as no other has them. The guest may refuse; the slot is emptied anyway, also when
    /// the time of whoever waits for it is over.
    pub async fn detach(&self, deadline: Deadline, vm: &Vm, agent: &Agent, id: &str) {
        if !self.users().remove(id) || vm.has_ended() {
            return;
        }
        let (devices, vm, agent, id) = (self.devices.clone(), vm.clone(), agent.clone(), id.to_owned());
        let taking_out = about::spawn(async move { take_out(&mut *devices.lock().await, &vm, &agent, &id).await });
        let _ = deadline.timeout(taking_out).await;
    }
}

/// Notes that a container has what is there of these images; answers with the others, each once, in lists that a device can have.
fn note_user(devices: &mut [Device], id: &str, images: impl Iterator<Item = OpenImage>) -> Vec<Vec<OpenImage>> {
    let mut seen = HashSet::new();
    let mut missing: Vec<Vec<OpenImage>> = Vec::new();
    for image in images.filter(|image| seen.insert(image.identity)) {
        if let Some(device) = devices.iter_mut().find(|device| device.images.contains(&image.identity)) {
            device.users.insert(id.to_owned());
            continue;
        }
        match missing.last_mut().filter(|list| list.len() < MAX_IMAGES) {
            Some(list) => list.push(image),
            None => missing.push(vec![image]),
        }
    }
    missing
}

/// By what the guest knows an image.
fn place(devices: &[Device], identity: &Identity) -> Option<proto::Image> {
    devices.iter().find_map(|device| {
        let number = device.images.iter().position(|image| image == identity)?;
        let number = u32::try_from(number).ok()?;
        Some(proto::Image { slot: device.slot.into(), number, ..proto::Image::default() })
    })
}

async fn show(
    deadline: Deadline,
    vm: &Vm,
    agent: &Agent,
    id: &str,
    images: Vec<OpenImage>,
    inotify: &Inotify,
) -> Result<Device, ImagesError> {
    let identities: Vec<_> = images.iter().map(|image| image.identity).collect();
    let sizes: Vec<_> = identities.iter().map(|identity| identity.size).collect();
    let offsets = layout(&sizes).ok_or(ImagesError::Lost)?.offsets;
    let range = |(offset, size): (&u64, &u64)| proto::ImageRange {
        offset: *offset,
        size: taken(*size).unwrap_or_default(),
        ..proto::ImageRange::default()
    };
    let ranges = offsets.iter().zip(&sizes).map(range).collect();
    let copy = |image: &OpenImage| Ok((image.file.try_clone()?, image.identity.size));
    let copies = images.iter().map(copy).collect::<Result<_, _>>().map_err(ImagesError::Copy)?;
    let files = images.into_iter().zip(&sizes).map(|(image, size)| (image.file, *size)).collect();
    let slot = vm.add_images(deadline, files).await?;
    if let Err(error) = agent.bind_images(deadline, slot, ranges).await {
        let _ = vm.remove_device(deadline, slot).await;
        return Err(error.into());
    }
    let guard = Some(Guard::new(inotify.clone(), copies, vm.clone()));
    Ok(Device { slot, images: identities, users: HashSet::from([id.to_owned()]), _guard: guard })
}

async fn add_disk(
    deadline: Deadline,
    vm: &Vm,
    agent: &Agent,
    id: &str,
    file: OwnedFd,
    devices: &mut Vec<Device>,
) -> Result<proto::BlockDevice, ImagesError> {
    let slot = vm.add_disk(deadline, file, false, "root".to_owned()).await?;
    match agent.bind_device(deadline, slot).await {
        Ok(disk) => {
            let users = HashSet::from([id.to_owned()]);
            devices.push(Device { slot, images: Vec::new(), users, _guard: None });
            Ok(proto::BlockDevice { major: disk.major, minor: disk.minor, ..proto::BlockDevice::default() })
        }
        Err(error) => {
            let _ = vm.remove_device(deadline, slot).await;
            Err(error.into())
        }
    }
}

async fn take_out(devices: &mut Vec<Device>, vm: &Vm, agent: &Agent, id: &str) {
    let deadline = Deadline::begin(Operation::DetachDisks);
    let unused = |device: &mut Device| device.users.remove(id) && device.users.is_empty();
    for device in devices.extract_if(.., unused).collect::<Vec<_>>() {
        if vm.has_ended() {
            continue;
        }
        if let Err(error) = agent.unbind_device(deadline, device.slot).await {
            tracing::warn!(%error, slot = device.slot, "the guest does not release image layers; are they still mounted or in use in the pod?");
        }
        if let Err(error) = vm.remove_device(deadline, device.slot).await {
            tracing::warn!(%error, slot = device.slot, "the VMM does not release image layers");
        }
    }
}

/// A container cannot have its image layers.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// open(2).
    #[error("cannot open the image layer {path} of the container's root file system; was the image removed?")]
    Open {
        /// As containerd names it.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Something else than a file.
    #[error("the image layer {0} of the container's root file system is no file")]
    NoFile(PathBuf),
    /// Another file.
    #[error("the image layer {0} of the container's root file system is no EROFS")]
    NoErofs(PathBuf),
    /// Nothing in it.
    #[error("the image layer {0} of the container's root file system is empty")]
    Empty(PathBuf),
    /// They come or go for others.
    #[error(
        "image layers of other containers of the pod have come or gone for {0:?}; does the disk with the images answer?"
    )]
    Busy(std::time::Duration),
    /// Sizes beyond all bounds.
    #[error("the image layers of the container are too large for a guest")]
    Lost,
    /// dup(2).
    #[error("cannot keep an image layer open; is the shim out of descriptors?")]
    Copy(#[source] std::io::Error),
    /// The VMM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(inode: u64) -> OpenImage {
        let file = std::fs::File::open("/dev/null").unwrap().into();
        OpenImage { file, identity: Identity { device: 1, inode, size: 4096, changed: (0, 0) } }
    }

    fn device(slot: u8, inodes: &[u64], user: &str) -> Device {
        let images = inodes.iter().map(|inode| image(*inode).identity).collect();
        Device { slot, images, users: HashSet::from([user.to_owned()]), _guard: None }
    }

    #[test]
    fn image_that_the_pod_has_is_not_shown_twice() {
        let mut devices = [device(3, &[1, 2], "c1"), device(4, &[3], "c1")];
        let missing = note_user(&mut devices, "c2", [2, 5, 6, 5].into_iter().map(image));
        let inodes: Vec<Vec<_>> =
            missing.iter().map(|list| list.iter().map(|image| image.identity.inode).collect()).collect();
        assert_eq!(inodes, [[5, 6]]);
        assert!(devices[0].users.contains("c2") && !devices[1].users.contains("c2"));
        let found = place(&devices, &image(2).identity).unwrap();
        assert_eq!((found.slot, found.number), (3, 1));
        assert!(place(&devices, &image(7).identity).is_none());
        let other = Identity { changed: (0, 1), ..image(2).identity };
        assert!(place(&devices, &other).is_none(), "a file that was changed is another image");
    }

    #[test]
    fn more_images_than_a_device_has_are_several() {
        let missing = note_user(&mut [], "c", (0..150).map(image));
        assert_eq!(missing.iter().map(Vec::len).collect::<Vec<_>>(), [MAX_IMAGES, MAX_IMAGES, 150 - 2 * MAX_IMAGES]);
    }

    #[test]
    fn hostile_24_layer_that_is_no_file_with_something_in_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("image"), "x").unwrap();
        std::fs::write(path("empty"), "").unwrap();
        std::os::unix::fs::symlink("image", path("cached")).unwrap();
        std::os::unix::fs::symlink("/dev/null", path("device")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        let open = |name: &str| OpenImage::open(&path(name));
        assert_eq!(open("image").unwrap().identity, open("cached").unwrap().identity);
        assert!(matches!(open("empty"), Err(ImagesError::Empty(_))));
        for name in ["device", "fifo", "."] {
            assert!(matches!(open(name), Err(ImagesError::NoFile(_))), "{name}");
        }
        assert!(matches!(open("none"), Err(ImagesError::Open { .. })));
    }

    #[test]
    fn hostile_24_layer_without_a_superblock_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mut image = vec![0; 4096];
        std::fs::write(path("blob"), &image).unwrap();
        image[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        std::fs::write(path("image"), &image).unwrap();
        std::fs::write(path("short"), &image[..1027]).unwrap();
        let open = |layers: &[Vec<&str>]| {
            let layers = layers.iter().map(|names| names.iter().map(|name| path(name)).collect()).collect();
            OpenLayers::open(&Layered { layers, top: None, volatile: false })
        };
        assert_eq!(open(&[vec!["image", "blob"], vec!["image"]]).unwrap().bytes(), 3 * 4096);
        for wrong in [vec![vec!["blob"]], vec![vec!["short"]], vec![vec!["image"], vec!["blob", "image"]]] {
            assert!(matches!(open(&wrong), Err(ImagesError::NoErofs(_))), "{wrong:?}");
        }
    }
}
