//! Servers for a container that are in its network namespace on the host, Docker's resolver at 127.0.0.11 above all. Their
//! loopback addresses are in the guest as well ([`bulkhead_protocol::handover`]): what is dialled there is dialled here again.
//!
//! A guest can reach in this way what listens at loopback addresses of its own namespace, as a container on runc can, and nothing
//! else.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::handover::{
    CARRY, CONNECTED, ENDPOINT_LEN, Endpoint, LISTEN, MAX_DATAGRAM, MAX_ENDPOINTS, Protocol, REFUSED,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpSocket, TcpStream, UdpSocket, UnixStream};
use tokio::sync::{Mutex, Semaphore, watch};

use super::netns::{self, NetnsError};
use super::{Connector, NoConnection};
use crate::deadlines::{Deadline, Operation};

/// Most connections and clients of UDP at a time: a part of the guest's vsock connections.
const MAX_CARRIED: usize = 64;

/// How many connections wait for the guest: a resolver asks for two kinds of addresses at once.
const WAITING: usize = 2;

/// How long nothing may be said between a client of UDP and its server. The guest forgets it before.
const LONGEST_IDLE: Duration = Duration::from_secs(30);

/// Bytes copied at once, in each direction.
const CHUNK: usize = 16 << 10;

/// Port of the name service.
const DOMAIN: u16 = 53;

/// What is handed over from one guest.
#[derive(Debug, Default)]
pub struct Handover {
    endpoints: watch::Sender<Vec<Endpoint>>,
    /// The connection that tells the guest of them, once there are any.
    lists: Mutex<Option<UnixStream>>,
}

impl Handover {
    /// Looks who listens in the namespace, and tells the guest if that has changed.
    pub async fn update(
        &self,
        deadline: Deadline,
        namespace: &Arc<OwnedFd>,
        agent: &impl Connector,
    ) -> Result<(), HandoverError> {
        let listening = netns::run_in(&netns::path_of(namespace), async || listening()).await?;
        let listening = listening.map_err(HandoverError::Look)?;
        let mut lists = self.lists.lock().await;
        if *self.endpoints.borrow() == listening {
            return Ok(());
        }
        let host = match &mut *lists {
            Some(host) => host,
            None => {
                for _ in 0..WAITING {
                    let (endpoints, room) =
                        (self.endpoints.subscribe(), Arc::new(Semaphore::new(MAX_CARRIED / WAITING)));
                    tokio::spawn(carry_all(namespace.clone(), agent.clone(), endpoints, room));
                }
                lists.insert(begin(deadline, agent, LISTEN).await?)
            }
        };
        let mut message = vec![u8::try_from(listening.len()).unwrap_or(u8::MAX)];
        message.extend(listening.iter().flat_map(|endpoint| endpoint.encode()));
        host.write_all(&message).await.map_err(HandoverError::Guest)?;
        self.endpoints.send_replace(listening);
        Ok(())
    }
}

/// A connection to the guest for one of the two things that they are for.
async fn begin(deadline: Deadline, agent: &impl Connector, what: u8) -> Result<UnixStream, HandoverError> {
    let mut host = agent.handover(deadline).await?;
    host.write_u8(what).await.map_err(HandoverError::Guest)?;
    Ok(host)
}

/// Has a connection wait in the guest, one after the other, to the VM's end.
async fn carry_all(
    namespace: Arc<OwnedFd>,
    agent: impl Connector,
    endpoints: watch::Receiver<Vec<Endpoint>>,
    room: Arc<Semaphore>,
) {
    let carrying = async {
        while let Ok(permit) = room.clone().acquire_owned().await {
            let mut guest = begin(Deadline::begin(Operation::GuestConnection), &agent, CARRY).await?;
            let mut bytes = [0; ENDPOINT_LEN];
            guest.read_exact(&mut bytes).await.map_err(HandoverError::Guest)?;
            // What the guest names is the guest's word.
            let dialled = Endpoint::decode(bytes).filter(|dialled| endpoints.borrow().contains(dialled));
            let namespace = namespace.clone();
            tokio::spawn(async move {
                let carried = match dialled {
                    Some(endpoint) => carry(&namespace, endpoint, &mut guest).await,
                    None => Err(io::ErrorKind::AddrNotAvailable.into()),
                };
                if let Err(error) = carried {
                    tracing::debug!(?dialled, %error, "what the guest has dialled is not carried");
                }
                drop(permit);
            });
        }
        Ok::<_, HandoverError>(())
    };
    tokio::select! {
        ended = carrying => if let Err(error) = ended
            && Deadline::begin(Operation::LostAgent).timeout(agent.vm_ended()).await.is_err()
        {
            tracing::warn!("the guest no longer reaches servers on the loopback of the container's network namespace (Docker's DNS): {}", bulkhead_protocol::error::chain(&error));
        },
        () = agent.vm_ended() => {}
    }
}

async fn carry(namespace: &Arc<OwnedFd>, endpoint: Endpoint, guest: &mut UnixStream) -> io::Result<()> {
    let server = match endpoint.protocol {
        Protocol::Tcp => connect(namespace, endpoint.address).await.map(Server::Stream),
        Protocol::Udp => socket(namespace, endpoint.address).await.map(Server::Datagrams),
    };
    guest.write_u8(if server.is_ok() { CONNECTED } else { REFUSED }).await?;
    match server? {
        Server::Stream(mut server) => copy_bidirectional_with_sizes(guest, &mut server, CHUNK, CHUNK).await.map(drop),
        Server::Datagrams(server) => carry_datagrams(guest, &server).await,
    }
}

enum Server {
    Stream(TcpStream),
    Datagrams(UdpSocket),
}

async fn connect(namespace: &Arc<OwnedFd>, address: SocketAddr) -> io::Result<TcpStream> {
    let make = if address.is_ipv4() { TcpSocket::new_v4 } else { TcpSocket::new_v6 };
    let socket = netns::run_in(&netns::path_of(namespace), async move || make()).await.map_err(io::Error::other)??;
    let accepted = Deadline::begin(Operation::DialServer).timeout(socket.connect(address)).await;
    let server = accepted.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    server.set_nodelay(true)?;
    Ok(server)
}

async fn socket(namespace: &Arc<OwnedFd>, address: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
    let make = async move || {
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.connect(address)?;
        socket.set_nonblocking(true)?;
        Ok::<_, io::Error>(socket)
    };
    let socket = netns::run_in(&netns::path_of(namespace), make).await.map_err(io::Error::other)??;
    UdpSocket::from_std(socket)
}

async fn carry_datagrams(guest: &mut UnixStream, server: &UdpSocket) -> io::Result<()> {
    let (mut from_guest, mut to_guest) = guest.split();
    let (said, mut heard) = watch::channel(());
    let ask = async {
        loop {
            let length = usize::from(from_guest.read_u16_le().await?);
            if length > MAX_DATAGRAM {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut datagram = vec![0; length];
            from_guest.read_exact(&mut datagram).await?;
            server.send(&datagram).await?;
            said.send_replace(());
        }
    };
    let answer = async {
        let mut datagram = vec![0; MAX_DATAGRAM];
        loop {
            let length = server.recv(&mut datagram).await?;
            let Ok(prefix) = u16::try_from(length) else { continue };
            to_guest.write_u16_le(prefix).await?;
            to_guest.write_all(datagram.get(..length).unwrap_or_default()).await?;
            said.send_replace(());
        }
    };
    let idle = async {
        while tokio::time::timeout(LONGEST_IDLE, heard.changed()).await.is_ok_and(|changed| changed.is_ok()) {}
    };
    tokio::select! {
        ended = ask => ended,
        ended = answer => ended,
        () = idle => Ok(()),
    }
}

/// The loopback addresses of the calling thread's network namespace that somebody listens on (proc_pid_net(5)).
fn listening() -> io::Result<Vec<Endpoint>> {
    let mut found = BTreeSet::new();
    for (file, protocol, state) in [
        // TCP_LISTEN, and TCP_CLOSE for a UDP socket that is bound and not connected (Linux: include/net/tcp_states.h).
        ("tcp", Protocol::Tcp, "0A"),
        ("tcp6", Protocol::Tcp, "0A"),
        ("udp", Protocol::Udp, "07"),
        ("udp6", Protocol::Udp, "07"),
    ] {
        match std::fs::read_to_string(format!("/proc/thread-self/net/{file}")) {
            Ok(table) => found.extend(parse(&table, state).map(|address| Endpoint { protocol, address })),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(with_name_service(found))
}

/// An engine's resolver has an address to itself and ports that it was given, and the namespace's address translation leads the
/// port of the name service to them (Docker: libnetwork/resolver_unix.go).
fn with_name_service(mut found: BTreeSet<Endpoint>) -> Vec<Endpoint> {
    let common = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let own: BTreeSet<_> = found.iter().map(|endpoint| endpoint.address.ip()).collect();
    for address in own.into_iter().filter(|address| !common.contains(address)) {
        let address = SocketAddr::new(address, DOMAIN);
        found.extend([Protocol::Tcp, Protocol::Udp].map(|protocol| Endpoint { protocol, address }));
    }
    if found.len() > MAX_ENDPOINTS {
        tracing::warn!(
            "{} servers listen on the loopback of the container's network namespace; the guest reaches only the first {MAX_ENDPOINTS}",
            found.len()
        );
    }
    found.into_iter().take(MAX_ENDPOINTS).collect()
}

fn parse<'a>(table: &'a str, state: &'a str) -> impl Iterator<Item = SocketAddr> + 'a {
    table.lines().skip(1).filter_map(move |line| {
        let mut fields = line.split_whitespace();
        let local = fields.nth(1)?;
        (fields.nth(1)? == state).then_some(())?;
        let (address, port) = local.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        Some(SocketAddr::new(ip(address)?, port)).filter(|address| address.ip().is_loopback())
    })
}

/// Words of the address in network order, each written as a number of this machine's.
fn ip(text: &str) -> Option<IpAddr> {
    let word = |at: usize| Some(u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    match text.len() {
        8 => Some(word(0)?.into()),
        32 => {
            let mut octets = [0; 16];
            for (at, chunk) in octets.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            Some(octets.into())
        }
        _ => None,
    }
}

/// Servers of the namespace's are not reached.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// /proc.
    #[error("cannot tell who listens in the container's network namespace")]
    Look(#[source] io::Error),
    /// No connection.
    #[error(transparent)]
    Agent(#[from] NoConnection),
    /// It ends.
    #[error("the guest has ended a connection for what it hands over")]
    Guest(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_at_loopback_addresses_are_found_in_the_kernels_tables() {
        let tcp = "  sl  local_address rem_address   st tx_queue\n   0: 0B00007F:9C40 00000000:0000 0A 0:0\n   \
                   1: 0100007F:0050 0100007F:9999 01 0:0\n   2: 00000000:0016 00000000:0000 0A 0:0\n   3: garbage\n";
        assert_eq!(parse(tcp, "0A").collect::<Vec<_>>(), ["127.0.0.11:40000".parse().unwrap()]);
        let tcp6 = "head\n 0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 0\n";
        assert_eq!(parse(tcp6, "0A").collect::<Vec<_>>(), ["[::1]:8080".parse().unwrap()]);
    }

    #[test]
    fn address_of_a_resolver_has_the_port_of_the_name_service_too() {
        let of = |protocol, address: &str| Endpoint { protocol, address: address.parse().unwrap() };
        let found = [of(Protocol::Udp, "127.0.0.11:40000"), of(Protocol::Tcp, "127.0.0.1:80")];
        let expected = [
            of(Protocol::Tcp, "127.0.0.1:80"),
            of(Protocol::Tcp, "127.0.0.11:53"),
            of(Protocol::Udp, "127.0.0.11:53"),
            of(Protocol::Udp, "127.0.0.11:40000"),
        ];
        assert_eq!(with_name_service(found.into()), expected);
    }

    #[tokio::test]
    async fn servers_of_a_namespace_are_seen_and_reached_from_outside_of_it() {
        let namespace = Arc::new(netns::create().await.unwrap());
        let path = netns::path_of(&namespace);
        let serve = async || {
            // The loopback interface of a new namespace is down.
            let handle = netns::connect().unwrap();
            handle.link().set(rtnetlink::LinkUnspec::new_with_index(1).up().build()).execute().await.unwrap();
            let tcp = std::net::TcpListener::bind("127.0.0.11:0").unwrap();
            let udp = std::net::UdpSocket::bind("127.0.0.11:0").unwrap();
            (tcp, udp, listening().unwrap())
        };
        let (tcp, udp, found) = netns::run_in(&path, serve).await.unwrap();
        let stream = Endpoint { protocol: Protocol::Tcp, address: tcp.local_addr().unwrap() };
        let datagrams = Endpoint { protocol: Protocol::Udp, address: udp.local_addr().unwrap() };
        assert!(found.contains(&stream) && found.contains(&datagrams) && found.len() == 4, "{found:?}");

        let (mut guest, mut ours) = UnixStream::pair().unwrap();
        let of = namespace.clone();
        let carried = tokio::spawn(async move { carry(&of, datagrams, &mut ours).await });
        assert_eq!(guest.read_u8().await.unwrap(), CONNECTED);
        guest.write_all(&[2, 0, b'h', b'i']).await.unwrap();
        let mut asked = [0; 8];
        let (length, client) = tokio::task::spawn_blocking(move || {
            let received = udp.recv_from(&mut asked).unwrap();
            udp.send_to(b"yes", received.1).unwrap();
            received
        })
        .await
        .unwrap();
        assert!(length == 2 && client.ip().is_loopback());
        assert_eq!(guest.read_u16_le().await.unwrap(), 3);
        drop(guest);
        assert!(carried.await.unwrap().is_err());

        let (mut guest, mut ours) = UnixStream::pair().unwrap();
        // A process that another test forks meanwhile may have the socket too.
        rustix::net::shutdown(&tcp, rustix::net::Shutdown::Both).unwrap();
        drop(tcp);
        assert!(carry(&namespace, stream, &mut ours).await.is_err());
        assert_eq!(guest.read_u8().await.unwrap(), REFUSED);
    }
}
