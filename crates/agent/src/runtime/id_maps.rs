//! The pod's user namespace (user_namespaces(7)).
//!
//! Who has entered a new one may not map more than itself. So a process that stays outside is forked before, which writes
//! the maps when it is told to.

use std::fs::File;
use std::io::{self, Read};

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::pipe::{PipeFlags, pipe_with};

use super::message::IdMaps;
use crate::sys::{self, Forked, Parent};

/// Enters new namespaces, a user namespace with these maps among them. The caller has one thread.
pub fn enter(maps: &IdMaps, namespaces: CloneFlags) -> io::Result<()> {
    let inside = std::process::id();
    let (word, speaker) = pipe_with(PipeFlags::CLOEXEC)?;
    match sys::fork(Parent::Caller)? {
        Forked::Child => {
            drop(speaker);
            std::process::exit(i32::from(write(File::from(word), inside, maps).is_err()))
        }
        Forked::Parent { pid: outside } => {
            let entered = unshare(namespaces);
            // The end of the pipe is the word; without a namespace the writing fails, and that is no matter.
            drop(speaker);
            let mapped = waitpid(Pid::from_raw(outside), None)?;
            entered?;
            if matches!(mapped, WaitStatus::Exited(_, 0)) { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
        }
    }
}

/// Waits for the word and writes the maps of a process.
fn write(mut word: File, pid: u32, maps: &IdMaps) -> io::Result<()> {
    word.read_to_end(&mut Vec::new())?;
    std::fs::write(format!("/proc/{pid}/uid_map"), &maps.uids)?;
    std::fs::write(format!("/proc/{pid}/gid_map"), &maps.gids)
}
