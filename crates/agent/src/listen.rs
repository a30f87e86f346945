//! The agent's four ports, and the sign that they are open.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::create_agent;
use bulkhead_protocol::guest::{AGENT_FORWARD_PORT, AGENT_HANDOVER_PORT, AGENT_RPC_PORT, AGENT_STDIO_PORT, READY_PORT};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::{Server, transport::Listener};

use crate::handover::Handover;
use crate::netns::Netns;
use crate::reaper::Reaper;
use crate::rpc::Service;
use crate::runtime::Runtime;
use crate::runtime::zygote::{self, Unwatched};
use crate::sandbox::Clock;
use crate::stdio::{Streams, serve};
use crate::{forward, log, sys};

/// Serves the shim until the guest ends. `kernel_boot` is what the kernel took before the agent began.
pub fn serve_vsock(zygote: Unwatched, kernel_boot: Duration) -> Result<Infallible, ListenError> {
    block_on(async {
        let bind = |port| VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port));
        let rpc = bind(AGENT_RPC_PORT).map_err(ListenError::Vsock)?;
        let stdio = bind(AGENT_STDIO_PORT).map_err(ListenError::Vsock)?;
        let localhost = bind(AGENT_FORWARD_PORT).map_err(ListenError::Vsock)?;
        let handover = bind(AGENT_HANDOVER_PORT).map_err(ListenError::Vsock)?;
        let agent = Agent::start(Listener::from(rpc), zygote, Clock::of_guest(), kernel_boot).await?;
        tracing::debug!("listening");
        // The knock: always refused, and the refusal need not be waited for.
        tokio::spawn(VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, READY_PORT)));
        let netns = agent.netns.clone();
        let forward = move |stream| forward::connection(netns.clone(), stream);
        tokio::spawn(
            async move { accept_all(async || localhost.accept().await.map(|(stream, _)| stream), forward).await },
        );
        let of = Handover::new(agent.netns.clone());
        let hand_over = move |stream| of.clone().connection(stream);
        tokio::spawn(
            async move { accept_all(async || handover.accept().await.map(|(stream, _)| stream), hand_over).await },
        );
        agent.accept_streams(async || stdio.accept().await.map(|(stream, _)| stream)).await
    })
}

/// Serves on `rpc.sock` and `stdio.sock` of a directory, outside of a guest. The caller has prepared the namespaces: /run
/// and the cgroup hierarchy are used as in a guest.
pub fn serve_unix(dir: &Path) -> Result<Infallible, ListenError> {
    // In a guest PID 1 is the parent of whatever is left behind; here that takes a word to the kernel.
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    crate::cgroup::prepare_hierarchy().map_err(io::Error::other).map_err(ListenError::Runtime)?;
    let zygote = zygote::start().map_err(ListenError::Runtime)?;
    log::to_stderr(tracing::Level::DEBUG);
    block_on(async {
        let bind = |name| {
            UnixListener::bind(dir.join(name)).map_err(|source| ListenError::Unix { path: dir.join(name), source })
        };
        let (rpc, stdio) = (bind("rpc.sock")?, bind("stdio.sock")?);
        // The clock is another machine's here.
        let agent = Agent::start(Listener::from(rpc), zygote, Clock::default(), Duration::ZERO).await?;
        println!("listening in {}", dir.display());
        agent.accept_streams(async || stdio.accept().await.map(|(stream, _)| stream)).await
    })
}

/// One thread: the agent waits far more than it computes, and a guest may have one CPU.
fn block_on<T>(future: impl Future<Output = Result<T, ListenError>>) -> Result<T, ListenError> {
    sys::ignore_sigpipe();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ListenError::Runtime)?;
    runtime.block_on(future)
}

/// The parts that run for as long as the agent does.
struct Agent {
    streams: Arc<Streams>,
    netns: Netns,
    _server: Server,
}

impl Agent {
    async fn start(rpc: Listener, zygote: Unwatched, clock: Clock, kernel_boot: Duration) -> Result<Self, ListenError> {
        let reaper = Arc::new(Reaper::default());
        let streams = Arc::new(Streams::default());
        let netns = Netns::default();
        let runtime = Runtime::new(Arc::clone(&reaper), zygote.watch().map_err(ListenError::Runtime)?);
        let service = Service::new(runtime, Arc::clone(&streams), netns.clone(), clock, kernel_boot);
        let children = signal(SignalKind::child()).map_err(ListenError::Runtime)?;
        tokio::spawn(reaper.run(children));
        let mut server = Server::new().add_listener(rpc).register_service(create_agent(Arc::new(service)));
        server.start().await.map_err(ListenError::Rpc)?;
        Ok(Self { streams, netns, _server: server })
    }

    async fn accept_streams<S, F>(&self, accept: impl Fn() -> F) -> Result<Infallible, ListenError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        F: Future<Output = io::Result<S>>,
    {
        let streams = Arc::clone(&self.streams);
        accept_all(accept, move |stream| serve::connection(Arc::clone(&streams), stream)).await
    }
}

/// Time until a connection is accepted again that could not be. What is missing, descriptors or memory, says to nobody when
/// it is there again, and the connection waits.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Serves every connection in a task of its own.
async fn accept_all<S, F, C>(accept: impl Fn() -> F, serve: impl Fn(S) -> C) -> !
where
    F: Future<Output = io::Result<S>>,
    C: Future<Output = ()> + Send + 'static,
{
    loop {
        match accept().await {
            Ok(stream) => drop(tokio::spawn(serve(stream))),
            // The listener itself is sound (accept(2) on errors of the peer).
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of the host");
                tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
}

/// The agent cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The async runtime.
    #[error("cannot start the agent's event loop")]
    Runtime(#[source] io::Error),
    /// The ports.
    #[error("cannot listen on vsock; does the machine have a virtio-vsock device?")]
    Vsock(#[source] io::Error),
    /// The developer's sockets.
    #[error("cannot listen on {path}")]
    Unix { path: std::path::PathBuf, source: io::Error },
    /// ttrpc.
    #[error("cannot serve requests")]
    Rpc(#[source] ttrpc::Error),
}
