//! What of a spec a guest cannot honour.

use bulkhead_protocol::cri::NamespaceMode;
use protobuf::EnumOrUnknown;

use super::asker::Asker;

/// A spec that a guest cannot honour.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The pod wants the host's network.
    #[error(
        "hostNetwork is not possible in a VM, which has a network of its own; remove hostNetwork from the pod or run it with runc"
    )]
    HostNetwork,
    /// The pod wants the host's IPC.
    #[error(
        "hostIPC is not possible in a VM, which has a kernel of its own; remove hostIPC from the pod or run it with runc"
    )]
    HostIpc,
    /// The pod wants to see the host's processes.
    #[error(
        "hostPID is not possible in a VM, whose processes are not the host's; remove hostPID from the pod or run it with runc"
    )]
    HostPid,
    /// The pod wants the host's names.
    #[error(
        "the host's UTS namespace is not possible in a VM, which has a host name of its own; remove what asks for it (hostNetwork of a pod, --uts host) or use runc"
    )]
    HostUts,
    /// The pod wants the host's user namespace, by its path.
    #[error(
        "the host's user namespace is not possible in a VM, whose users are not the host's; remove what names its path or use runc"
    )]
    HostUser,
    /// The pod wants the host's mounts.
    #[error(
        "the host's mount namespace is not possible in a VM, which has mounts of its own; remove what names its path or use runc"
    )]
    HostMounts,
    /// A container without a pod wants a namespace of another container.
    #[error(
        "the container is to share the {0} namespace {1:?}, which is not in its VM: a container without a pod has a VM to itself; give it a namespace of its own, or make a pod of both"
    )]
    SharedNamespace(String, std::path::PathBuf),
    /// A mount shall propagate into the host.
    #[error(
        "the mount at {0:?} is to propagate into the host (Bidirectional), which a VM cannot do; use HostToContainer or None"
    )]
    Bidirectional(std::path::PathBuf),
    /// The container's devices shall be those of a directory of the host.
    #[error(
        "the mount at /dev would replace the container's devices by those of the host, which a VM cannot reach; mount it elsewhere, or run the pod with runc"
    )]
    Dev,
    /// A network interface of the host is to be moved into the container.
    #[error(
        "the container is given a network device of the host (linux.netDevices), which cannot be moved into a VM; remove what adds it, or run the pod with runc"
    )]
    NetDevices,
    /// A seccomp filter asks a program of the host.
    #[error(
        "the container's seccomp filter notifies a listener on the host (listenerPath), which cannot answer for processes of a VM; use a profile without one, or run the pod with runc"
    )]
    SeccompListener,
    /// A `createContainer` hook.
    #[error(
        "the container has an OCI hook createContainer, a program of the host that cannot run inside a VM; remove what adds it, or run the pod with runc"
    )]
    CreateContainerHook,
    /// A device of the host that a guest cannot be given.
    #[error(
        "the container is given the host's device {0:?}, which a VM cannot reach; only block devices are possible: {hint}",
        hint = .1.without_host_devices()
    )]
    Device(std::path::PathBuf, Asker),
    /// Nobody could set up a container.
    #[error(
        "the pod's user namespace has no id 0, as which its containers are set up; map root of users and groups, or remove the user namespace from the pod"
    )]
    NoRoot,
    /// A mode of user namespaces that no pod can have.
    #[error(
        "the pod asks for a user namespace of the mode {0:?}, but it has one of its own (POD) or none (NODE); correct the pod's configuration"
    )]
    UserNamespaceMode(EnumOrUnknown<NamespaceMode>),
    /// Ids beyond what there are.
    #[error("the pod's user namespace maps ids beyond 4294967295; correct its mappings")]
    Ids,
    /// The ids of a volume are to be mapped by a namespace that has no path.
    #[error(
        "the owners of the volume at {0:?} are to be mapped, but the container's user namespace is not one that can be opened; update CRI-O"
    )]
    VolumeIds(std::path::PathBuf),
    /// A bind mount without a source.
    #[error("the mount at {0:?} has no source")]
    NoSource(std::path::PathBuf),
    /// Cannot happen with volumes that [`volumes`](super::volumes) has named.
    #[error("the volume {0:?} is not in the pod's share")]
    NotGiven(std::path::PathBuf),
    /// A pid namespace path that names no process.
    #[error("the pid namespace path {0:?} is not /proc/<pid>/ns/pid")]
    PidPath(std::path::PathBuf),
    /// An exec's process.
    #[error("the exec's process is not an OCI process")]
    Process(#[source] serde_json::Error),
    /// An update's resources.
    #[error("the update's resources are not OCI resources")]
    Resources(#[source] serde_json::Error),
    /// Cannot happen with what was parsed before.
    #[error("cannot encode the spec")]
    Encode(#[source] serde_json::Error),
}
