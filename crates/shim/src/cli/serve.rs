//! The daemon of one pod: the Task service on the socket that `start` bound, until the last task is gone and containerd
//! asks it to shut down.

use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::node::RUN_ROOT;
use rustix::fs::Mode;
use tokio::signal::unix::{SignalKind, signal};

use super::confine::{ConfineError, close_inherited, confine};
use super::flags::Flags;
use crate::deadlines::{Deadline, Operation};
use crate::endpoint::Endpoint;
use crate::events::Publisher;
use crate::host_pid::Keeper;
use crate::paths::RunDir;
use crate::pod::{Pod, PodIdentity};
use crate::service;

/// Environment variable that names containerd's event socket.
pub const TTRPC_VARIABLE: &str = "TTRPC_ADDRESS";

/// How long a thread of the runtime's pool stays for the next work, which is output to regular files: a pod that runs should not
/// pay for threads that it does not use.
const IDLE_THREAD_STAYS: Duration = Duration::from_secs(1);

/// Runs the daemon to its end.
pub fn run(flags: &Flags) -> Result<(), ServeError> {
    close_inherited()?;
    let listener = std::io::stdin().as_fd().try_clone_to_owned().map_err(ServeError::Listener)?;
    let listener = UnixListener::from(listener);
    // A session of its own: no terminal's and no process group's signals. Fails only for a group's leader.
    let _ = rustix::process::setsid();
    // Modes of what is made here are given in full.
    rustix::process::umask(Mode::empty());
    let bundle = std::env::current_dir().map_err(ServeError::Bundle)?;
    super::logging::init(&bundle, &flags.id, flags.debug);
    confine()?;
    // As long as there is one thread, and little memory to have a copy of.
    let keeper = Keeper::start().map_err(ServeError::Keeper)?;
    // One thread: the shim's work is waiting. Output to regular files goes to a few short-lived threads.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(IDLE_THREAD_STAYS)
        .thread_stack_size(256 << 10)
        .build()
        .map_err(ServeError::Runtime)?;
    let endpoint = Arc::new(Endpoint::new(PathBuf::from(&flags.socket)));
    let result = runtime.block_on(serve(flags, listener, endpoint.clone(), keeper));
    endpoint.withdraw();
    runtime.shutdown_background();
    result
}

async fn serve(
    flags: &Flags,
    listener: UnixListener,
    endpoint: Arc<Endpoint>,
    keeper: Keeper,
) -> Result<(), ServeError> {
    listener.set_nonblocking(true).map_err(ServeError::Listener)?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(ServeError::Listener)?;
    let ttrpc = std::env::var(TTRPC_VARIABLE).ok().filter(|address| !address.is_empty());
    let (publisher, drained) = Publisher::start(flags.namespace.clone(), ttrpc);
    let identity = PodIdentity {
        sandbox_id: flags.id.clone(),
        run_dir: RunDir::new(&PathBuf::from(RUN_ROOT), &flags.namespace, &flags.id),
        endpoint: endpoint.clone(),
    };
    let pod = Arc::new(Pod::new(identity, publisher, keeper));
    let mut server = ttrpc::asynchronous::Server::new()
        .add_listener(ttrpc::asynchronous::transport::Listener::from(listener))
        .register_service(service::services(pod.clone()));
    server.start().await.map_err(ServeError::Serve)?;
    // Beside the pod, which does not wait for it.
    tokio::spawn(crate::own_thread::run("bulkhead-clean", super::dead::clean_up));
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signal)?;
    tokio::select! {
        () = pod.finished() => {}
        _ = terminate.recv() => tracing::warn!("SIGTERM: ending the pod and the shim"),
    }
    pod.end().await;
    endpoint.withdraw();
    let _ = Deadline::begin(Operation::LastWords).timeout(server.shutdown()).await;
    drop(server);
    drop(pod);
    // The last events go out before the process does.
    let _ = Deadline::begin(Operation::LastWords).timeout(drained).await;
    Ok(())
}

/// The daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// stdin is no listening socket.
    #[error("the daemon's stdin is not the socket that `start` binds")]
    Listener(#[source] std::io::Error),
    /// No working directory.
    #[error("the daemon has no bundle as its working directory")]
    Bundle(#[source] std::io::Error),
    /// Its own confinement.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// No placeholders.
    #[error("cannot fork the process that makes the pids that are reported; is the node out of processes or memory?")]
    Keeper(#[source] std::io::Error),
    /// No reactor.
    #[error("cannot start the daemon's event loop; is the node out of file descriptors?")]
    Runtime(#[source] std::io::Error),
    /// No signals.
    #[error("cannot listen to signals")]
    Signal(#[source] std::io::Error),
    /// No server.
    #[error("cannot serve containerd on the shim's socket")]
    Serve(#[source] ttrpc::Error),
}
