//! The node as a pod finds it and has to leave it: links, addresses, routes, rules, queueing disciplines, mounts and sysctls,
//! compared both ways. What a pod leaves behind is found by it, and what a pod takes away or changes as well.
//!
//! Not compared is what does not stay the same on a node without pods, or is changed by who makes networks and mounts for any
//! runtime: the bridge of the CNI configuration, which comes with the first pod, with all that is about it; the mount that
//! ip-netns(8) makes of its directory; lifetimes of addresses and routes; timers of bridges; and of sysctls those that count or measure
//! ([`CHANGING`]), those of single links, and those that come or go with a module. Neighbours, statistics and connections are
//! none of the list.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use futures::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::RouteAttribute;
use rtnetlink::{IpVersion, RouteMessageBuilder};

/// The bridge of the CNI configuration.
const BRIDGE: &str = "cni0";

/// Sysctls that change by themselves.
const CHANGING: [&str; 12] = [
    "fs/aio-nr",
    "fs/dentry-state",
    "fs/file-nr",
    "fs/inode-nr",
    "fs/inode-state",
    "fs/quota/",
    "kernel/ns_last_pid",
    "kernel/perf_event_max_sample_rate",
    "kernel/pty/nr",
    "kernel/random/",
    "kernel/tainted",
    "net/netfilter/nf_conntrack_count",
];

/// What of a link is its configuration, by the names that the parser has for it.
const OF_LINKS: [&str; 10] = [
    "IfName(",
    "Mtu(",
    "Address(",
    "Controller(",
    "LinkInfo(",
    "TxQueueLen(",
    "Link(",
    "Promiscuity(",
    "Xdp(",
    "IfAlias(",
];

/// What of a bridge changes by itself, by the names that the parser has for it.
const OF_BRIDGES: [&str; 5] = ["HelloTimer", "TcnTimer", "TopologyChangeTimer", "GcTimer", "FdbNLearned"];

/// Links, addresses, routes, rules, queueing disciplines and mounts, each as often as it is there.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NodeState(BTreeMap<String, usize>);

impl NodeState {
    /// Looks at the node.
    pub fn look() -> Result<Self> {
        let mut seen = Self::default();
        network()?.into_iter().for_each(|what| seen.add(what));
        let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
        table.lines().filter_map(mount).for_each(|mount| seen.add(mount));
        Ok(seen)
    }

    fn add(&mut self, what: String) {
        *self.0.entry(what).or_default() += 1;
    }

    /// What is different from before.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let more = |one: &Self, other: &Self, how: &str| {
            let more = one.0.iter().filter(|(what, count)| other.0.get(*what).is_none_or(|there| there < count));
            more.map(|(what, _)| format!("{how} {what}")).collect::<Vec<_>>()
        };
        [more(self, before, "has come:"), more(before, self, "has gone:")].concat()
    }
}

/// What rtnetlink(7) shows, on a thread of its own: who asks may be on a reactor.
fn network() -> Result<Vec<String>> {
    let ask = || -> Result<Vec<String>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(dump())
    };
    let dumped = std::thread::scope(|scope| scope.spawn(ask).join());
    dumped
        .map_err(|_| anyhow!("the thread that looks at the network has panicked"))?
        .context("cannot look at the network")
}

async fn dump() -> Result<Vec<String>> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    let mut seen = Vec::new();
    let mut bridge = None;
    let links: Vec<_> = handle.link().get().execute().try_collect().await?;
    for link in links {
        if link.attributes.contains(&LinkAttribute::IfName(BRIDGE.to_owned())) {
            bridge = Some(link.header.index);
        } else {
            let attributes = told(&link.attributes, |text| OF_LINKS.iter().any(|kept| text.starts_with(kept)));
            let attributes = without(attributes, &OF_BRIDGES);
            seen.push(format!("link {} {:?} {attributes}", link.header.index, link.header.flags));
        }
    }
    let addresses: Vec<_> = handle.address().get().execute().try_collect().await?;
    for address in addresses.into_iter().filter(|address| Some(address.header.index) != bridge) {
        let attributes = told(&address.attributes, |text| !text.starts_with("CacheInfo"));
        seen.push(format!("address {:?} {attributes}", address.header));
    }
    for all in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()] {
        let routes: Vec<_> = handle.route().get(all).execute().try_collect().await?;
        let by_bridge =
            |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Oif(link) if Some(*link) == bridge);
        for route in routes.into_iter().filter(|route| !route.attributes.iter().any(by_bridge)) {
            let attributes = told(&route.attributes, |text| !text.starts_with("CacheInfo"));
            seen.push(format!("route {:?} {attributes}", route.header));
        }
    }
    for version in [IpVersion::V4, IpVersion::V6] {
        let rules: Vec<_> = handle.rule().get(version).execute().try_collect().await?;
        seen.extend(rules.into_iter().map(|rule| format!("rule {rule:?}")));
    }
    let disciplines: Vec<_> = handle.qdisc().get().execute().try_collect().await?;
    for discipline in disciplines {
        let header = &discipline.header;
        let attributes = told(&discipline.attributes, |text| !text.contains("tats"));
        // The bridge's own; what is put on it is not.
        let own = u32::try_from(header.index).ok() == bridge && attributes.contains("noqueue");
        if !own {
            seen.push(format!("qdisc {} {:?} {attributes}", header.index, header.parent));
        }
    }
    Ok(seen)
}

fn told(attributes: &[impl Debug], keep: impl Fn(&str) -> bool) -> String {
    let texts = attributes.iter().map(|attribute| format!("{attribute:?}"));
    texts.filter(|text| keep(text)).collect::<Vec<_>>().join(" ")
}

/// A text without the values of some names, which it has as `name(value)`.
fn without(mut text: String, names: &[&str]) -> String {
    for name in names {
        let value = text.find(&format!("{name}(")).map(|at| at + name.len() + 1);
        if let Some(begin) = value
            && let Some(length) = text[begin..].find(')')
        {
            text.replace_range(begin..begin + length, "");
        }
    }
    text
}

/// A line of the mount table without its numbers.
fn mount(line: &str) -> Option<String> {
    let fields: Vec<_> = line.split(' ').collect();
    let (root, point, options) = (fields.get(3)?, fields.get(4)?, fields.get(5)?);
    let mut rest = fields.iter().skip(6);
    let propagation: Vec<_> =
        rest.by_ref().take_while(|field| **field != "-").filter_map(|tag| tag.split(':').next()).collect();
    let (kind, source) = (rest.next()?, rest.next()?);
    (*point != "/run/netns")
        .then(|| format!("mount {point} ({kind} {source}{root}, {options} {})", propagation.join(" ")))
}

/// Values of the node's sysctls.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sysctls(BTreeMap<String, String>);

impl Sysctls {
    /// Reads them.
    pub fn look() -> Self {
        let mut values = BTreeMap::new();
        read(Path::new("/proc/sys"), "", &mut values);
        Self(values)
    }

    /// Those that are there as before, but with another value.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let of = |(name, now): (&String, &String)| {
            let then = before.0.get(name).filter(|then| *then != now)?;
            Some(format!("sysctl {name} was {then:?} and is {now:?}"))
        };
        self.0.iter().filter_map(of).collect()
    }
}

fn read(directory: &Path, place: &str, values: &mut BTreeMap<String, String>) {
    // A directory for each link, whose values it brings along.
    let of_links =
        matches!(place, "net/ipv4/conf/" | "net/ipv4/neigh/" | "net/ipv6/conf/" | "net/ipv6/neigh/" | "net/mpls/conf/");
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{place}{name}");
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if CHANGING.iter().any(|one| path == *one || format!("{path}/") == *one) {
            continue;
        }
        if !is_directory {
            // Some can only be written.
            if let Ok(value) = fs::read_to_string(entry.path()) {
                values.insert(path, value.trim().to_owned());
            }
        } else if !of_links || matches!(name.as_str(), "all" | "default" | "lo") {
            read(&entry.path(), &format!("{path}/"), values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_goes_and_changes_is_told() {
        let state = |lines: &[&str]| {
            let mut state = NodeState::default();
            lines.iter().for_each(|line| state.add((*line).to_owned()));
            state
        };
        let (before, after) = (state(&["a", "b", "b"]), state(&["a", "a", "b"]));
        assert_eq!(after.changes_since(&before), ["has come: a", "has gone: b"]);
        assert!(before.changes_since(&before).is_empty());
        let values = |value: &str| Sysctls(BTreeMap::from([("x".to_owned(), value.to_owned())]));
        assert_eq!(values("1").changes_since(&values("0")), ["sysctl x was \"0\" and is \"1\""]);
        assert!(Sysctls(BTreeMap::new()).changes_since(&values("0")).is_empty(), "a module was unloaded");
    }

    #[test]
    fn timers_of_a_bridge_are_left_out() {
        let text = "Kind(Bridge), Data(Bridge([HelloTimer(0), GcTimer(21633), ForwardDelay(1500)]))".to_owned();
        let left = "Kind(Bridge), Data(Bridge([HelloTimer(), GcTimer(), ForwardDelay(1500)]))";
        assert_eq!(without(text, &OF_BRIDGES), left);
    }

    #[test]
    fn every_namespace_has_loopback() {
        let seen = network().unwrap();
        assert!(seen.iter().any(|line| line.starts_with("link 1 ") && line.contains("lo")), "{seen:?}");
        assert!(seen.iter().any(|line| line.starts_with("rule ")), "{seen:?}");
    }

    #[test]
    fn numbers_of_mounts_are_left_out() {
        let line = "36 35 98:0 /a /mnt rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount(line).unwrap(), "mount /mnt (ext3 /dev/root/a, rw,noatime shared master)");
        assert_eq!(mount("36 35 0:1 / /run/netns rw shared:7 - tmpfs tmpfs rw"), None);
    }
}
