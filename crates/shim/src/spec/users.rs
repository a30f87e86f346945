//! User namespaces: the container gets one in the guest that maps its ids to the same numbers.
//!
//! On a host the namespace's job is to map the container's ids away from the host's. Here no id of the guest means anything
//! on the host, so that job is done; what is left is that the container's root has no capabilities over the guest. With the
//! same numbers inside and outside, files need no id-mapped mounts (mount_setattr(2)): containerd keeps them by the
//! container's ids on disk.

use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespaceType, Spec};

use super::{PidChoice, SpecError};

/// Maps each id to itself.
pub fn rewrite(spec: &mut Spec, pid: PidChoice) -> Result<(), SpecError> {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        mount.set_uid_mappings(None).set_gid_mappings(None);
    }
    let Some(linux) = spec.linux_mut() else { return Ok(()) };
    if !linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
        linux.set_uid_mappings(None).set_gid_mappings(None);
        return Ok(());
    }
    // The pod's pid namespace is the guest's own, not the container's user namespace's, and could not be entered.
    if pid != PidChoice::Own {
        return Err(SpecError::UserAndPid);
    }
    let uids = same_numbers(linux.uid_mappings());
    let gids = same_numbers(linux.gid_mappings());
    linux.set_uid_mappings(uids).set_gid_mappings(gids);
    Ok(())
}

fn same_numbers(mappings: &Option<Vec<LinuxIdMapping>>) -> Option<Vec<LinuxIdMapping>> {
    let same = |mapping: &LinuxIdMapping| {
        let (id, size) = (mapping.container_id(), mapping.size());
        LinuxIdMappingBuilder::default().container_id(id).host_id(id).size(size).build().ok()
    };
    mappings.as_ref()?.iter().map(same).collect()
}
