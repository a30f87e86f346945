//! What a container without a pod dials at a loopback address on which only its network namespace on the host listens, Docker's
//! resolver above all, is handed to the host over vsock connections to
//! [`AGENT_HANDOVER_PORT`](crate::guest::AGENT_HANDOVER_PORT). The host makes them all; its first byte says what for:
//!
//! - [`LISTEN`]: lists of [`Endpoint`]s follow, each with its length before it. The guest listens on those of the last list, as
//!   far as nobody there does, until the connection ends.
//! - [`CARRY`]: the connection waits. When somebody dials an endpoint, the guest sends it on one of those that wait, the host
//!   answers with [`CONNECTED`] or [`REFUSED`], and then the connection carries the bytes of both directions, or, for UDP,
//!   datagrams with two bytes of length before each, little-endian.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// First byte of a connection that carries lists.
pub const LISTEN: u8 = 1;
/// First byte of a connection that waits.
pub const CARRY: u8 = 2;
/// The host has connected.
pub const CONNECTED: u8 = 0;
/// Nobody listens there any more.
pub const REFUSED: u8 = 1;
/// Bytes of an encoded endpoint.
pub const ENDPOINT_LEN: usize = 20;
/// Most endpoints of a list.
pub const MAX_ENDPOINTS: usize = 64;
/// Longest datagram that is carried. One of more is dropped, as one of less may be.
pub const MAX_DATAGRAM: usize = 16 << 10;

const TCP: u8 = 6;
const UDP: u8 = 17;
const IPV4: u8 = 4;
const IPV6: u8 = 6;

/// A protocol.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// Where somebody listens.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Endpoint {
    /// How it is dialled.
    pub protocol: Protocol,
    /// Where.
    pub address: SocketAddr,
}

impl Endpoint {
    /// Protocol and family, a byte each, the port, little-endian, and the address, filled up with zeroes.
    pub fn encode(self) -> [u8; ENDPOINT_LEN] {
        let mut bytes = [0; ENDPOINT_LEN];
        let (head, address) = bytes.split_at_mut(4);
        let family = if self.address.is_ipv4() { IPV4 } else { IPV6 };
        let [low, high] = self.address.port().to_le_bytes();
        head.copy_from_slice(&[if self.protocol == Protocol::Tcp { TCP } else { UDP }, family, low, high]);
        match self.address.ip() {
            IpAddr::V4(ip) => address[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => address.copy_from_slice(&ip.octets()),
        }
        bytes
    }

    /// Decodes what [`Self::encode`] made: an address of the loopback interface, as nothing else is handed over.
    pub fn decode(bytes: [u8; ENDPOINT_LEN]) -> Option<Self> {
        let [protocol, family, low, high, rest @ ..] = bytes;
        let protocol = match protocol {
            TCP => Protocol::Tcp,
            UDP => Protocol::Udp,
            _ => return None,
        };
        let [a, b, c, d, ..] = rest;
        let ip = match family {
            IPV4 => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            IPV6 => IpAddr::V6(Ipv6Addr::from(rest)),
            _ => return None,
        };
        let port = u16::from_le_bytes([low, high]);
        (ip.is_loopback() && port != 0).then_some(Self { protocol, address: SocketAddr::new(ip, port) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoint_encoded_decodes_to_itself() {
        for (protocol, address) in
            [(Protocol::Tcp, "127.0.0.11:53"), (Protocol::Udp, "127.0.0.11:40000"), (Protocol::Tcp, "[::1]:65535")]
        {
            let endpoint = Endpoint { protocol, address: address.parse().unwrap() };
            assert_eq!(Endpoint::decode(endpoint.encode()), Some(endpoint));
        }
    }

    #[test]
    fn what_is_no_endpoint_of_the_loopback_interface_is_none() {
        let of = |address: &str| Endpoint { protocol: Protocol::Tcp, address: address.parse().unwrap() }.encode();
        for bytes in [of("10.0.0.1:53"), of("127.0.0.1:0"), of("[fe80::1]:1"), [0; ENDPOINT_LEN], [6; ENDPOINT_LEN]] {
            assert_eq!(Endpoint::decode(bytes), None, "{bytes:?}");
        }
    }
}
