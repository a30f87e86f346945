//! Mounts of a container: file systems of the kernel stay as they are, binds come through the share.

use std::path::{Path, PathBuf};

use bulkhead_protocol::guest::{SHARE_DIR, SHM_DIR};
use oci_spec::runtime::{Mount, Spec};

use super::SpecError;

/// Devices that every kernel has and that behave the same: a bind of one means the guest's own.
const COMMON_DEVICES: [&str; 6] = ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

/// Something of the host that the container sees.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Volume {
    /// File or directory on the host.
    pub source: PathBuf,
    /// With what is mounted below it.
    pub recursive: bool,
    /// The guest must not write.
    pub read_only: bool,
    /// What the host mounts below it later appears as well (HostToContainer).
    pub follows_host: bool,
}

/// Points the binds of a spec to the share and answers what belongs there.
pub fn rewrite(spec: &mut Spec, id: &str) -> Result<Vec<Volume>, SpecError> {
    let mut volumes = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten().filter(|mount| is_bind(mount)) {
        let source = mount.source().clone().filter(|source| !source.as_os_str().is_empty());
        let source = source.ok_or_else(|| SpecError::NoSource(mount.destination().clone()))?;
        if is_pod_shm(mount, &source) {
            mount.set_source(Some(SHM_DIR.into()));
        } else if !COMMON_DEVICES.iter().any(|device| source == Path::new(device)) {
            let volume = volume(mount, source)?;
            mount.set_source(Some(format!("{SHARE_DIR}/{id}/mounts/{}", volumes.len()).into()));
            volumes.push(volume);
        }
    }
    Ok(volumes)
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

fn volume(mount: &Mount, source: PathBuf) -> Result<Volume, SpecError> {
    if options(mount).any(|option| matches!(option, "shared" | "rshared")) {
        return Err(SpecError::Bidirectional(mount.destination().clone()));
    }
    Ok(Volume {
        source,
        recursive: options(mount).any(|option| option == "rbind"),
        read_only: options(mount).any(|option| matches!(option, "ro" | "rro")),
        follows_host: options(mount).any(|option| matches!(option, "slave" | "rslave")),
    })
}
