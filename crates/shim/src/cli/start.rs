//! `start`: leave a daemon behind for a new pod, or find the one of a pod that runs; print its address.
//!
//! The working directory is the bundle. containerd 1.6 and 1.7 reload from the `address` file that is written here
//! (containerd: cmd/containerd-shim-runc-v2/manager/manager_linux.go). The daemon must hold neither stdout nor stderr:
//! containerd reads both to their end.

use std::fs::DirBuilder;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::bootstrap::{Caller, GRPC_VARIABLE};
use super::flags::Flags;
use super::version::containerd_major;
use crate::annotations::Role;
use crate::bundle::{self, BundleError};
use crate::config;
use crate::endpoint::Endpoint;
use crate::paths::{SOCKET_DIR, socket_path};
use crate::sandbox::record;

/// File in the bundle that names the address.
const ADDRESS_FILE: &str = "address";

/// Runs the action.
pub fn run(flags: &Flags) -> Result<(), StartError> {
    let grpc = std::env::var(GRPC_VARIABLE).ok();
    let caller = Caller::read(std::io::stdin().lock(), grpc.as_deref(), flags);
    let bundle = std::env::current_dir().map_err(StartError::Bundle)?;
    let (daemon, is_member) = match bundle::read_role(&bundle)? {
        Role::Member(sandbox) => (find(flags, &sandbox)?, true),
        Role::Sandbox | Role::Standalone => (launch(flags, &caller)?, false),
    };
    let address = format!("unix://{}", daemon.endpoint.socket().display());
    let major = || containerd_major(Path::new(&flags.address));
    let told = std::fs::write(bundle.join(ADDRESS_FILE), &address)
        .map_err(StartError::Address)
        .and_then(|()| caller.answer(&address, is_member, major).map_err(StartError::Encode))
        .and_then(|answer| std::io::stdout().write_all(&answer).map_err(StartError::Answer));
    if told.is_err() {
        daemon.abandon();
    }
    told
}

/// A daemon that answers.
struct Daemon {
    endpoint: Endpoint,
    /// Its process, if it was started here.
    process: Option<Child>,
}

impl Daemon {
    /// Ends the daemon if it was started here: containerd will not learn its address, and does not clean up after a failed
    /// `start`.
    fn abandon(self) {
        if let Some(mut process) = self.process {
            // SIGKILL is not refused: what is left to fail is that it has ended already.
            let _ = process.kill();
            let _ = process.wait();
            self.endpoint.withdraw();
        }
    }
}

/// The daemon of a pod that runs.
fn find(flags: &Flags, sandbox: &str) -> Result<Daemon, StartError> {
    let path = socket_path(&flags.address, &flags.namespace, sandbox);
    match UnixStream::connect(&path) {
        Ok(_) => Ok(Daemon { endpoint: Endpoint::new(path), process: None }),
        Err(source) => Err(StartError::NoSandbox { id: sandbox.to_owned(), source }),
    }
}

/// Starts the daemon of a new pod on a socket that is bound here, so that it accepts before anyone is told of it.
fn launch(flags: &Flags, caller: &Caller) -> Result<Daemon, StartError> {
    let path = socket_path(&flags.address, &flags.namespace, &flags.id);
    let endpoint = Endpoint::new(path.clone());
    let Some(listener) = listen(&path)? else { return Ok(Daemon { endpoint, process: None }) };
    let binary = std::env::current_exe().map_err(StartError::Spawn)?;
    let mut daemon = Command::new(binary);
    daemon.args(["-namespace", &flags.namespace, "-address", &flags.address, "-id", &flags.id]);
    daemon.args(["-publish-binary", &flags.publish_binary]).arg("-socket").arg(&path);
    if flags.debug {
        daemon.arg("-debug");
    }
    if let Some(address) = caller.ttrpc_address() {
        daemon.env(super::serve::TTRPC_VARIABLE, address);
    }
    // The Sandbox API has no options of the runtime: what is given here is all that there is.
    if let Some(path) = caller.config_path() {
        daemon.env(config::PATH_VARIABLE, path);
    }
    // The listener is the daemon's stdin: inherited without clearing close-on-exec on anything.
    daemon.arg("serve").stdin(OwnedFd::from(listener)).stdout(Stdio::null()).stderr(Stdio::null());
    match daemon.spawn() {
        Ok(process) => {
            // Here, so that a `delete` finds it however soon it comes.
            record(&endpoint.record(), process.id());
            Ok(Daemon { endpoint, process: Some(process) })
        }
        Err(error) => {
            endpoint.withdraw();
            Err(StartError::Spawn(error))
        }
    }
}

/// Binds the socket; `None` if a daemon answers there already. A socket that nobody answers is a dead shim's.
fn listen(path: &Path) -> Result<Option<UnixListener>, StartError> {
    let failed = |source| StartError::Listen { path: path.to_path_buf(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(SOCKET_DIR).map_err(failed)?;
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(None);
            }
            std::fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path).map_err(failed)?
        }
        other => other.map_err(failed)?,
    };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(Some(listener))
}

/// `start` failed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No working directory.
    #[error("cannot find the bundle: the working directory is gone; has containerd removed the container meanwhile?")]
    Bundle(#[source] std::io::Error),
    /// The bundle's spec.
    #[error(transparent)]
    Spec(#[from] BundleError),
    /// A container of a pod whose shim does not answer.
    #[error("the shim of sandbox {id} does not answer; the pod has ended, remove it and let it be created again")]
    NoSandbox {
        /// The sandbox.
        id: String,
        /// connect(2).
        #[source]
        source: std::io::Error,
    },
    /// bind(2) and what goes with it.
    #[error("cannot listen on the shim's socket {path}; is /run/containerd writable?")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Cannot run ourselves.
    #[error("cannot start the shim's daemon; is the node out of processes or memory?")]
    Spawn(#[source] std::io::Error),
    /// The `address` file.
    #[error("cannot write the shim's address into the bundle")]
    Address(#[source] std::io::Error),
    /// Cannot happen with a message of ours.
    #[error("cannot encode the answer to start")]
    Encode(#[source] protobuf::Error),
    /// stdout is gone.
    #[error("cannot print the shim's address")]
    Answer(#[source] std::io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn daemon(dir: &Path) -> Daemon {
        let endpoint = Endpoint::new(dir.join("socket"));
        let process = Command::new("sleep").arg("60").spawn().unwrap();
        std::fs::write(endpoint.socket(), "").unwrap();
        record(&endpoint.record(), process.id());
        Daemon { endpoint, process: Some(process) }
    }

    #[test]
    fn daemon_that_nobody_learns_of_is_ended_and_one_that_was_there_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut theirs = daemon(dir.path());
        Daemon { endpoint: Endpoint::new(dir.path().join("socket")), process: None }.abandon();
        let process = theirs.process.as_mut().unwrap();
        let (pid, alive) = (process.id(), process.try_wait().unwrap().is_none());
        assert!(alive && theirs.endpoint.socket().exists());
        theirs.abandon();
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
