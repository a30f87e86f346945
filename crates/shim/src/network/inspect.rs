//! What CNI has set up in the pod's namespace, read over rtnetlink(7) in the form in which the guest is told.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_protocol::agent::{Interface, Neighbour, Route};
use futures::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope,
    RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::{Network, NetworkError};

/// An Ethernet interface of the pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u32,
}

pub fn failed(what: &'static str) -> impl Fn(rtnetlink::Error) -> NetworkError {
    move |source| NetworkError::Netlink { what, source }
}

/// The interfaces that the guest gets: Ethernet, and not a tap of ours. Loopback and the tunnel devices that appear in
/// every namespace are none.
pub async fn links(handle: &Handle) -> Result<Vec<Link>, NetworkError> {
    let all: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(failed("list the pod's interfaces"))?;
    Ok(all.iter().filter_map(link).collect())
}

fn link(message: &LinkMessage) -> Option<Link> {
    let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    if !ethernet || message.header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let (mut name, mut mac, mut mtu) = (None, None, 1500);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Address(bytes) => mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            _ => {}
        }
    }
    let name = name.filter(|name| !name.starts_with("tap-"))?;
    Some(Link { index: message.header.index, name, mac: mac?, mtu })
}

/// Addresses, routes and neighbours of the interfaces.
pub async fn network(handle: &Handle, links: &[Link]) -> Result<Network, NetworkError> {
    let names: HashMap<u32, &str> = links.iter().map(|link| (link.index, link.name.as_str())).collect();
    let addresses = addresses(handle).await?;
    let interfaces = links.iter().map(|link| Interface {
        name: link.name.clone(),
        mac: mac_text(&link.mac),
        mtu: link.mtu,
        addresses: addresses.iter().filter(|(index, _)| *index == link.index).map(|(_, text)| text.clone()).collect(),
        ..Interface::default()
    });
    Ok(Network {
        interfaces: interfaces.collect(),
        routes: routes(handle, &names).await?,
        neighbours: neighbours(handle, &names).await?,
        ..Network::default()
    })
}

async fn addresses(handle: &Handle) -> Result<Vec<(u32, String)>, NetworkError> {
    let mut all = handle.address().get().execute();
    let mut found = Vec::new();
    while let Some(message) = all.try_next().await.map_err(failed("list the pod's addresses"))? {
        let local = message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let address = local.or_else(|| {
            message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            })
        });
        // The guest makes its link-local address itself, from the same MAC.
        if let Some(address) = address.filter(|address| !is_link_local(address)) {
            found.push((message.header.index, format!("{address}/{}", message.header.prefix_len)));
        }
    }
    Ok(found)
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

async fn routes(handle: &Handle, names: &HashMap<u32, &str>) -> Result<Vec<Route>, NetworkError> {
    let what = "list the pod's routes";
    let v4 = handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
    let mut all: Vec<RouteMessage> = v4.try_collect().await.map_err(failed(what))?;
    let v6 = handle.route().get(RouteMessageBuilder::<Ipv6Addr>::new().build()).execute();
    all.extend(v6.try_collect::<Vec<_>>().await.map_err(failed(what))?);
    let mut routes: Vec<Route> = all.iter().filter_map(|message| route(message, names)).collect();
    // A gateway must be reachable before a route through it can be added.
    routes.sort_by_key(|route| !route.gateway.is_empty());
    Ok(routes)
}

/// A route of the main table. The kernel's own for an address's prefix are told as well: some CNI plugins (ptp) take them
/// away, and then the guest must not have them either.
fn route(message: &RouteMessage, names: &HashMap<u32, &str>) -> Option<Route> {
    let header = &message.header;
    let ours = header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
    if !ours || matches!(header.protocol, RouteProtocol::IcmpRedirect | RouteProtocol::Ra) {
        return None;
    }
    let mut route = Route {
        family: u32::from(u8::from(header.address_family)),
        scope: u32::from(u8::from(header.scope)),
        flags: (header.flags & RouteFlags::Onlink).bits(),
        ..Route::default()
    };
    if header.address_family == AddressFamily::Inet6 && header.scope != RouteScope::Universe {
        // The kernel ignores an IPv6 route's scope and reports none but this.
        route.scope = 0;
    }
    for attribute in &message.attributes {
        match attribute {
            // As with the addresses: the guest makes these itself.
            RouteAttribute::Destination(address) if is_link_local(&ip(address)?) => return None,
            RouteAttribute::Destination(address) => {
                route.destination = format!("{}/{}", ip(address)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = ip(address)?.to_string(),
            RouteAttribute::PrefSource(address) => route.source = ip(address)?.to_string(),
            RouteAttribute::Oif(index) => route.interface = (*names.get(index)?).to_owned(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Metrics(metrics) => route.mtu = mtu(metrics),
            _ => {}
        }
    }
    Some(route).filter(|route| !route.interface.is_empty())
}

fn mtu(metrics: &[RouteMetric]) -> u32 {
    let found = metrics.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    found.unwrap_or(0)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

async fn neighbours(handle: &Handle, names: &HashMap<u32, &str>) -> Result<Vec<Neighbour>, NetworkError> {
    let all: Vec<NeighbourMessage> =
        handle.neighbours().get().execute().try_collect().await.map_err(failed("list the pod's neighbours"))?;
    Ok(all.iter().filter_map(|message| neighbour(message, names)).collect())
}

fn neighbour(message: &NeighbourMessage, names: &HashMap<u32, &str>) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let (mut address, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(ip.to_string()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(ip.to_string()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        address: address?,
        mac: mac_text(&mac?),
        interface: (*names.get(&message.header.ifindex)?).to_owned(),
        state: u32::from(u16::from(message.header.state)),
        ..Neighbour::default()
    })
}

fn mac_text(mac: &[u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}
