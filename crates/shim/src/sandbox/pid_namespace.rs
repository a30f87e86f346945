//! The VMM's pid namespace (pid_namespaces(7)), the one that it cannot give itself: a process is born into it.
#![allow(unsafe_code)] // reason: unshare(2)

use std::io;

use rustix::thread::UnshareFlags;
use tokio::process::{Child, Command};

use crate::deadlines::Deadline;
use crate::host_files;

/// Starts a process as the first one of a pid namespace. The namespace for children is a thread's, so this is done in one
/// that ends with it. The thread waits for the file system of the program.
pub async fn spawn(deadline: Deadline, mut command: Command) -> io::Result<Child> {
    let spawn = move || {
        // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) NEWPID changes nothing.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
        command.spawn()
    };
    host_files::CONTAINERS.run(deadline, spawn).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deadlines::Operation;

    #[tokio::test]
    async fn process_is_the_first_of_its_pid_namespace_and_the_caller_stays_in_its_own() {
        assert!(rustix::process::geteuid().is_root(), "pid namespaces are tested as root");
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$"]).stdout(std::process::Stdio::piped());
        let child = spawn(Deadline::begin(Operation::CreatePod), command).await;
        let output = child.unwrap().wait_with_output().await.unwrap();
        assert_eq!(output.stdout, b"1\n");
        let ours = Command::new("sh").args(["-c", "echo $$"]).output().await.unwrap();
        assert_ne!(ours.stdout, b"1\n");
    }
}
