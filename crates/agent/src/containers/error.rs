//! What can go wrong with a container.

use std::io;

use bulkhead_protocol::guest::MAX_IDENTIFIER;

use crate::cgroup::CgroupError;
use crate::layers::LayerError;
use crate::runtime::RuntimeError;
use crate::volumes::VolumeError;

/// A request on a container cannot be fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// Unknown id.
    #[error("there is no container {id}")]
    NoContainer { id: String },
    /// Unknown exec id, or init of a container that is being created.
    #[error("container {id} has no process \"{exec_id}\"")]
    NoProcess { id: String, exec_id: String },
    /// It is gone already.
    #[error("process \"{exec_id}\" of container {id} has ended")]
    Ended { id: String, exec_id: String },
    /// The id is in use.
    #[error("container {id} exists already; delete it first")]
    ContainerExists { id: String },
    /// The id is in use.
    #[error("container {id} has a process \"{exec_id}\" already; delete it first")]
    ExecExists { id: String, exec_id: String },
    /// Not now.
    #[error("{id} is {is}; it must be {wanted} for this")]
    State { id: String, is: &'static str, wanted: &'static str },
    /// Not fit for a file name.
    #[error("\"{id}\" is no valid id: letters and digits with single . _ or - between them, at most {MAX_IDENTIFIER}")]
    BadId { id: String },
    /// JSON that is not what the OCI specification says.
    #[error("the OCI {what} is not understood")]
    Json { what: &'static str, source: serde_json::Error },
    /// The spec lacks something.
    #[error("the OCI spec has no {what}")]
    Incomplete { what: &'static str },
    /// Something that is not the container's.
    #[error(
        "the OCI spec has {field} of the host's or the pod's, which the shim leaves out; are shim and guest image of one release?"
    )]
    LeftIn { field: &'static str },
    /// It names something else.
    #[error("chdir to cwd {cwd:?} set in config.json failed")]
    WorkingDirectory { cwd: std::path::PathBuf, source: rustix::io::Errno },
    /// The process has no terminal.
    #[error("process \"{exec_id}\" of container {id} has no terminal")]
    NoTerminal { id: String, exec_id: String },
    /// ioctl(2).
    #[error("cannot resize the terminal")]
    Resize(#[source] rustix::io::Errno),
    /// pipe(2), dup(2).
    #[error("cannot make the standard streams of a process")]
    Streams(#[source] rustix::io::Errno),
    /// Not a signal's number.
    #[error("{signal} is no signal; they are numbered 0 to 64")]
    BadSignal { signal: u32 },
    /// kill(2).
    #[error("cannot send signal {signal} to process {pid}")]
    Signal { pid: u32, signal: u32, source: io::Error },
    /// Its init was killed.
    #[error("the pod's shared namespaces have ended; its containers cannot be created any more, start the pod anew")]
    NoPodNamespace,
    /// A container cannot have more than its pod.
    #[error("the container asks for a user namespace and its pod has none")]
    NoUserNamespace,
    /// The event loop ends.
    #[error("the agent is ending")]
    Ending,
    /// A volume of which the guest keeps a copy.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Image layers.
    #[error(transparent)]
    Layers(#[from] LayerError),
    /// The control group.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The creation of a process.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}
