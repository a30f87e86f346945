//! What CNI has set up in the pod's namespace, read over rtnetlink(7) and nfnetlink.

use std::collections::HashSet;

use bulkhead_protocol::agent::Firewall;
use bulkhead_protocol::rtnl::{Message, NEW_ADDRESS, NEW_ROUTE, NEW_RULE, Socket, u32_at};

use super::NetworkError;
use super::entries::{self, Entry};
use super::firewall;
use super::links::{self, IFF_NOARP, IFF_UP, Link, Role};
use super::unsupported::Unsupported;

/// A namespace's network.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Its links, by age.
    pub links: Vec<Link>,
    /// Addresses, neighbours, routes and rules of what the guest has of its links. Routes without a gateway come first.
    pub entries: Vec<Entry>,
    /// Rules of the packet filter, if they are known.
    pub firewall: Option<Firewall>,
    /// What the guest cannot have.
    pub unsupported: Vec<Unsupported>,
}

impl State {
    /// Reads that of the calling thread.
    pub async fn read(socket: &Socket) -> Result<Self, NetworkError> {
        let told = dump(socket, "interfaces", &[links::dump()]).await?;
        let links: Vec<Link> = told.into_iter().filter_map(Link::read).collect();
        let missing = links.iter().filter(|link| link.role == Role::Unsupported);
        let mut unsupported: Vec<_> =
            missing.map(|link| Unsupported { what: link.describe(), security: false }).collect();
        let neighbours = [entries::dump_neighbours(false), entries::dump_neighbours(true)];
        let neighbours = dump(socket, "neighbours", &neighbours).await?;
        let routes = routes(socket, &links, &mut unsupported).await?;
        let addresses = addresses(socket, &links, &routes).await?;
        let rules = dump(socket, "routing rules", &entries::dumps(NEW_RULE)).await?;
        let arp = |told: &Message| {
            let link = u32_at(&told.payload, 4).and_then(|index| links.iter().find(|link| link.index == index));
            link.is_some_and(|link| link.role != Role::Loopback && link.flags & IFF_NOARP == 0)
        };
        let neighbours = neighbours.iter().filter_map(|told| entries::neighbour(told, arp(told)));
        let rules: Vec<_> = rules.iter().filter_map(|told| entries::rule(told, &mut unsupported)).collect();
        let carried = indexes(&links);
        let neighbours = neighbours.filter(|entry| is_of(entry, &carried));
        let entries = addresses.into_iter().chain(neighbours).chain(routes).chain(rules).collect();
        let (firewall, uncarried) = firewall::read();
        unsupported.extend(uncarried);
        Ok(Self { links, entries, firewall, unsupported })
    }

    /// Leaves out links whose devices the guest does not have, with what is theirs.
    pub fn leave(&mut self, missing: impl Fn(&Link) -> bool) {
        let mut left = HashSet::new();
        for link in self.links.iter_mut().filter(|link| link.role == Role::Device && missing(link)) {
            link.role = Role::Unsupported;
            left.insert(link.index);
        }
        if !left.is_empty() {
            self.entries.retain(|entry| !entry.message.links().iter().any(|index| left.contains(index)));
        }
    }

    /// Whether there is nothing that a guest does not have by itself.
    pub fn is_empty(&self) -> bool {
        self.carried().all(|link| link.role == Role::Loopback)
            && self.entries.iter().all(entries::is_a_first_rule)
            && firewall::difference(Some(&Firewall::default()), self.firewall.as_ref()).is_none()
            && self.unsupported.is_empty()
    }

    /// Those of its links that the guest has.
    pub fn carried(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(|link| link.is_carried())
    }

    /// Those of its links that are devices of the guest.
    pub fn devices(&self) -> impl Iterator<Item = &Link> {
        self.links.iter().filter(|link| link.role == Role::Device)
    }

    /// A link.
    pub fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }
}

async fn routes(
    socket: &Socket,
    links: &[Link],
    unsupported: &mut Vec<Unsupported>,
) -> Result<Vec<Entry>, NetworkError> {
    let told = dump(socket, "routes", &entries::dumps(NEW_ROUTE)).await?;
    let carried = indexes(links);
    // Of a link that the guest does not have, the link itself is what is told to be missing.
    let told = told.iter().filter(|told| told.links().iter().all(|index| carried.contains(index)));
    let mut routes: Vec<_> = told.filter_map(|told| entries::route(told, unsupported)).collect();
    routes.sort_by_key(|route| !entries::is_on_link(route));
    Ok(routes)
}

async fn addresses(socket: &Socket, links: &[Link], routes: &[Entry]) -> Result<Vec<Entry>, NetworkError> {
    let [v4, v6] = entries::dumps(NEW_ADDRESS);
    let mut told = dump(socket, "addresses", &[v4]).await?;
    // The kernel tells of the newest one first.
    told.extend(dump(socket, "addresses", &[v6]).await?.into_iter().rev());
    let read = |told: &Message| {
        let index = u32_at(&told.payload, 4)?;
        let link = links.iter().find(|link| link.index == index && link.is_carried())?;
        let mut entry = entries::address(told, link.role == Role::Loopback)?;
        // One that is down has no routes, and loopback's are local ones.
        if link.flags & IFF_UP != 0 && link.role != Role::Loopback {
            entries::without_prefix_route(&mut entry, routes);
        }
        Some(entry)
    };
    Ok(told.iter().filter_map(read).collect())
}

fn indexes(links: &[Link]) -> HashSet<u32> {
    links.iter().filter(|link| link.is_carried()).map(|link| link.index).collect()
}

fn is_of(entry: &Entry, carried: &HashSet<u32>) -> bool {
    entry.message.links().iter().all(|index| carried.contains(index))
}

async fn dump(socket: &Socket, what: &'static str, requests: &[Message]) -> Result<Vec<Message>, NetworkError> {
    let mut found = Vec::new();
    for request in requests {
        found.extend(socket.dump(request).await.map_err(|source| NetworkError::Dump { what, source })?);
    }
    Ok(found)
}
