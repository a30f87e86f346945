//! A pid on the host for a process in a guest (ARCHITECTURE.md, D10): a process that only waits, and is in /proc as long as the
//! one that it stands for runs.
//!
//! containerd builds `/proc/<pid>/ns/...` paths from the pids that a shim reports and tells containers apart by them, OCI hooks
//! change the namespaces that they find there, and Docker shows the command line. So a placeholder is in the pod's network
//! namespace, has all others for itself or in common with the pod's other placeholders, and none in common with the node; of
//! the node's files it sees nothing; and its command line is that of the process.
//!
//! Placeholders are forked by the [`keeper`], which the daemon forks before it has a thread.

mod keeper;

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::deadlines::Operation;
use keeper::MAX_TITLE;

/// The user namespace of placeholders.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Users {
    /// The node's, as the pod's spec has none.
    Nodes,
    /// One of their own.
    Own,
}

/// Makes placeholders. They all end with it, and it with the daemon.
#[derive(Debug)]
pub struct Keeper(Mutex<OwnedFd>);

/// A process that exists until this is dropped.
#[derive(Debug)]
pub struct HostPid {
    pid: u32,
    /// Its end is the process's.
    _alive: OwnedFd,
}

impl Keeper {
    /// Forks it.
    pub fn start() -> io::Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        keeper::fork(theirs)?;
        set_socket_timeout(&ours, Timeout::Recv, Some(Operation::Placeholder.budget()))?;
        Ok(Self(Mutex::new(ours)))
    }

    /// Later placeholders are in this network namespace, and in no other of the node's.
    pub fn enter(&self, netns: BorrowedFd<'_>, users: Users) -> io::Result<()> {
        let request = if users == Users::Own { keeper::ENTER_WITH_USERS } else { keeper::ENTER };
        self.ask(&[request], netns).map(drop)
    }

    /// Makes a placeholder with a command line.
    pub fn hold(&self, arguments: &[String]) -> io::Result<HostPid> {
        let (theirs, alive) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut request = vec![keeper::HOLD];
        request.extend(title(arguments));
        let pid = self.ask(&request, theirs.as_fd())?;
        Ok(HostPid { pid, _alive: alive })
    }

    fn ask(&self, request: &[u8], fd: BorrowedFd<'_>) -> io::Result<u32> {
        // No code that holds the lock can panic half way.
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(&*socket, &[IoSlice::new(request)], &mut control, SendFlags::NOSIGNAL)?;
        let mut answer = [0; 4];
        let mut none = RecvAncillaryBuffer::new(&mut []);
        let received = recvmsg(&*socket, &mut [IoSliceMut::new(&mut answer)], &mut none, RecvFlags::empty())?;
        if received.bytes != answer.len() {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the process that makes placeholders is gone"));
        }
        let answer = i32::from_ne_bytes(answer);
        u32::try_from(answer).map_err(|_| io::Error::from_raw_os_error(answer.saturating_neg()))
    }
}

/// A command line as /proc shows it: every argument ends with a zero.
fn title(arguments: &[String]) -> Vec<u8> {
    let mut title = Vec::new();
    for argument in arguments {
        title.extend(argument.bytes().filter(|byte| *byte != 0));
        title.push(0);
    }
    if title.len() > MAX_TITLE {
        title.truncate(MAX_TITLE - 1);
        title.push(0);
    }
    title
}

impl HostPid {
    /// Its pid.
    pub fn get(&self) -> u32 {
        self.pid
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::*;

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    fn namespace(pid: u32, name: &str) -> PathBuf {
        fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap()
    }

    /// A network namespace.
    fn netns() -> OwnedFd {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(crate::network::netns::create()).unwrap()
    }

    /// Waits for the end of a process that is no child of ours.
    fn ended(pid: &HostPid) -> OwnedFd {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid.get()).unwrap()).unwrap();
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
    }

    fn wait(pidfd: &OwnedFd) {
        let mut fds = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1));
    }

    #[test]
    fn placeholder_is_there_while_it_is_held_with_the_command_line_of_its_process() {
        let keeper = Keeper::start().unwrap();
        let pid = keeper.hold(&words(&["nginx", "-g", "daemon off;"])).unwrap();
        let proc = PathBuf::from(format!("/proc/{}", pid.get()));
        let other = keeper.hold(&["x".repeat(2 * MAX_TITLE)]).unwrap();
        assert_ne!(pid.get(), other.get());
        let capabilities = rustix::thread::capabilities(None).unwrap().effective;
        // A test in a container may not have it; a shim has.
        if capabilities.contains(rustix::thread::CapabilitySet::SYS_RESOURCE) {
            assert_eq!(fs::read(proc.join("cmdline")).unwrap(), b"nginx\0-g\0daemon off;\0");
            assert_eq!(fs::read(format!("/proc/{}/cmdline", other.get())).unwrap().len(), MAX_TITLE);
        }
        assert_eq!(title(&words(&["nginx", "-g", "daemon off;"])), b"nginx\0-g\0daemon off;\0");
        assert_eq!(title(&["x".repeat(2 * MAX_TITLE)]).len(), MAX_TITLE);
        assert_eq!(fs::read_dir(proc.join("fd")).unwrap().count(), 1, "more than what says that it is held");
        let pidfd = ended(&pid);
        drop(pid);
        wait(&pidfd);
        assert!(Path::new(&format!("/proc/{}", other.get())).exists());
    }

    #[test]
    fn placeholder_is_in_no_namespace_of_the_node() {
        let (keeper, netns) = (Keeper::start().unwrap(), netns());
        keeper.enter(netns.as_fd(), Users::Own).unwrap();
        let pid = keeper.hold(&words(&["one"])).unwrap();
        for name in ["net", "ipc", "uts", "pid", "user", "mnt", "cgroup"] {
            let own = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
            assert_ne!(namespace(pid.get(), name), own, "{name}");
        }
        let its = fs::metadata(format!("/proc/{}/ns/net", pid.get())).unwrap();
        let wanted = rustix::fs::fstat(&netns).unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::ino(&its), wanted.st_ino);
        assert_eq!(fs::read_dir(format!("/proc/{}/root", pid.get())).unwrap().count(), 0, "files of the node");
        // Those of a pod have all in common but processes and users.
        let other = keeper.hold(&words(&["two"])).unwrap();
        for name in ["net", "ipc", "uts", "mnt", "cgroup"] {
            assert_eq!(namespace(pid.get(), name), namespace(other.get(), name), "{name}");
        }
        assert_ne!(namespace(pid.get(), "pid"), namespace(other.get(), "pid"));
    }

    #[test]
    fn placeholders_end_with_the_keeper_and_what_cannot_be_entered_is_said() {
        let keeper = Keeper::start().unwrap();
        assert!(keeper.enter(std::io::stdin().as_fd(), Users::Nodes).is_err());
        let pid = keeper.hold(&[]).unwrap();
        let pidfd = ended(&pid);
        drop(keeper);
        drop(pid);
        wait(&pidfd);
    }
}
