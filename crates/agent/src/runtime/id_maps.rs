//! The pod's user namespace (user_namespaces(7)).
//!
//! Who has entered a new one may not map more than itself. So a process that stays outside is started before, which writes
//! the maps when it is told to.

use std::io::{self, Read};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};

use super::ID_MAPS_ARG;
use super::message::IdMaps;

/// Enters new namespaces, a user namespace with these maps among them. The caller has one thread.
pub fn enter(maps: &IdMaps, namespaces: CloneFlags) -> io::Result<()> {
    let pid = std::process::id().to_string();
    let mut outside = Command::new("/proc/self/exe")
        .args([ID_MAPS_ARG, &pid, &maps.uids, &maps.gids])
        .stdin(Stdio::piped())
        .spawn()?;
    let entered = unshare(namespaces);
    // The end of its input is the word; without a namespace its writing fails, and that is no matter.
    drop(outside.stdin.take());
    let mapped = outside.wait()?;
    entered?;
    if mapped.success() { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// Waits for the word and writes the maps of a process; answers the exit status.
pub fn main(pid: &str, maps: &IdMaps) -> i32 {
    let write = || {
        io::stdin().read_to_end(&mut Vec::new())?;
        std::fs::write(format!("/proc/{pid}/uid_map"), &maps.uids)?;
        std::fs::write(format!("/proc/{pid}/gid_map"), &maps.gids)
    };
    i32::from(write().is_err())
}
