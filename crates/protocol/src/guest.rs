//! Fixed names and bounds that host and guest agree on.

/// vsock port on which the agent serves `bulkhead.agent.v1.Agent`.
pub const AGENT_RPC_PORT: u32 = 1024;

/// vsock port on which the agent accepts standard streams, see [`crate::stdio`].
pub const AGENT_STDIO_PORT: u32 = 1025;

/// vsock port on which the agent accepts connections for the guest's localhost, see [`crate::forward`].
pub const AGENT_FORWARD_PORT: u32 = 1026;

/// vsock port on which the agent accepts connections for what it hands to the host, see [`crate::handover`].
pub const AGENT_HANDOVER_PORT: u32 = 1027;

/// Host port that the agent tries to connect to, once, when all of its ports listen. The VMM resets that connection like
/// every one that a guest starts; that the request came is the sign that the guest is ready.
pub const READY_PORT: u32 = 1024;

/// The guest's vsock address. Every guest has the same: a VMM's device knows one guest only.
pub const GUEST_CID: u64 = 3;

/// virtiofs tag of the pod's share.
pub const SHARE_TAG: &str = "share";

/// Where the agent mounts the pod's share.
pub const SHARE_DIR: &str = "/run/bulkhead/share";

/// A container's root file system in the share: `<container id>/rootfs`.
pub const ROOT_DIR: &str = "rootfs";

/// Where in the share a container's overlay has its upper and work directory, if the guest makes the overlay:
/// `<container id>/.bulkhead-upper/{fs,work}`. Neither the container nor the guest can do anything else there.
pub const UPPER_DIR: &str = ".bulkhead-upper";

/// The upper directory's name and the work directory's: those that containerd's erofs snapshotter gives them.
pub const UPPER_NAMES: [&str; 2] = ["fs", "work"];

/// Where the agent mounts layers of images, each under the slot and the number that it has there.
pub const LAYERS_DIR: &str = "/run/bulkhead/layers";

/// Directory of the share with the volumes that containers have, each under its number, which is its only name. The dot keeps
/// it apart from containers' ids.
pub const SHARED_VOLUMES: &str = ".volumes";

/// Where the agent mounts volumes of huge pages, each under its name.
pub const HUGE_PAGES_DIR: &str = "/run/bulkhead/hugepages";

/// The pod's /dev/shm in the guest.
pub const SHM_DIR: &str = "/run/bulkhead/shm";

/// Where the agent keeps copies of volumes that the kubelet updates, see `CreateContainerRequest` in agent.proto.
pub const VOLUMES_DIR: &str = "/run/bulkhead/volumes";

/// In a volume as the kubelet's atomic writer lays it out, the link that names the current version (kubernetes:
/// pkg/volume/util/atomic_writer.go).
pub const DATA_LINK: &str = "..data";

/// Longest identifier in bytes.
pub const MAX_IDENTIFIER: usize = 76;

/// Whether a text can be the id of a container or an exec, or a namespace of containerd's: containerd's own rule (containerd:
/// pkg/identifiers/validate.go), which makes them safe as names of files and control groups.
pub fn is_identifier(text: &str) -> bool {
    text.len() <= MAX_IDENTIFIER
        && text.split(['.', '_', '-']).all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric()))
}

/// Longest answer of the agent's in bytes; the shim ends a connection on which a longer one comes. The longest honest one
/// is a container's numbers, some 5 KiB; texts are cut by the agent.
pub const MAX_ANSWER: usize = 32 << 10;

/// Most disks, and most interfaces, whose numbers the agent sends and the shim passes on: a container may make any number
/// of them, and all must fit into an answer of [`MAX_ANSWER`].
pub const MAX_STATS_ENTRIES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_fit_for_file_names() {
        for id in ["a", "3f0c", "web-1.2_b", &"x".repeat(76)] {
            assert!(is_identifier(id), "{id}");
        }
        for id in ["", ".", "..", "-a", "a.", "a..b", "a/b", "a b", "a+b", "a\n", "\u{e9}", &"x".repeat(77)] {
            assert!(!is_identifier(id), "{id}");
        }
    }
}
