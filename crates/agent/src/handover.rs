//! Loopback addresses on which only the host's side of the pod's network namespace listens: connections and datagrams of the
//! guest's to them are handed to the host ([`bulkhead_protocol::handover`] defines the exchange).
//!
//! The guest cannot connect to the host, so what it accepts here waits for a connection that the host has made for it.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::handover::{
    CARRY, CONNECTED, ENDPOINT_LEN, Endpoint, LISTEN, MAX_DATAGRAM, MAX_ENDPOINTS, Protocol,
};
use rustix::net::sockopt::set_socket_linger;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use crate::netns::Netns;

/// Connections of the host's that wait; it makes no more than a few.
const MAX_WAITING: usize = 8;

/// How long somebody who dials waits for a connection of the host's, and for its answer. It makes one at once, unless it carries
/// as many already as it will.
const HOST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client of a UDP endpoint is remembered: resolvers ask again after 5 s.
const UDP_CLIENT_TIMEOUT: Duration = Duration::from_secs(20);

/// Most clients of one UDP endpoint at a time. Datagrams of others are dropped.
const MAX_CLIENTS: usize = 32;

/// Datagrams of one client that wait to be handed over.
const MAX_QUEUED: usize = 8;

/// Bytes copied at once, in each direction.
const CHUNK: usize = 16 << 10;

/// A connection of the host's.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// The part that hands over. Cheap to clone.
pub struct Handover<S> {
    netns: Netns,
    wait: mpsc::Sender<S>,
    waiting: Arc<Mutex<mpsc::Receiver<S>>>,
}

impl<S> Clone for Handover<S> {
    fn clone(&self) -> Self {
        Self { netns: self.netns.clone(), wait: self.wait.clone(), waiting: Arc::clone(&self.waiting) }
    }
}

impl<S: Stream> Handover<S> {
    /// For the pod's network there.
    pub fn new(netns: Netns) -> Self {
        let (wait, waiting) = mpsc::channel(MAX_WAITING);
        Self { netns, wait, waiting: Arc::new(Mutex::new(waiting)) }
    }

    /// Takes a connection of the host's; serves it to its end if it carries lists.
    pub async fn connection(self, mut host: S) {
        match tokio::time::timeout(HOST_TIMEOUT, host.read_u8()).await {
            // One too many is closed.
            Ok(Ok(CARRY)) => drop(self.wait.try_send(host)),
            Ok(Ok(LISTEN)) => self.listen(host).await,
            other => tracing::warn!(?other, "a connection of the host's does not say what it is for"),
        }
    }

    async fn listen(&self, mut host: S) {
        let mut listeners: HashMap<Endpoint, JoinSet<()>> = HashMap::new();
        while let Ok(list) = read_list(&mut host).await {
            listeners.retain(|endpoint, _| list.contains(endpoint));
            for endpoint in list {
                if listeners.contains_key(&endpoint) {
                    continue;
                }
                match self.open(endpoint).await {
                    Ok(serving) => drop(listeners.insert(endpoint, serving)),
                    // A server in the guest may listen there already. Then it keeps the address.
                    Err(error) => tracing::debug!(?endpoint, %error, "not handed over"),
                }
            }
        }
    }

    /// Listens on an endpoint for as long as the answer is held.
    async fn open(&self, endpoint: Endpoint) -> io::Result<JoinSet<()>> {
        let (of, address) = (self.clone(), endpoint.address);
        let mut serving = JoinSet::new();
        match endpoint.protocol {
            Protocol::Tcp => {
                let listener = self.netns.run(move || std::net::TcpListener::bind(address)).await??;
                listener.set_nonblocking(true)?;
                let listener = TcpListener::from_std(listener)?;
                serving.spawn(async move { of.accept(endpoint, &listener).await });
            }
            Protocol::Udp => {
                let socket = self.netns.run(move || std::net::UdpSocket::bind(address)).await??;
                socket.set_nonblocking(true)?;
                let socket = Arc::new(UdpSocket::from_std(socket)?);
                serving.spawn(async move { of.receive(endpoint, &socket).await });
            }
        }
        Ok(serving)
    }

    async fn accept(&self, endpoint: Endpoint, listener: &TcpListener) {
        let mut carried = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((client, _)) => {
                        let of = self.clone();
                        carried.spawn(async move { of.carry_stream(endpoint, client).await });
                    }
                    Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => return tracing::warn!(?endpoint, %error, "no longer handed over"),
                },
                Some(_) = carried.join_next() => {}
            }
        }
    }

    async fn carry_stream(&self, endpoint: Endpoint, mut client: TcpStream) {
        let Ok(mut host) = self.host(endpoint).await else {
            // An error for who has dialled, and not an empty answer.
            let _ = set_socket_linger(&client, Some(Duration::ZERO));
            return;
        };
        if let Err(error) = copy_bidirectional_with_sizes(&mut client, &mut host, CHUNK, CHUNK).await {
            tracing::debug!(?endpoint, %error, "a connection that was handed over ended early");
        }
    }

    async fn receive(&self, endpoint: Endpoint, socket: &Arc<UdpSocket>) {
        let mut clients: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
        let mut carried = JoinSet::new();
        let mut datagram = vec![0; MAX_DATAGRAM + 1];
        loop {
            tokio::select! {
                received = socket.recv_from(&mut datagram) => {
                    // An error is one of a datagram that was sent before.
                    let Ok((length, client)) = received else { continue };
                    if length > MAX_DATAGRAM {
                        continue;
                    }
                    let datagram = datagram.get(..length).unwrap_or_default().to_vec();
                    let room = clients.len() < MAX_CLIENTS;
                    let queue = clients.get(&client).cloned().or_else(|| room.then(|| {
                        let (queue, queued) = mpsc::channel(MAX_QUEUED);
                        let (of, socket) = (self.clone(), Arc::clone(socket));
                        carried.spawn(async move { of.carry_datagrams(endpoint, &socket, client, queued).await; client });
                        clients.insert(client, queue.clone());
                        queue
                    }));
                    if let Some(queue) = queue {
                        let _ = queue.try_send(datagram);
                    }
                }
                Some(ended) = carried.join_next() => {
                    if let Ok(client) = ended {
                        clients.remove(&client);
                    }
                }
            }
        }
    }

    /// Carries the datagrams of one client and the answers to it.
    async fn carry_datagrams(
        &self,
        endpoint: Endpoint,
        socket: &UdpSocket,
        client: SocketAddr,
        mut queued: mpsc::Receiver<Vec<u8>>,
    ) {
        let Ok(host) = self.host(endpoint).await else { return };
        let (mut from_host, mut to_host) = tokio::io::split(host);
        let ask = async {
            while let Ok(Some(datagram)) = tokio::time::timeout(UDP_CLIENT_TIMEOUT, queued.recv()).await {
                let Ok(length) = u16::try_from(datagram.len()) else { continue };
                to_host.write_u16_le(length).await?;
                to_host.write_all(&datagram).await?;
            }
            Ok::<_, io::Error>(())
        };
        let answer = async {
            loop {
                let mut datagram = vec![0; from_host.read_u16_le().await?.into()];
                from_host.read_exact(&mut datagram).await?;
                let _ = socket.send_to(&datagram, client).await;
            }
        };
        let ended: io::Result<()> = tokio::select! { ended = ask => ended, ended = answer => ended };
        if let Err(error) = ended {
            tracing::debug!(?endpoint, %error, "datagrams are no longer handed over");
        }
    }

    /// A connection of the host's to an endpoint there.
    async fn host(&self, endpoint: Endpoint) -> io::Result<S> {
        let connect = async {
            let mut host = self.waiting.lock().await.recv().await.ok_or(io::ErrorKind::BrokenPipe)?;
            host.write_all(&endpoint.encode()).await?;
            match host.read_u8().await? {
                CONNECTED => Ok(host),
                _ => Err(io::ErrorKind::ConnectionRefused.into()),
            }
        };
        tokio::time::timeout(HOST_TIMEOUT, connect).await?
    }
}

async fn read_list(host: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<Endpoint>> {
    let count = usize::from(host.read_u8().await?).min(MAX_ENDPOINTS);
    let mut list = Vec::new();
    for _ in 0..count {
        let mut bytes = [0; ENDPOINT_LEN];
        host.read_exact(&mut bytes).await?;
        list.extend(Endpoint::decode(bytes));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;

    /// The guest's side, and the host's of a connection for what was dialled.
    struct Parts {
        handover: Handover<DuplexStream>,
    }

    impl Parts {
        fn new() -> Self {
            Self { handover: Handover::new(Netns::default()) }
        }

        async fn connect(&self, kind: u8) -> DuplexStream {
            let (mut host, guest) = tokio::io::duplex(64 << 10);
            tokio::spawn(self.handover.clone().connection(guest));
            host.write_u8(kind).await.unwrap();
            host
        }
    }

    /// An endpoint that nobody has.
    fn endpoint(protocol: Protocol) -> Endpoint {
        let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Endpoint { protocol, address }
    }

    async fn listen(parts: &Parts, list: &[Endpoint]) -> DuplexStream {
        let mut host = parts.connect(LISTEN).await;
        host.write_u8(u8::try_from(list.len()).unwrap()).await.unwrap();
        for endpoint in list {
            host.write_all(&endpoint.encode()).await.unwrap();
        }
        host
    }

    async fn dialled(host: &mut DuplexStream) -> Endpoint {
        let mut bytes = [0; ENDPOINT_LEN];
        host.read_exact(&mut bytes).await.unwrap();
        Endpoint::decode(bytes).unwrap()
    }

    async fn connect(address: SocketAddr) -> TcpStream {
        loop {
            match TcpStream::connect(address).await {
                Ok(client) => return client,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }

    #[tokio::test]
    async fn connection_is_handed_over_with_its_endpoint_and_its_bytes() {
        let (parts, wanted) = (Parts::new(), endpoint(Protocol::Tcp));
        let list = listen(&parts, &[wanted]).await;
        let mut host = parts.connect(CARRY).await;
        let mut client = connect(wanted.address).await;
        assert_eq!(dialled(&mut host).await, wanted);
        host.write_all(&[CONNECTED, b'h', b'i']).await.unwrap();
        assert_eq!([client.read_u8().await.unwrap(), client.read_u8().await.unwrap()], *b"hi");
        client.write_all(b"yo").await.unwrap();
        assert_eq!([host.read_u8().await.unwrap(), host.read_u8().await.unwrap()], *b"yo");
        // With the list's end nobody listens any more.
        drop(list);
        while TcpStream::connect(wanted.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn refusal_of_the_host_is_one_for_the_dialler() {
        let (parts, wanted) = (Parts::new(), endpoint(Protocol::Tcp));
        let _list = listen(&parts, &[wanted]).await;
        let mut host = parts.connect(CARRY).await;
        let mut client = connect(wanted.address).await;
        dialled(&mut host).await;
        host.write_u8(bulkhead_protocol::handover::REFUSED).await.unwrap();
        assert_eq!(client.read_u8().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn datagrams_of_each_client_are_answered_to_it() {
        let (parts, wanted) = (Parts::new(), endpoint(Protocol::Udp));
        let _list = listen(&parts, &[wanted]).await;
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(wanted.address).await.unwrap();
        let mut host = parts.connect(CARRY).await;
        // Until it listens, datagrams to it are refused.
        let mut answer = [0; 8];
        let asked = async {
            loop {
                let _ = client.send(b"who").await;
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = asked => {}
            got = dialled(&mut host) => assert_eq!(got, wanted),
        }
        host.write_all(&[CONNECTED]).await.unwrap();
        assert_eq!(host.read_u16_le().await.unwrap(), 3);
        host.write_all(&[2, 0, b'm', b'e']).await.unwrap();
        let length = loop {
            match client.recv(&mut answer).await {
                Ok(length) => break length,
                Err(_) => tokio::task::yield_now().await,
            }
        };
        assert_eq!(&answer[..length], b"me");
    }

    #[tokio::test]
    async fn endpoint_of_somebody_in_the_guest_stays_its_own() {
        let parts = Parts::new();
        let own = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let taken = Endpoint { protocol: Protocol::Tcp, address: own.local_addr().unwrap() };
        let other = endpoint(Protocol::Tcp);
        let _list = listen(&parts, &[taken, other]).await;
        let mut host = parts.connect(CARRY).await;
        let _client = connect(other.address).await;
        assert_eq!(dialled(&mut host).await, other);
        let _mine = TcpStream::connect(taken.address).await.unwrap();
        own.accept().await.unwrap();
    }
}
