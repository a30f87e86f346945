//! User namespaces: the pod gets one in the guest that maps its ids to the same numbers.
//!
//! On a host the namespace's job is to map the pod's ids away from the host's. Here no id of the guest means anything on the
//! host, so that job is done; what is left is that the pod's root has no capabilities over the guest. With the same numbers
//! inside and outside, files need no id-mapped mounts (mount_setattr(2)): containerd keeps them by the container's ids on
//! disk.

use oci_spec::runtime::Spec;

/// Leaves the ids to the pod's namespace.
pub fn rewrite(spec: &mut Spec) {
    for mount in spec.mounts_mut().iter_mut().flatten() {
        mount.set_uid_mappings(None).set_gid_mappings(None);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_uid_mappings(None).set_gid_mappings(None);
    }
}
