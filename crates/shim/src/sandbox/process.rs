//! Records of processes, for the one who cleans up after a shim that was killed.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Instant;

use bulkhead_protocol::node::ProcessRecord;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::deadlines::Operation;

/// Writes a process's record. Without one, cleaning up after a crash has less to go by; nothing else fails.
pub fn record(file: &Path, pid: u32) {
    if let Some(start_time) = start_time(pid)
        && let Err(error) = std::fs::write(file, ProcessRecord { pid, start_time }.to_string())
    {
        tracing::warn!(%error, file = %file.display(), "cannot record a process");
    }
}

/// Kills the recorded processes and waits until they are gone. Nothing happens to one that is not that process any more, or
/// is the calling one.
pub fn kill_recorded(files: &[&Path]) {
    let deadline = Instant::now() + Operation::KillLeftovers.budget();
    // Twice: a daemon may start its VMM, and record it, just before it is killed.
    for _ in 0..2 {
        wait(files.iter().filter_map(|file| kill(file)).collect(), deadline);
    }
}

/// Kills one process, and answers with what tells its end.
fn kill(file: &Path) -> Option<OwnedFd> {
    let record = read(file).filter(|record| record.pid != std::process::id())?;
    // Opened before the check: a pidfd stays with its process.
    let pidfd = open(record).ok()?;
    if start_time(record.pid) != Some(record.start_time) {
        return None;
    }
    pidfd_send_signal(&pidfd, Signal::KILL).ok().map(|()| pidfd)
}

/// Whether there is a record, and its process is gone or waits only to be waited for.
pub fn has_ended(file: &Path) -> bool {
    let Some(record) = read(file) else { return false };
    let pidfd = match open(record) {
        Ok(pidfd) => pidfd,
        // Nobody's number, or a thread's. What fails for another reason says nothing of the process.
        Err(error) => return matches!(error, Errno::SRCH | Errno::INVAL),
    };
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    let ended = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ended| ended > 0);
    ended || start_time(record.pid).is_some_and(|time| time != record.start_time)
}

fn read(file: &Path) -> Option<ProcessRecord> {
    std::fs::read_to_string(file).ok()?.parse().ok()
}

fn open(record: ProcessRecord) -> Result<OwnedFd, Errno> {
    let raw = i32::try_from(record.pid).ok().and_then(Pid::from_raw).ok_or(Errno::BADF)?;
    pidfd_open(raw, PidfdFlags::empty())
}

fn wait(mut processes: Vec<OwnedFd>, deadline: Instant) {
    while !processes.is_empty() {
        let timeout = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok();
        let mut polled: Vec<_> = processes.iter().map(|pidfd| PollFd::new(pidfd, PollFlags::IN)).collect();
        match poll(&mut polled, timeout.as_ref()) {
            Err(Errno::INTR) => continue,
            Ok(ended) if ended > 0 => {}
            _ => return,
        }
        let mut ended = polled.iter().map(|polled| !polled.revents().is_empty()).collect::<Vec<_>>().into_iter();
        processes.retain(|_| !ended.next().unwrap_or(true));
    }
}

/// When a process was started, in clock ticks since the boot (proc_pid_stat(5), field 22).
pub fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, is in parentheses and may hold anything; field 3 comes after the last one.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::path::PathBuf;
    use std::process::{Child, Command};

    #[test]
    fn recorded_process_is_killed_and_another_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let mut child = sleep();
        let start_time = start_time(child.id()).unwrap() + 1;
        std::fs::write(&file, ProcessRecord { pid: child.id(), start_time }.to_string()).unwrap();
        kill_recorded(&[&file]);
        assert!(child.try_wait().unwrap().is_none(), "a later process with the same pid");
        record(&file, child.id());
        kill_recorded(&[&file]);
        assert!(!child.wait().unwrap().success());
    }

    #[test]
    fn nonsense_and_ourselves_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        kill_recorded(&[&file]);
        std::fs::write(&file, "1").unwrap();
        kill_recorded(&[&file]);
        record(&file, std::process::id());
        kill_recorded(&[&file]);
    }

    /// The first process of a pid namespace, which does not end before all others have, and another one. That is our own child
    /// too, and has not ended before we have waited for it.
    fn namespace() -> [Child; 2] {
        let spawn = || {
            // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) NEWPID changes nothing.
            #[allow(unsafe_code)]
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }.unwrap();
            [sleep(), sleep()]
        };
        std::thread::spawn(spawn).join().unwrap()
    }

    fn sleep() -> Child {
        Command::new("sleep").arg("60").spawn().unwrap()
    }

    #[test]
    fn processes_that_do_not_end_are_waited_for_together_and_the_others_killed() {
        let dir = tempfile::tempdir().unwrap();
        let files = ["daemon", "shim", "vmm", "stale", "none"].map(|name| dir.path().join(name));
        let [mut first, mut inner] = namespace();
        let [mut second, mut other] = namespace();
        let [mut last, mut later] = [sleep(), sleep()];
        for (file, child) in files.iter().zip([&first, &second, &last]) {
            record(file, child.id());
        }
        std::fs::write(&files[3], ProcessRecord { pid: later.id(), start_time: 1 }.to_string()).unwrap();
        let begun = Instant::now();
        kill_recorded(&files.each_ref().map(PathBuf::as_path));
        let limit = Operation::KillLeftovers.budget();
        assert!(begun.elapsed() >= limit && begun.elapsed() < limit * 2, "{:?}", begun.elapsed());
        assert!([&mut first, &mut second].map(|child| child.try_wait().unwrap()).iter().all(Option::is_none));
        assert_eq!(last.wait().unwrap().signal(), Some(9));
        assert!(later.try_wait().unwrap().is_none(), "it only has the pid of one that was recorded");
        later.kill().unwrap();
        later.wait().unwrap();
        for child in [&mut inner, &mut other, &mut first, &mut second] {
            assert_eq!(child.wait().unwrap().signal(), Some(9));
        }
    }

    #[test]
    fn process_that_a_killed_one_has_recorded_at_last_is_killed_too() {
        use rustix::process::{WaitId, WaitIdOptions, waitid};
        let dir = tempfile::tempdir().unwrap();
        let [daemon, vmm] = ["daemon", "vmm"].map(|name| dir.path().join(name));
        let [mut first, mut inner] = namespace();
        let mut late = sleep();
        record(&daemon, first.id());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // It is killed with the first one, which ends when it has been waited for.
                let killed = WaitId::Pid(Pid::from_child(&inner));
                waitid(killed, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).unwrap();
                record(&vmm, late.id());
                inner.wait().unwrap();
            });
            kill_recorded(&[&daemon, &vmm]);
        });
        assert_eq!([&mut first, &mut late].map(|child| child.wait().unwrap().signal()), [Some(9); 2]);
    }
}
