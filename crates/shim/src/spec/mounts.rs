//! Mounts of a container: file systems of the kernel stay as they are, binds come through the share.

use std::path::{Path, PathBuf};

use bulkhead_protocol::guest::{SHARE_DIR, SHARED_VOLUMES, SHM_DIR, VOLUMES_DIR};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceBuilder, LinuxDeviceType, Mount, Spec};

use super::devices::COMMON_DEVICES;
use super::{HugeVolume, SpecError, users};
use crate::annotations;

/// Something of the host that the container sees.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Volume {
    /// File or directory on the host.
    pub source: PathBuf,
    /// With what is mounted below it.
    pub recursive: bool,
    /// Whether the guest may write.
    pub access: Access,
    /// What the host mounts below it later appears as well (HostToContainer), read-only if the volume is.
    pub follows_host: bool,
    /// The guest keeps a copy of it and is told of updates, which raise inotify(7) events in it then.
    pub copied: bool,
    /// An emptyDir of this pod: the host has nothing in it that the pod may not change.
    pub scratch: bool,
    /// The user namespace by whose ids its owners are mapped on the host.
    pub mapped_by: Option<PathBuf>,
}

/// What the guest may do with a volume.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read, also what is mounted below it, whether the mount says `ro` or `rro` (`recursiveReadOnly` of Kubernetes). A bind
    /// mount leaves mounts below it writable (mount(8)), and runc goes by that: there the modes of files stop a container.
    /// Here the file server is root, and a guest's kernel would write what it likes in the host's /proc and /sys.
    ReadOnly,
}

/// A volume that is in the pod's share.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GuestVolume {
    /// What it is on the host.
    pub host: Volume,
    /// Its name in the share.
    pub number: u64,
}

impl GuestVolume {
    /// Where a container binds it from: the share, or the guest's copy of it.
    fn guest_path(&self, container: &str) -> PathBuf {
        let dir = if self.host.copied {
            Path::new(VOLUMES_DIR).join(container)
        } else {
            Path::new(SHARE_DIR).join(SHARED_VOLUMES)
        };
        dir.join(self.number.to_string())
    }
}

/// What a bind of a container leads to.
enum Bound {
    /// Something that is in the guest, at this place.
    Guest(PathBuf),
    /// A volume of the host.
    Volume(Volume),
}

/// What one has to know of a spec to say where its binds lead. Read before anything of the spec is rewritten.
pub struct Binds<'a> {
    huge: &'a [HugeVolume],
    pod: Option<String>,
    users: Option<PathBuf>,
}

impl<'a> Binds<'a> {
    /// Those of a spec, some of which are these volumes of huge pages.
    pub fn of(spec: &Spec, huge: &'a [HugeVolume]) -> Self {
        let pod = spec.annotations().as_ref().and_then(annotations::pod_uid).map(str::to_owned);
        Self { huge, pod, users: users::of_volumes(spec) }
    }

    /// `None` for a mount that is no bind, or one of a device that every guest has at the same place.
    fn bound(&self, mount: &Mount) -> Result<Option<Bound>, SpecError> {
        if !is_bind(mount) {
            return Ok(None);
        }
        let source = mount.source().clone().filter(|source| !source.as_os_str().is_empty());
        let source = source.ok_or_else(|| SpecError::NoSource(mount.destination().clone()))?;
        if mount.destination() == Path::new("/dev") {
            return Err(SpecError::Dev);
        }
        if is_pod_shm(mount, &source) {
            return Ok(Some(Bound::Guest(SHM_DIR.into())));
        }
        if let Some(volume) = self.huge.iter().find(|volume| volume.source == source) {
            return Ok(Some(Bound::Guest(volume.guest_path())));
        }
        if common_device(&source).is_some() {
            return Ok(None);
        }
        let mapped_by = users::of_volume(mount, self.users.as_ref())?;
        Ok(Some(Bound::Volume(Volume { mapped_by, ..volume(mount, source, self.pod.as_deref())? })))
    }
}

/// The volumes that a spec binds, each once.
pub fn volumes(spec: &Spec, huge: &[HugeVolume]) -> Result<Vec<Volume>, SpecError> {
    let binds = Binds::of(spec, huge);
    let mut volumes = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        if let Some(Bound::Volume(volume)) = binds.bound(mount)?
            && !volumes.contains(&volume)
        {
            volumes.push(volume);
        }
    }
    Ok(volumes)
}

/// Points the binds of a container's spec to where in the guest they lead. No bind keeps a path of the host.
pub fn rewrite(spec: &mut Spec, id: &str, binds: &Binds<'_>, volumes: &[GuestVolume]) -> Result<(), SpecError> {
    put_devices_in_place(spec);
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let place = match binds.bound(mount)? {
            None => continue,
            Some(Bound::Guest(place)) => place,
            Some(Bound::Volume(volume)) => {
                let given = volumes.iter().find(|given| given.host == volume);
                given.ok_or_else(|| SpecError::NotGiven(volume.source.clone()))?.guest_path(id)
            }
        };
        mount.set_source(Some(place));
    }
    Ok(())
}

fn common_device(path: &Path) -> Option<(i64, i64)> {
    COMMON_DEVICES.iter().find(|(device, _)| path == Path::new(device)).map(|(_, number)| *number)
}

/// Makes a device node of a bind of one device onto another (urandom at /dev/random is the usual one): where a container has
/// a device anyway, libcontainer makes its node after the mounts and finds the place taken, but leaves those of the spec.
fn put_devices_in_place(spec: &mut Spec) {
    let mut devices: Vec<LinuxDevice> = Vec::new();
    if let Some(mounts) = spec.mounts_mut() {
        mounts.retain(|mount| {
            let device = in_place(mount);
            let stays = device.is_none();
            devices.extend(device);
            stays
        });
    }
    let Some(linux) = spec.linux_mut() else { return };
    for device in devices {
        let all = linux.devices_mut().get_or_insert_default();
        // What is mounted last is what is seen.
        all.retain(|other| other.path() != device.path());
        all.push(device);
    }
}

/// The node that a bind of a device onto one of a container's own amounts to.
fn in_place(mount: &Mount) -> Option<LinuxDevice> {
    let (major, minor) = common_device(mount.source().as_deref().filter(|_| is_bind(mount))?)?;
    let place = COMMON_DEVICES.iter().find(|(device, _)| mount.destination() == Path::new(device))?.0;
    let device = LinuxDeviceBuilder::default().path(place).typ(LinuxDeviceType::C).major(major).minor(minor);
    device.file_mode(0o666_u32).build().ok()
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || options(mount).any(|option| matches!(option, "bind" | "rbind"))
}

/// The pod's shared memory: a tmpfs that containerd or CRI-O mounted, always called `shm`. An emptyDir of the pod may have
/// that name too, and is a volume.
fn is_pod_shm(mount: &Mount, source: &Path) -> bool {
    mount.destination() == Path::new("/dev/shm")
        && source.file_name().is_some_and(|name| name == "shm")
        && !source.to_string_lossy().contains("kubernetes.io~")
}

fn volume(mount: &Mount, source: PathBuf, pod: Option<&str>) -> Result<Volume, SpecError> {
    if options(mount).any(|option| matches!(option, "shared" | "rshared")) {
        return Err(SpecError::Bidirectional(mount.destination().clone()));
    }
    let access = access(mount);
    Ok(Volume {
        copied: access != Access::ReadWrite && is_kept_by_kubelet(&source),
        scratch: pod.is_some_and(|uid| is_empty_dir(&source, uid)),
        source,
        access,
        recursive: options(mount).any(|option| option == "rbind"),
        follows_host: options(mount).any(|option| matches!(option, "slave" | "rslave")),
        mapped_by: None,
    })
}

fn access(mount: &Mount) -> Access {
    let read_only = options(mount).any(|option| matches!(option, "ro" | "rro"));
    if read_only { Access::ReadOnly } else { Access::ReadWrite }
}

/// Components of a path that say that it is an emptyDir of a pod.
pub const SCRATCH_DEPTH: usize = 5;

/// An emptyDir of the pod with this uid, by its place: `<root>/pods/<uid>/volumes/<plugin>/<name>`.
fn is_empty_dir(source: &Path, uid: &str) -> bool {
    let place = Path::new("pods").join(uid).join("volumes/kubernetes.io~empty-dir");
    source.parent().is_some_and(|parent| parent.ends_with(place))
}

/// Volumes of small files that the kubelet writes and updates, by their place: `<pod>/volumes/<plugin>/<name>`
/// (kubernetes: pkg/kubelet/kubelet_getters.go).
fn is_kept_by_kubelet(source: &Path) -> bool {
    const PLUGINS: [&str; 4] =
        ["kubernetes.io~configmap", "kubernetes.io~secret", "kubernetes.io~projected", "kubernetes.io~downward-api"];
    let plugin = source.parent().and_then(Path::file_name);
    plugin.is_some_and(|plugin| PLUGINS.iter().any(|known| plugin == *known))
}
