//! The VMM's pid namespace (pid_namespaces(7)), the one that it cannot give itself: a process is born into it.
#![allow(unsafe_code)] // reason: unshare(2)

use std::io;

use rustix::thread::UnshareFlags;
use tokio::process::{Child, Command};
use tokio::runtime::Handle;

/// Starts a process as the first one of a pid namespace. The namespace for children is a thread's, so this is done in one
/// that ends with it.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let runtime = Handle::current();
    let spawned = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let _context = runtime.enter();
            // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) NEWPID changes nothing.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }?;
            command.spawn()
        });
        thread.join()
    });
    spawned.unwrap_or_else(|_| Err(io::Error::other("the thread that starts the VMM has panicked")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn process_is_the_first_of_its_pid_namespace_and_the_caller_stays_in_its_own() {
        assert!(rustix::process::geteuid().is_root(), "pid namespaces are tested as root");
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$"]).stdout(std::process::Stdio::piped());
        let output = spawn(&mut command).unwrap().wait_with_output().await.unwrap();
        assert_eq!(output.stdout, b"1\n");
        let ours = Command::new("sh").args(["-c", "echo $$"]).output().await.unwrap();
        assert_ne!(ours.stdout, b"1\n");
    }
}
