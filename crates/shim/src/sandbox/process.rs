//! Records of processes, for the one who cleans up after a shim that was killed.

use std::path::Path;
use std::time::Duration;

use bulkhead_protocol::node::ProcessRecord;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// How long a killed process may take to be gone; containerd gives the whole of `delete` 5 s.
const DEATH: Duration = Duration::from_secs(2);

/// Writes a process's record. Without one, cleaning up after a crash has less to go by; nothing else fails.
pub fn record(file: &Path, pid: u32) {
    if let Some(start_time) = start_time(pid)
        && let Err(error) = std::fs::write(file, ProcessRecord { pid, start_time }.to_string())
    {
        tracing::warn!(%error, file = %file.display(), "cannot record a process");
    }
}

/// Kills the recorded process and waits until it is gone. Nothing happens if it is not that process any more, or if it is
/// the calling one.
pub fn kill_recorded(file: &Path) {
    let Ok(text) = std::fs::read_to_string(file) else { return };
    let Ok(record) = text.parse::<ProcessRecord>() else { return };
    let pid = record.pid;
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    if pid == std::process::id() {
        return;
    }
    // Opened before the check: a pidfd stays with its process.
    let Ok(pidfd) = pidfd_open(raw, PidfdFlags::empty()) else { return };
    if start_time(pid) != Some(record.start_time) {
        return;
    }
    if pidfd_send_signal(&pidfd, Signal::KILL).is_ok() {
        let timeout = Timespec::try_from(DEATH).ok();
        let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], timeout.as_ref());
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, is in parentheses and may hold spaces; field 3 comes after the last one.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_process_is_killed_and_another_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let start_time = start_time(child.id()).unwrap() + 1;
        std::fs::write(&file, ProcessRecord { pid: child.id(), start_time }.to_string()).unwrap();
        kill_recorded(&file);
        assert!(child.try_wait().unwrap().is_none(), "a later process with the same pid");
        record(&file, child.id());
        kill_recorded(&file);
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn nonsense_and_ourselves_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        kill_recorded(&file);
        std::fs::write(&file, "1").unwrap();
        kill_recorded(&file);
        record(&file, std::process::id());
        kill_recorded(&file);
    }
}
