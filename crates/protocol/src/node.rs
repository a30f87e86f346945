//! What the processes of a node and the operator's commands agree on: where a shim records its pod's processes, and which
//! capabilities these have.

use std::fmt;
use std::str::FromStr;

use rustix::thread::CapabilitySet;

/// Root of the pods' directories, each `<namespace>/<sandbox id>` below it.
pub const RUN_ROOT: &str = "/run/bulkhead";

/// The shim's record in a pod's directory.
pub const SHIM_RECORD: &str = "shim.pid";

/// The VMM's record in a pod's directory.
pub const VMM_RECORD: &str = "vmm.pid";

/// A link in a pod's directory to the socket of its shim.
pub const SHIM_SOCKET: &str = "shim.sock";

/// The record of a process. The start time tells it from another process that got the same pid later.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ProcessRecord {
    /// Its pid on the node.
    pub pid: u32,
    /// When it was started, in clock ticks since the boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

impl fmt::Display for ProcessRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.pid, self.start_time)
    }
}

impl FromStr for ProcessRecord {
    type Err = RecordError;

    fn from_str(text: &str) -> Result<Self, RecordError> {
        let parse = || {
            let (pid, start_time) = text.trim_end().split_once(' ')?;
            Some(Self { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? })
        };
        parse().ok_or(RecordError)
    }
}

/// A text that is no record.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("it is not the record of a process, a pid and a start time")]
pub struct RecordError;

/// What the VMM's file server keeps, and no other of its threads: it acts for users of the guest on files of the share. Not
/// CAP_MKNOD (a guest makes no device nodes), and not CAP_DAC_READ_SEARCH, which opens files of the host by handle, beyond
/// any root. A bit for each capability, as in /proc.
pub const FILE_SERVER_CAPABILITIES: u64 = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .bits();

/// Capabilities over the node as a whole, rather than over what a pod is made of: a shim drops them. A bit for each.
pub const NODE_CAPABILITIES: u64 = CapabilitySet::AUDIT_CONTROL
    .union(CapabilitySet::AUDIT_READ)
    .union(CapabilitySet::AUDIT_WRITE)
    .union(CapabilitySet::BLOCK_SUSPEND)
    .union(CapabilitySet::CHECKPOINT_RESTORE)
    .union(CapabilitySet::IPC_OWNER)
    .union(CapabilitySet::LEASE)
    .union(CapabilitySet::LINUX_IMMUTABLE)
    .union(CapabilitySet::MAC_ADMIN)
    .union(CapabilitySet::MAC_OVERRIDE)
    .union(CapabilitySet::NET_BROADCAST)
    .union(CapabilitySet::SYS_BOOT)
    .union(CapabilitySet::SYS_MODULE)
    .union(CapabilitySet::SYS_PACCT)
    .union(CapabilitySet::SYS_RAWIO)
    .union(CapabilitySet::SYS_TIME)
    .union(CapabilitySet::SYS_TTY_CONFIG)
    .union(CapabilitySet::SYSLOG)
    .union(CapabilitySet::WAKE_ALARM)
    .bits();

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_is_read_as_it_was_written() {
        let record = ProcessRecord { pid: 42, start_time: 1 << 40 };
        assert_eq!(record.to_string(), "42 1099511627776");
        assert_eq!(record.to_string().parse(), Ok(record));
        assert_eq!("42 1099511627776\n".parse(), Ok(record));
        for nonsense in ["", "42", "42 ", " 1", "-1 1", "42 1 1", "a b"] {
            assert_eq!(nonsense.parse::<ProcessRecord>(), Err(RecordError), "{nonsense:?}");
        }
    }
}
