//! Why a pod's share cannot be prepared.

use std::path::{Path, PathBuf};

/// The share cannot be prepared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// A step on a path of the share.
    #[error("cannot {what} {path}")]
    Step {
        /// Which step.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A volume cannot be bound.
    #[error("cannot mount the volume {path} for the pod; does the path exist, and does its file system answer?")]
    Volume {
        /// Its source on the host.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The VMM's mount namespace cannot be had, or takes no mount.
    #[error("cannot mount {path} in the mount namespace of the pod's VMM; the VMM may have ended")]
    Attach {
        /// Where in the share.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The root file system cannot be mounted.
    #[error(
        "cannot mount the container's root file system {path}; does the snapshotter's directory exist, and is the node's kernel able to mount it (module overlay)?"
    )]
    Rootfs {
        /// Its source.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file system type of a rootfs mount that we do not mount.
    #[error(
        "rootfs type {0:?} is not supported; configure containerd's overlayfs, erofs or native snapshotter for this runtime"
    )]
    RootfsType(String),
    /// Options that the kernel's interface cannot take.
    #[error(
        "the image has too many layers: their list is longer than the page of options that mount(2) takes; use an image with fewer layers, or Linux 6.8 or later on the node"
    )]
    TooManyLayers(#[source] std::io::Error),
    /// A socket as a volume.
    #[error("the volume {0} is a socket of the host, which has no peer inside the guest; remove it from the pod")]
    Socket(PathBuf),
    /// A volume without idmapped mounts.
    #[error(
        "the owners of the volume {0} cannot be mapped as the pod's user namespace has them, which its file system, or one below it, cannot do; use another volume, or remove the user namespace from the pod"
    )]
    Unmappable(PathBuf),
    /// A device as a volume.
    #[error("the volume {0} is a device or fifo of the host, which a guest cannot open; remove it from the pod")]
    Device(PathBuf),
    /// A thread for what may block.
    #[error("cannot run a thread for the pod's mounts; is the node out of threads?")]
    Thread(#[source] std::io::Error),
    /// /proc/self/mountinfo.
    #[error("cannot read the mount table; is /proc mounted?")]
    MountTable(#[source] std::io::Error),
}

impl ShareError {
    pub(super) fn at(what: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Step { what, path: path.to_path_buf(), source }
    }

    pub(super) fn attach(path: &Path, source: std::io::Error) -> Self {
        Self::Attach { path: path.to_path_buf(), source }
    }

    pub(super) fn volume(path: &Path, source: std::io::Error) -> Self {
        Self::Volume { path: path.to_path_buf(), source }
    }
}
