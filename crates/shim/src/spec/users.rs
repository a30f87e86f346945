//! User namespaces: the pod gets one in the guest that maps its ids to the same numbers.
//!
//! On a host the namespace's job is to map the pod's ids away from the host's. Here no id of the guest means anything on the
//! host, so that job is done; what is left is that the pod's root has no capabilities over the guest.
//!
//! containerd keeps files by the container's ids on disk: with the same numbers inside and outside nothing has to be mapped.
//! CRI-O keeps a container's root file system by the host's ids, and asks for volumes that are mapped there
//! (mount_setattr(2)). So the file server of such a pod maps all owners back.

use std::path::PathBuf;

use bulkhead_protocol::agent::{IdRange, UserNamespace};
use bulkhead_protocol::vmspec::{IdMap, IdMaps};
use oci_spec::runtime::{Linux, LinuxIdMapping, LinuxNamespaceType, Mount, Spec};

use super::SpecError;
use crate::annotations;

/// Leaves the ids to the pod's namespace.
pub fn rewrite(spec: &mut Spec) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        mount.set_uid_mappings(None).set_gid_mappings(None);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_uid_mappings(None).set_gid_mappings(None);
    }
}

/// The pod's user namespace, with ids by their first numbers and counts as its processes see them. One without root has
/// nobody in it who could set up a container.
pub fn namespace(
    uids: impl Iterator<Item = (u32, u32)>,
    gids: impl Iterator<Item = (u32, u32)>,
) -> Result<UserNamespace, SpecError> {
    let user = UserNamespace { uids: ranges(uids), gids: ranges(gids), ..UserNamespace::default() };
    let has_root = |ids: &[IdRange]| ids.iter().any(|range| range.first == 0 && range.count > 0);
    if has_root(&user.uids) && has_root(&user.gids) { Ok(user) } else { Err(SpecError::NoRoot) }
}

fn ranges(ids: impl Iterator<Item = (u32, u32)>) -> Vec<IdRange> {
    ids.map(|(first, count)| IdRange { first, count, ..IdRange::default() }).collect()
}

/// A container's ids and counts of mappings in OCI's form.
pub fn inside(mappings: &Option<Vec<LinuxIdMapping>>) -> impl Iterator<Item = (u32, u32)> {
    mappings.iter().flatten().map(|mapping| (mapping.container_id(), mapping.size()))
}

/// How the owners of files in a pod's share are to be mapped, by the spec of its sandbox.
pub fn of_share(spec: &Spec) -> Result<IdMaps, SpecError> {
    match spec.linux() {
        Some(linux) if is_mapped_on_disk(spec) => {
            Ok(IdMaps { uids: maps(linux.uid_mappings())?, gids: maps(linux.gid_mappings())? })
        }
        _ => Ok(IdMaps::default()),
    }
}

fn maps(mappings: &Option<Vec<LinuxIdMapping>>) -> Result<Vec<IdMap>, SpecError> {
    let map = |mapping: &LinuxIdMapping| {
        let (guest, host, count) = (mapping.container_id(), mapping.host_id(), mapping.size());
        let ends = guest.checked_add(count).and(host.checked_add(count));
        ends.map(|_| IdMap { guest, host, count }).ok_or(SpecError::Ids)
    };
    mappings.iter().flatten().map(map).collect()
}

/// Whether a pod's files are kept by the host's ids.
fn is_mapped_on_disk(spec: &Spec) -> bool {
    spec.annotations().as_ref().is_some_and(annotations::is_of_crio) && spec.linux().as_ref().is_some_and(has_namespace)
}

fn has_namespace(linux: &Linux) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User)
}

/// Where the user namespace of a container is by whose ids volumes are to be mapped; none if they are to stay as they are.
pub fn of_volumes(spec: &Spec) -> Option<PathBuf> {
    let linux = spec.linux().as_ref().filter(|_| is_mapped_on_disk(spec))?;
    let user = linux.namespaces().iter().flatten().find(|one| one.typ() == LinuxNamespaceType::User)?;
    Some(user.path().clone().unwrap_or_default())
}

/// The namespace by whose ids a volume is to be mapped, if the mount asks for that.
pub fn of_volume(mount: &Mount, namespace: Option<&PathBuf>) -> Result<Option<PathBuf>, SpecError> {
    let asks = mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
    match namespace.filter(|_| asks) {
        Some(path) if path.as_os_str().is_empty() => Err(SpecError::VolumeIds(mount.destination().clone())),
        found => Ok(found.cloned()),
    }
}
