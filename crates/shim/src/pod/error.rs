//! Why a task call failed, in the terms of containerd's errors (containerd: api errdefs, gRPC codes).

use bulkhead_protocol::guest::is_identifier;
use ttrpc::Code;

use super::hooks::HookError;
use crate::bundle::BundleError;
use crate::config::ConfigError;
use crate::host_files::HostFilesError;
use crate::io::IoError;
use crate::layers::LayersError;
use crate::network::NetworkError;
use crate::pod::files::FilesError;
use crate::sandbox::agent::AgentError;
use crate::sandbox::{DiskError, ImagesError, ResizeError, SandboxError, VmError};
use crate::share::ShareError;
use crate::spec::SpecError;
use crate::stats::StatsError;

/// A task call failed.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// No such container or exec.
    #[error("{0} not found")]
    NotFound(String),
    /// The process has ended already.
    #[error("process already finished")]
    Finished,
    /// The id is in use.
    #[error("{0} already exists")]
    Exists(String),
    /// Its Create has taken longer than its caller waits.
    #[error("container {0} has been deleted while it was being created")]
    Deleted(String),
    /// Not in this state.
    #[error("cannot {what} a {state} process")]
    State {
        /// What was asked.
        what: &'static str,
        /// Its state.
        state: &'static str,
    },
    /// The VM is gone, or never was.
    #[error(
        "the pod's VM is not running; the shim's log says how it ended. Remove the pod and let it be created again"
    )]
    NoSandbox,
    /// Another pod's container came here.
    #[error(
        "the container belongs to sandbox {0}, but this shim serves another one; its annotations and the pod's do not fit"
    )]
    WrongSandbox(String),
    /// What a VM has no use for.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// What cannot be understood.
    #[error("{0}")]
    Invalid(&'static str),
    /// No process for it on the host.
    #[error(
        "cannot fork the placeholder that stands for the process on the node; is the node out of processes or namespaces (sysctls user.max_*_namespaces)?"
    )]
    HostPid(#[source] std::io::Error),
    /// The call was cut off by the end of the daemon.
    #[error("the shim is ending")]
    Ending,
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The VM.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The VM's size.
    #[error(transparent)]
    Resize(#[from] ResizeError),
    /// Block devices.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Image layers, as containerd describes them.
    #[error(transparent)]
    Layers(#[from] LayersError),
    /// Image layers.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// Files of the host.
    #[error(transparent)]
    HostFiles(#[from] HostFilesError),
    /// Mounts.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// Files of the pod that containerd mounts.
    #[error(transparent)]
    Files(FilesError),
    /// An OCI hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// Standard streams.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Numbers.
    #[error(transparent)]
    Stats(#[from] StatsError),
}

impl TaskError {
    /// The gRPC code that containerd knows this by.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::Finished => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Deleted(_) | Self::State { .. } | Self::NoSandbox | Self::WrongSandbox(_) => {
                Code::FAILED_PRECONDITION
            }
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Invalid(_) | Self::Spec(_) | Self::Layers(_) => Code::INVALID_ARGUMENT,
            Self::Sandbox(SandboxError::Size(_)) => Code::RESOURCE_EXHAUSTED,
            Self::Resize(error) => resize_code(error),
            Self::Sandbox(SandboxError::Vm(VmError::NotReady(..) | VmError::Lingers(_))) => Code::DEADLINE_EXCEEDED,
            Self::Sandbox(SandboxError::Agent(error))
            | Self::Disk(DiskError::Agent(error))
            | Self::Images(ImagesError::Agent(error))
            | Self::Agent(error)
            | Self::Io(IoError::Agent(error)) => agent_code(error),
            Self::Disk(DiskError::Hung(..) | DiskError::Busy(_)) | Self::Images(ImagesError::Busy(_)) => {
                Code::DEADLINE_EXCEEDED
            }
            Self::HostFiles(error)
            | Self::Disk(DiskError::HostFiles(error))
            | Self::Sandbox(SandboxError::HostFiles(error))
            | Self::Io(IoError::HostFiles(error)) => host_files_code(error),
            Self::Disk(_) | Self::Images(_) | Self::Sandbox(SandboxError::Network(NetworkError::Unsupported(_))) => {
                Code::FAILED_PRECONDITION
            }
            Self::Ending | Self::HostPid(_) => Code::UNAVAILABLE,
            Self::Bundle(_)
            | Self::Config(_)
            | Self::Sandbox(_)
            | Self::Share(_)
            | Self::Files(_)
            | Self::Hook(_)
            | Self::Io(_)
            | Self::Stats(_) => Code::UNKNOWN,
        }
    }
}

/// What is the matter with the host.
fn host_files_code(error: &HostFilesError) -> Code {
    match error {
        HostFilesError::Hung(_) | HostFilesError::Stuck(_) => Code::DEADLINE_EXCEEDED,
        HostFilesError::Thread(_) => Code::UNAVAILABLE,
    }
}

/// A VM that cannot grow, and why.
fn resize_code(error: &ResizeError) -> Code {
    match error {
        ResizeError::Size(_) | ResizeError::Vm(VmError::NotPlugged(..)) => Code::RESOURCE_EXHAUSTED,
        ResizeError::Agent(AgentError::Refused { code: Code::RESOURCE_EXHAUSTED, .. }) => Code::RESOURCE_EXHAUSTED,
        ResizeError::Agent(error) => agent_code(error),
        ResizeError::Busy(_) => Code::DEADLINE_EXCEEDED,
        ResizeError::Vm(_) => Code::FAILED_PRECONDITION,
    }
}

/// The guest may choose among the codes of its contract; whatever else it says is `UNKNOWN`. Above all it may not say
/// `UNIMPLEMENTED`, which would make containerd downgrade the shim.
fn agent_code(error: &AgentError) -> Code {
    match error {
        AgentError::Refused { code, .. } => match code {
            Code::NOT_FOUND | Code::ALREADY_EXISTS | Code::FAILED_PRECONDITION | Code::INVALID_ARGUMENT => *code,
            _ => Code::UNKNOWN,
        },
        AgentError::Silent(_) | AgentError::Vm(VmError::ConnectTimeout(..)) => Code::DEADLINE_EXCEEDED,
        AgentError::Vm(VmError::Busy(_)) => Code::UNAVAILABLE,
        AgentError::Release(_) | AgentError::Gone(_) | AgentError::Vm(_) => Code::FAILED_PRECONDITION,
    }
}

/// Fails unless an id is one that containerd gives: it becomes the name of a directory.
pub fn expect_identifier(id: &str, otherwise: &'static str) -> Result<(), TaskError> {
    if is_identifier(id) { Ok(()) } else { Err(TaskError::Invalid(otherwise)) }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn guest_cannot_claim_that_a_method_is_missing() {
        let refused = |code| TaskError::Agent(AgentError::Refused { code, message: String::new() }).code();
        assert_eq!(refused(Code::NOT_FOUND), Code::NOT_FOUND);
        assert_eq!(refused(Code::UNIMPLEMENTED), Code::UNKNOWN);
    }

    #[test]
    fn guest_that_takes_too_long_is_late_at_boot_as_ever_after() {
        let late = Duration::from_secs(1);
        let boot = |error| TaskError::Sandbox(error).code();
        assert_eq!(boot(SandboxError::Agent(AgentError::Silent(late))), Code::DEADLINE_EXCEEDED);
        assert_eq!(boot(SandboxError::Vm(VmError::NotReady(late, String::new()))), Code::DEADLINE_EXCEEDED);
        assert_eq!(TaskError::Agent(AgentError::Silent(late)).code(), Code::DEADLINE_EXCEEDED);
    }
}
