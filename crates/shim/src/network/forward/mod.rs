//! Port-forward: what is dialled at localhost in the pod's network namespace on the host goes to localhost in the guest.
//!
//! The CRI (containerd: internal/cri/server/sandbox_portforward_linux.go) joins the pod's namespace and dials
//! localhost:PORT there, over IPv4 and then over IPv6. With the pod's servers in the guest nobody would answer, so a
//! program of the kernel's socket lookup ([`steer`]) gives every such connection, whatever its port, to one listener of
//! ours. The port is not known before it is dialled, and needs no rule, no module and no address: the accepted socket's
//! own address says what was dialled.
//!
//! We have accepted before the guest is asked; if it refuses, the connection is reset, which the dialler reads at once.

mod steer;

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::forward::{CONNECTED, Target};
use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;

use super::{Connector, NoConnection};
use crate::deadlines::{Deadline, Operation};
use crate::retry::GrowingPause;

/// Most connections at a time; one more is reset. `kubectl port-forward` opens one for each connection to its local port, so
/// a browser takes a dozen. They are a part of the guest's vsock connections, of which most stay for streams of processes.
const MAX_CONNECTIONS: usize = 128;

/// Bytes copied at once, in each direction: 4 MiB for all connections together.
const CHUNK: usize = 16 << 10;

/// Listeners in the pod's namespace to which its localhost leads. The namespace is as before when they are dropped.
#[derive(Debug)]
pub struct Localhost {
    listeners: Vec<TcpListener>,
    _steering: OwnedFd,
}

impl Localhost {
    /// Listens in the calling thread's network namespace.
    pub fn open() -> Result<Self, ForwardError> {
        let ipv4 = listen((Ipv4Addr::LOCALHOST, 0).into()).map_err(ForwardError::Listen)?;
        // A namespace without IPv6 has nothing to be dialled there.
        let ipv6 = listen((Ipv6Addr::LOCALHOST, 0).into()).ok();
        let steering = steer::attach(ipv4.as_fd(), ipv6.as_ref().map(AsFd::as_fd)).map_err(ForwardError::Steer)?;
        Ok(Self { listeners: [Some(ipv4), ipv6].into_iter().flatten().collect(), _steering: steering })
    }

    #[cfg(test)]
    pub fn listeners(&self) -> &[TcpListener] {
        &self.listeners
    }

    /// Carries connections to the guest until the VM ends.
    pub async fn serve(self, agent: impl Connector) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let listeners =
            self.listeners.into_iter().filter_map(|listener| tokio::net::TcpListener::from_std(listener).ok());
        let accepting = listeners.map(|listener| accept(listener, &agent, &room));
        tokio::select! {
            _ = futures::future::join_all(accepting) => {}
            () = agent.vm_ended() => {}
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn accept(listener: tokio::net::TcpListener, agent: &impl Connector, room: &Arc<Semaphore>) {
    let listener = &listener;
    let accepting = || async move { listener.accept().await.map(|(dialled, _)| dialled) };
    accept_all(accepting, |dialled| match Arc::clone(room).try_acquire_owned() {
        Ok(permit) => {
            let agent = agent.clone();
            tokio::spawn(async move {
                forward(dialled, &agent).await;
                drop(permit);
            });
        }
        Err(_) => {
            tracing::warn!("{MAX_CONNECTIONS} connections are forwarded already; one more is reset");
            reset(dialled);
        }
    })
    .await;
}

/// Takes connections without end. The node may be out of descriptors or memory for a while, of whose end nothing tells, and
/// asking again at once would take all of a processor.
async fn accept_all<T, F>(mut accept: impl FnMut() -> F, mut take: impl FnMut(T)) -> Infallible
where
    F: Future<Output = io::Result<T>>,
{
    let mut pause = GrowingPause::default();
    loop {
        match accept().await {
            Ok(dialled) => {
                pause.worked();
                take(dialled);
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                let pause = pause.failed();
                tracing::warn!(%error, "no port-forward for this pod for {pause:?}; is the node out of descriptors?");
                tokio::time::sleep(pause).await;
            }
        }
    }
}

async fn forward(mut dialled: TcpStream, agent: &impl Connector) {
    let mut guest = match connect(&dialled, agent).await {
        Ok(guest) => guest,
        Err(error) => {
            tracing::debug!("{}", bulkhead_protocol::error::chain(&error));
            return reset(dialled);
        }
    };
    if let Err(error) = copy_bidirectional_with_sizes(&mut dialled, &mut guest, CHUNK, CHUNK).await {
        tracing::debug!(%error, "forwarded connection ended early");
        reset(dialled);
    }
}

/// Connects to the port in the guest that was dialled: the accepted socket's own.
async fn connect(dialled: &TcpStream, agent: &impl Connector) -> Result<tokio::net::UnixStream, ForwardError> {
    let address = dialled.local_addr().map_err(ForwardError::Dialled)?;
    dialled.set_nodelay(true).map_err(ForwardError::Dialled)?;
    let target = Target { ipv6: address.is_ipv6(), port: address.port() };
    let deadline = Deadline::begin(Operation::ForwardConnection);
    let mut guest =
        agent.forward(deadline).await.map_err(|source| ForwardError::Agent { port: target.port, source })?;
    let handshake = async {
        guest.write_all(&target.encode()).await?;
        guest.read_u8().await
    };
    match deadline.part(Operation::ForwardHandshake).timeout(handshake).await {
        Ok(Ok(CONNECTED)) => Ok(guest),
        Ok(Ok(_)) => Err(ForwardError::Refused(target.port)),
        Ok(Err(source)) => Err(ForwardError::Handshake { port: target.port, source }),
        Err(_) => Err(ForwardError::Handshake { port: target.port, source: io::ErrorKind::TimedOut.into() }),
    }
}

/// Ends a connection with RST rather than FIN: the dialler reads an error, not an empty answer.
fn reset(dialled: TcpStream) {
    let _ = set_socket_linger(&dialled, Some(Duration::ZERO));
    drop(dialled);
}

/// A connection to localhost cannot be carried to the guest.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The namespace's loopback interface.
    #[error("cannot listen on the pod's localhost; did CNI bring the loopback interface up?")]
    Listen(#[source] io::Error),
    /// bpf(2).
    #[error("cannot steer connections to the pod's localhost; the kernel must be 5.9 or newer, with BPF")]
    Steer(#[source] io::Error),
    /// The accepted socket.
    #[error("the connection to be forwarded is gone")]
    Dialled(#[source] io::Error),
    /// No connection to the guest.
    #[error("no connection to the guest for port {port}")]
    Agent {
        /// The port that was dialled.
        port: u16,
        /// Why.
        #[source]
        source: NoConnection,
    },
    /// The agent says no.
    #[error("nothing in the guest listens on port {0}")]
    Refused(u16),
    /// The agent says nothing.
    #[error("the guest broke the handshake of a connection to port {port}")]
    Handshake {
        /// The port that was dialled.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use bulkhead_protocol::forward::{REFUSED, TARGET_LEN};
    use rustix::io::Errno;
    use tokio::net::UnixStream;
    use tokio::sync::mpsc;
    use tokio::time::Instant;

    use super::*;

    /// Hands the guest's ends of connections to a test.
    #[derive(Clone)]
    struct Guest(mpsc::UnboundedSender<UnixStream>);

    impl Connector for Guest {
        async fn forward(&self, _: Deadline) -> Result<UnixStream, NoConnection> {
            let (host, guest) = UnixStream::pair()?;
            self.0.send(guest)?;
            Ok(host)
        }

        async fn handover(&self, _: Deadline) -> Result<UnixStream, NoConnection> {
            unreachable!()
        }

        async fn vm_ended(&self) {
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn what_is_dialled_goes_to_the_guest_and_what_it_refuses_is_reset() {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let (tell, mut connections) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        tokio::spawn(async move { accept(listener, &Guest(tell), &room).await });
        let mut dial = async |answer| {
            let dialler = TcpStream::connect(address).await.unwrap();
            let mut guest = connections.recv().await.unwrap();
            let mut target = [0; TARGET_LEN];
            guest.read_exact(&mut target).await.unwrap();
            assert_eq!(Target::decode(target).unwrap(), Target { ipv6: false, port: address.port() });
            guest.write_u8(answer).await.unwrap();
            (dialler, guest)
        };
        let (mut dialler, mut guest) = dial(CONNECTED).await;
        dialler.write_u8(7).await.unwrap();
        assert_eq!(guest.read_u8().await.unwrap(), 7);
        guest.write_u8(8).await.unwrap();
        assert_eq!(dialler.read_u8().await.unwrap(), 8);
        let (mut dialler, _guest) = dial(REFUSED).await;
        assert_eq!(dialler.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(start_paused = true)]
    async fn port_forward_goes_on_after_an_accept_that_failed() {
        let failed = || Err(io::Error::from(Errno::MFILE));
        let answers = [failed(), failed(), Ok(1), Err(Errno::CONNABORTED.into()), failed(), Ok(2)];
        let (mut answers, taken, begun) = (answers.into_iter(), RefCell::new(Vec::new()), Instant::now());
        let accept = || {
            let next = answers.next();
            async move {
                match next {
                    Some(answer) => answer,
                    None => std::future::pending().await,
                }
            }
        };
        let taking = accept_all(accept, |number| taken.borrow_mut().push((number, begun.elapsed().as_secs())));
        assert!(tokio::time::timeout(Duration::from_secs(100), taking).await.is_err());
        assert_eq!(*taken.borrow(), [(1, 3), (2, 4)], "not at once, and no longer later than the node needs");
    }
}
