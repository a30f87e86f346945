//! Interfaces, routes and neighbours of the pod, by rtnetlink(7).

use std::collections::HashMap;
use std::net::IpAddr;

use bulkhead_protocol::agent::{Interface, InterfaceStats, Neighbour, Route};
use futures::TryStreamExt;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags};
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::neighbour::NeighbourState;
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use tokio::task::JoinHandle;

use self::parse::{Mac, Prefix};
use crate::netns::Netns;

pub(super) mod parse;

/// RTNH_F_ONLINK of `linux/rtnetlink.h`: the gateway is on the link whatever the addresses say.
const RTNH_F_ONLINK: u32 = 4;

/// What the pod's network is to be.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// With their devices, which are there.
    pub interfaces: Vec<Interface>,
    /// Through them.
    pub routes: Vec<Route>,
    /// On them.
    pub neighbours: Vec<Neighbour>,
}

/// Sets the pod's network up, the loopback interface included.
pub async fn configure(netns: &Netns, wanted: Wanted) -> Result<(), NetworkError> {
    let Some(holder) = netns.holder() else { return configure_here(&wanted).await };
    let network = Network::connect()?;
    network.move_links(&wanted.interfaces, holder).await?;
    let configure = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
        runtime.map_err(NetworkError::Socket)?.block_on(configure_here(&wanted))
    };
    netns.run(configure).await.map_err(NetworkError::Namespace)?
}

async fn configure_here(wanted: &Wanted) -> Result<(), NetworkError> {
    Network::connect()?.configure(&wanted.interfaces, &wanted.routes, &wanted.neighbours).await
}

/// An rtnetlink(7) connection in the namespace of the thread that makes it.
struct Network {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Network {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Network {
    fn connect() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    /// Devices appear in the guest's own namespace.
    async fn move_links(&self, interfaces: &[Interface], holder: u32) -> Result<(), NetworkError> {
        let links = self.links().await?;
        for interface in interfaces {
            let index = find(&links, interface)?.index;
            self.set_link(LinkUnspec::new_with_index(index).setns_by_pid(holder).build(), &interface.name).await?;
        }
        Ok(())
    }

    async fn configure(
        &self,
        interfaces: &[Interface],
        routes: &[Route],
        neighbours: &[Neighbour],
    ) -> Result<(), NetworkError> {
        let links = self.links().await?;
        let mut by_name = HashMap::new();
        if let Some(lo) = links.values().find(|link| link.name == "lo") {
            self.set_link(LinkUnspec::new_with_index(lo.index).up().build(), "lo").await?;
            by_name.insert("lo".to_owned(), lo.index);
        }
        for interface in interfaces {
            let index = find(&links, interface)?.index;
            self.configure_interface(index, interface, routes).await?;
            by_name.insert(interface.name.clone(), index);
        }
        let index =
            |name: &str| by_name.get(name).copied().ok_or_else(|| NetworkError::NoInterface { name: name.into() });
        self.add_routes(routes, index).await?;
        for neighbour in neighbours {
            self.add_neighbour(neighbour, index(&neighbour.interface)?).await?;
        }
        Ok(())
    }

    /// The guest's interfaces by their MAC addresses.
    async fn links(&self) -> Result<HashMap<Mac, Link>, NetworkError> {
        let mut links = HashMap::new();
        let mut stream = self.handle.link().get().execute();
        while let Some(message) =
            stream.try_next().await.map_err(|error| NetworkError::kernel("list interfaces", error))?
        {
            let (mut name, mut mac) = (String::new(), None);
            for attribute in message.attributes {
                match attribute {
                    LinkAttribute::IfName(is) => name = is,
                    LinkAttribute::Address(bytes) => mac = Mac::from_bytes(&bytes),
                    _ => {}
                }
            }
            if let Some(mac) = mac {
                links.insert(mac, Link { index: message.header.index, name });
            }
        }
        Ok(links)
    }

    async fn configure_interface(
        &self,
        index: u32,
        interface: &Interface,
        routes: &[Route],
    ) -> Result<(), NetworkError> {
        // Only an interface that is down can be renamed, and it is: nothing but the agent would have brought it up.
        let mut link = LinkUnspec::new_with_index(index).name(interface.name.clone());
        if interface.mtu > 0 {
            link = link.mtu(interface.mtu);
        }
        self.set_link(link.up().build(), &interface.name).await?;
        for address in &interface.addresses {
            let prefix: Prefix = address.parse()?;
            let mut request = self.handle.address().add(index, prefix.address, prefix.length);
            request.message_mut().attributes.push(AddressAttribute::Flags(address_flags(
                prefix,
                &interface.name,
                routes,
            )));
            let added = request.execute().await;
            tolerate_existing(added).map_err(|error| NetworkError::kernel(&format!("add address {address}"), error))?;
        }
        Ok(())
    }

    async fn set_link(&self, message: netlink_packet_route::link::LinkMessage, name: &str) -> Result<(), NetworkError> {
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|error| NetworkError::kernel(&format!("configure interface {name}"), error))
    }

    /// Adds routes so that every gateway is reachable when it is needed: those on link first, then those through gateways,
    /// again and again as long as the kernel takes some of them.
    async fn add_routes(
        &self,
        routes: &[Route],
        index: impl Fn(&str) -> Result<u32, NetworkError>,
    ) -> Result<(), NetworkError> {
        let mut pending = Vec::new();
        for route in routes {
            pending.push((route, route_message(route, index(&route.interface)?)?));
        }
        pending.sort_by_key(|(route, _)| !route.gateway.is_empty());
        while !pending.is_empty() {
            let (before, mut unreachable) = (pending.len(), Vec::new());
            for (route, message) in pending {
                let added = tolerate_existing(self.handle.route().add(message.clone()).execute().await);
                match added {
                    Err(error) if is_unreachable(&error) => unreachable.push((route, message, error)),
                    other => other.map_err(|error| NetworkError::kernel(&describe(route), error))?,
                }
            }
            if unreachable.len() == before
                && let Some((route, _, error)) = unreachable.pop()
            {
                return Err(NetworkError::kernel(&describe(route), error));
            }
            pending = unreachable.into_iter().map(|(route, message, _)| (route, message)).collect();
        }
        Ok(())
    }

    async fn add_neighbour(&self, neighbour: &Neighbour, index: u32) -> Result<(), NetworkError> {
        let address = parse::address(&neighbour.address)?;
        let mac: Mac = neighbour.mac.parse()?;
        let state = u16::try_from(neighbour.state).ok().filter(|state| *state != 0);
        let added = self
            .handle
            .neighbours()
            .add(index, address)
            .link_layer_address(mac.as_bytes())
            .state(state.map_or(NeighbourState::Permanent, NeighbourState::from))
            .replace()
            .execute()
            .await;
        added.map_err(|error| NetworkError::kernel(&format!("add neighbour {}", neighbour.address), error))
    }
}

fn find<'a>(links: &'a HashMap<Mac, Link>, interface: &Interface) -> Result<&'a Link, NetworkError> {
    let mac: Mac = interface.mac.parse()?;
    links.get(&mac).ok_or_else(|| NetworkError::NoDevice { mac: interface.mac.clone() })
}

/// The flags that an address gets.
fn address_flags(prefix: Prefix, interface: &str, routes: &[Route]) -> AddressFlags {
    let mut flags = AddressFlags::empty();
    // The host's CNI has made sure that the address is the pod's; detection would delay its use by a second.
    if prefix.address.is_ipv6() {
        flags |= AddressFlags::Nodad;
    }
    // The kernel adds a route for the prefix by itself. Where CNI has taken that away (ptp, a gateway on link) the
    // neighbours are not on this link, and the guest would look for them there.
    let is_prefix_route = |route: &Route| {
        route.interface == interface && route.gateway.is_empty() && route.destination == prefix.network().to_string()
    };
    if !routes.iter().any(is_prefix_route) {
        flags |= AddressFlags::Noprefixroute;
    }
    flags
}

struct Link {
    index: u32,
    name: String,
}

fn describe(route: &Route) -> String {
    let destination = if route.destination.is_empty() { "default" } else { &route.destination };
    format!("add route {destination} via \"{}\" on {}", route.gateway, route.interface)
}

fn route_message(route: &Route, index: u32) -> Result<RouteMessage, NetworkError> {
    let invalid = |_| NetworkError::Route { route: describe(route) };
    let mut builder = RouteMessageBuilder::<IpAddr>::new().output_interface(index).protocol(RouteProtocol::Boot);
    builder.get_mut().header.address_family = match i32::try_from(route.family) {
        Ok(libc::AF_INET) => AddressFamily::Inet,
        Ok(libc::AF_INET6) => AddressFamily::Inet6,
        _ => return Err(NetworkError::Route { route: describe(route) }),
    };
    if !route.destination.is_empty() {
        let prefix: Prefix = route.destination.parse()?;
        builder = builder.destination_prefix(prefix.address, prefix.length).map_err(invalid)?;
    }
    if !route.gateway.is_empty() {
        builder = builder.gateway(parse::address(&route.gateway)?).map_err(invalid)?;
    }
    if !route.source.is_empty() {
        builder = builder.pref_source(parse::address(&route.source)?).map_err(invalid)?;
    }
    let scope = u8::try_from(route.scope).map_err(|_| NetworkError::Route { route: describe(route) })?;
    builder = builder.scope(RouteScope::from(scope));
    if route.metric > 0 {
        builder = builder.priority(route.metric);
    }
    if route.flags & RTNH_F_ONLINK != 0 {
        builder = builder.onlink();
    }
    let mut message = builder.build();
    if route.mtu > 0 {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Ok(message)
}

/// The kernel adds routes for addresses by itself, and the shim tells all that it has found.
fn tolerate_existing(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(()),
        other => other,
    }
}

fn is_unreachable(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL))
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}

/// Counters of the pod's interfaces; loopback is left out.
pub fn interface_stats(netns: &Netns) -> Vec<InterfaceStats> {
    parse::interface_stats(&netns.counters().unwrap_or_default())
}

/// The network cannot be what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// netlink(7).
    #[error("cannot open a netlink socket")]
    Socket(#[source] std::io::Error),
    /// setns(2).
    #[error("cannot enter the network namespace of the pod's user namespace")]
    Namespace(#[source] std::io::Error),
    /// The kernel refuses.
    #[error("cannot {what}")]
    Kernel { what: String, source: rtnetlink::Error },
    /// No such interface was plugged in.
    #[error("the guest has no network device with MAC address {mac}")]
    NoDevice { mac: String },
    /// A route or neighbour names an interface that the request does not.
    #[error("there is no interface \"{name}\" among those of the pod")]
    NoInterface { name: String },
    /// An address that is none.
    #[error("\"{text}\" is no valid {what}")]
    Syntax { what: &'static str, text: String },
    /// Addresses of different families, or none.
    #[error("cannot {route}: its family, scope and addresses do not fit together")]
    Route { route: String },
}

impl NetworkError {
    fn kernel(what: &str, source: rtnetlink::Error) -> Self {
        Self::Kernel { what: what.into(), source }
    }

    /// Whether the request, rather than the guest, is at fault.
    pub fn is_bad_request(&self) -> bool {
        matches!(self, Self::NoInterface { .. } | Self::Syntax { .. } | Self::Route { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_route_is_left_out_where_cni_has_taken_it_away() {
        let route = |destination: &str, gateway: &str| Route {
            destination: destination.into(),
            gateway: gateway.into(),
            interface: "eth0".into(),
            ..Route::default()
        };
        let flags = |routes: &[Route]| address_flags("10.22.0.5/24".parse().unwrap(), "eth0", routes);
        assert_eq!(flags(&[route("10.22.0.0/24", "")]), AddressFlags::empty());
        assert_eq!(flags(&[route("10.22.0.0/24", "10.22.0.1")]), AddressFlags::Noprefixroute);
        assert_eq!(flags(&[]), AddressFlags::Noprefixroute);
    }
}
