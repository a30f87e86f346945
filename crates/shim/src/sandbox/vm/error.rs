//! Why a VM cannot be had, or does not do what it is asked for.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_protocol::control::ControlError;

/// The machine cannot be had, or is gone.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No KVM.
    #[error("cannot open /dev/kvm; enable virtualization in the firmware and load kvm_intel or kvm_amd")]
    NoKvm(#[source] std::io::Error),
    /// A file of the installation.
    #[error(
        "cannot open the {what} {path}; install it, or set `{what}` in Bulkhead's configuration (/etc/bulkhead/config.toml)"
    )]
    NoFile {
        /// Its key in the configuration.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// open(2).
        #[source]
        source: std::io::Error,
    },
    /// The VMM cannot be run.
    #[error(
        "cannot start the VMM {path}; is it installed and executable, and `vmm` in /etc/bulkhead/config.toml its path?"
    )]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// execve(2).
        #[source]
        source: std::io::Error,
    },
    /// pidfd_open(2).
    #[error("cannot open a pidfd for the VMM's process; is the node out of file descriptors?")]
    Process(#[source] std::io::Error),
    /// A socket or pipe.
    #[error("cannot create a socket or pipe for the VMM; is the node out of file descriptors?")]
    Socket(#[source] std::io::Error),
    /// The control socket.
    #[error("cannot talk to the VMM over its control socket; are shim and VMM of the same release?")]
    Control(#[source] ControlError),
    /// The VMM says no.
    #[error("the VMM refused a request: {0}")]
    Refused(String),
    /// The guest or the VMM ended while booting.
    #[error("the guest ended before it was ready: {how}; last words: {last_words:?}")]
    DiedEarly {
        /// How.
        how: &'static str,
        /// Of the guest's console, or of the VMM.
        last_words: String,
    },
    /// A signal ended the VMM while booting, the out-of-memory killer's above all.
    #[error(
        "signal {0} ended the VMM before the guest was ready; if it was SIGKILL, raise the pod's memory limit, which has to \
         hold the guest's kernel as well"
    )]
    Killed(i32),
    /// The guest took too long.
    #[error(
        "the guest did not boot within {0:?}; its last words: {1:?}; on a slow or busy node raise boot_timeout_s in /etc/bulkhead/config.toml"
    )]
    NotReady(Duration, String),
    /// The VM is gone.
    #[error("the pod's VM has ended; the shim's log says why, and the pod has to be created again")]
    Ended,
    /// The VMM does not end.
    #[error("the pod's VMM is still there {0:?} after it was killed; does a disk of the host answer?")]
    Lingers(Duration),
    /// The VMM did not answer.
    #[error(
        "the pod's VMM has not answered within {0:?}; a disk of the node that hangs, or a node without free CPU, may hold it up: look at the node's kernel log, and remove the pod if it stays so"
    )]
    Silent(Duration),
    /// The VMM answered something else.
    #[error("the pod's VMM sent an answer that does not fit the request; are shim and VMM of the same release?")]
    Unexpected,
    /// The guest does not take the memory.
    #[error(
        "the guest did not plug {0} MiB of memory within {1:?}; is the pod short of CPU or the node of memory? lower the pod's memory limits, or create the pod again"
    )]
    NotPlugged(u64, Duration),
    /// The VMM reads nothing.
    #[error("the pod's VMM does not read its socket, and {0} requests wait already; remove the pod")]
    Busy(usize),
    /// The guest did not accept.
    #[error(
        "the guest did not accept a vsock connection to port {0} within {1:?}; it may be short of CPU, or hang: remove the pod if this stays so"
    )]
    ConnectTimeout(u32, Duration),
}
