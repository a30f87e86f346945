//! Why a pod's VM cannot be had.

use super::agent::AgentError;
use super::vm::VmError;
use crate::annotations::AnnotationError;
use crate::config::ConfigError;
use crate::host_files::HostFilesError;
use crate::network::{HandoverError, NetworkError};
use crate::share::ShareError;
use crate::sizing::SizeError;

/// The VM cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// An annotation of the pod.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// A size beyond what the node allows.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Files of the host.
    #[error(transparent)]
    HostFiles(#[from] HostFilesError),
    /// The share.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Servers in the namespace.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The machine.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
}
