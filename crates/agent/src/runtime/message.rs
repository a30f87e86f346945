//! What the agent sends a helper and gets back: one message each way, framed as those of
//! [`bulkhead_protocol::control`]. The request carries the new process's stdin, stdout and stderr and what it shall hold up
//! to its program, the reply the master of its terminal.

use std::path::PathBuf;

use bulkhead_protocol::agent::{IdRange, UserNamespace};
use oci_spec::runtime::{Hook, LinuxCapabilities, PosixRlimit};
use serde::{Deserialize, Serialize};

/// Agent to helper.
#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Request {
    /// What to create.
    pub action: Action,
    /// User that the process will run as; its streams are made that user's, so that it can open /dev/stdout.
    pub uid: u32,
    /// The process gets a terminal of this size.
    pub terminal: Option<WindowSize>,
}

/// What a helper can create.
#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Action {
    /// A container from `bundle`/config.json, its state below `state`, and its startContainer hooks.
    Create {
        id: String,
        bundle: PathBuf,
        state: PathBuf,
        hooks: Vec<Hook>,
        rlimits: Vec<PosixRlimit>,
        seccomp: Option<Seccomp>,
    },
    /// A process in a container, both described by files of JSON, and its control group below the container's.
    Exec {
        id: String,
        state: PathBuf,
        process: PathBuf,
        cgroup: Option<String>,
        oom_score_adj: Option<i32>,
        rlimits: Vec<PosixRlimit>,
        seccomp: Option<Seccomp>,
    },
    /// A pid namespace, and a user and a network namespace with it if ids are given to map.
    PidNamespace { user: Option<IdMaps> },
}

/// The seccomp filter of a process, and the capabilities that it has when the filter is in place: see
/// [`super::executor::Confinement`].
#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Seccomp {
    /// File of the compiled filter, to be made if there is a profile.
    pub filter: PathBuf,
    /// File of the profile that is to be compiled.
    pub profile: Option<PathBuf>,
    /// `None` if the process keeps what it has.
    pub capabilities: Option<LinuxCapabilities>,
}

/// Ids of a user namespace, as the lines of its maps (user_namespaces(7)).
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct IdMaps {
    /// `/proc/PID/uid_map`.
    pub uids: String,
    /// `/proc/PID/gid_map`.
    pub gids: String,
}

impl IdMaps {
    /// Those of a namespace, each id mapped to itself.
    pub fn of(user: &UserNamespace) -> Self {
        let line = |range: &IdRange| format!("{0} {0} {1}\n", range.first, range.count);
        Self { uids: user.uids.iter().map(line).collect(), gids: user.gids.iter().map(line).collect() }
    }
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct WindowSize {
    /// Columns; 0 leaves the kernel's.
    pub width: u16,
    /// Rows; 0 leaves the kernel's.
    pub height: u16,
}

/// Helper to agent.
#[derive(Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Reply {
    /// The process exists.
    Created { pid: u32 },
    /// It does not, and this is why.
    Failed { message: String },
}
