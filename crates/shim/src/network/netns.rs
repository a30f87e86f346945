//! A thread in another network namespace (setns(2) moves the calling thread alone).
#![allow(unsafe_code)] // reason: unshare(2), and tokio's register of a descriptor

use std::future::Future;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::node_namespaces::is_nodes;
use crate::own_thread;

/// Name of the threads.
const THREAD: &str = "bulkhead-netns";

/// Runs `body` to its end on a new thread that has entered the namespace, with a reactor of its own: sockets belong to
/// the namespace in which they are made.
pub async fn run_in<T, F, B>(netns: &Path, body: B) -> Result<T, NetnsError>
where
    T: Send + 'static,
    F: Future<Output = T>,
    B: FnOnce() -> F + Send + 'static,
{
    let path = netns.to_path_buf();
    own_thread::run(THREAD, move || enter_and_run(&path, body)).await.map_err(NetnsError::Thread)?
}

fn enter_and_run<T, F: Future<Output = T>>(path: &Path, body: impl FnOnce() -> F) -> Result<T, NetnsError> {
    enter(path)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(NetnsError::Thread)?;
    Ok(runtime.block_on(body()))
}

/// Makes a network namespace, which lives as long as the descriptor or something in it.
pub async fn create() -> Result<OwnedFd, NetnsError> {
    let make = || {
        // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) NEWNET changes nothing.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        rustix::fs::open("/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
    };
    let made = own_thread::run(THREAD, make).await.map_err(NetnsError::Thread)?;
    made.map_err(|error| NetnsError::Create(error.into()))
}

/// Opens a network namespace, which then exists for as long as the descriptor, whatever becomes of the path.
pub fn open(path: &Path) -> Result<OwnedFd, NetnsError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    opened.map_err(|error| NetnsError::Enter { path: path.to_path_buf(), source: error.into() })
}

/// The path of one that is open.
pub fn path_of(netns: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", netns.as_raw_fd()).into()
}

/// Moves the calling thread into a network namespace. Never into the node's own: whatever is asked for then is not done to the
/// node's interfaces.
fn enter(path: &Path) -> Result<(), NetnsError> {
    let netns = open(path)?;
    let failed = |error: Errno| NetnsError::Enter { path: path.to_path_buf(), source: error.into() };
    if is_nodes(&path_of(&netns), "net") {
        return Err(NetnsError::Nodes(path.to_path_buf()));
    }
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network)).map_err(failed)
}

/// An rtnetlink(7) connection in the calling thread's namespace.
pub fn connect() -> Result<rtnetlink::Handle, NetnsError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(NetnsError::Socket)?;
    tokio::spawn(connection);
    Ok(handle)
}

/// One for messages as they are.
pub fn socket() -> Result<bulkhead_protocol::rtnl::Socket, NetnsError> {
    let (socket, connection) = bulkhead_protocol::rtnl::Socket::open().map_err(NetnsError::Socket)?;
    tokio::spawn(connection);
    Ok(socket)
}

/// Makes the reactor watch a socket of a namespace.
pub fn watch(socket: OwnedFd) -> Result<AsyncFd<OwnedFd>, NetnsError> {
    // SAFETY: an OwnedFd owns one descriptor, the same for as long as it lives.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }
        .map_err(|error| NetnsError::Socket(error.into()))
}

/// The namespace cannot be worked in.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// open(2) or setns(2).
    #[error("cannot enter the pod's network namespace {path}; did CNI set it up?")]
    Enter {
        /// The namespace.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no pod's.
    #[error(
        "{0} is the node's own network namespace, and a pod in a VM cannot have it; remove hostNetwork from the pod, or correct the CNI configuration"
    )]
    Nodes(PathBuf),
    /// unshare(2).
    #[error(
        "cannot create a network namespace for the pod; is the node out of namespaces (sysctl user.max_net_namespaces)?"
    )]
    Create(#[source] std::io::Error),
    /// No thread or no reactor.
    #[error("cannot start a thread for the pod's network; is the node out of threads (pids.max, kernel.threads-max)?")]
    Thread(#[source] std::io::Error),
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Socket(#[source] std::io::Error),
}
