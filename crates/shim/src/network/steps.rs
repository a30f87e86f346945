//! What the agent has to do for the guest's network to be as the namespace's, and to follow it.

use std::collections::HashSet;

use bulkhead_protocol::agent::network_step::Step;
use bulkhead_protocol::agent::{Netlink, NetworkStep, Sysctls};
use bulkhead_protocol::rtnl::Message;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};

use super::NetworkError;
use super::entries::{self, Entry};
use super::inspect::State;
use super::links::{self, Link, Role};

/// Most bytes of steps in one request: ttrpc takes 4 MiB (ttrpc: PROTOCOL.md), of which rules of the packet filter may be 2.
const MAX_BYTES: u64 = 3 << 19;

/// Fails if steps are more than a request holds.
pub fn fit(steps: &[NetworkStep]) -> Result<(), NetworkError> {
    let bytes: u64 = steps.iter().map(protobuf::Message::compute_size).sum();
    if bytes > MAX_BYTES { Err(NetworkError::TooMuch(steps.len())) } else { Ok(()) }
}

/// Makes the network of a guest that has nothing but loopback and its devices.
pub fn first(state: &State, sysctls: Sysctls) -> Vec<NetworkStep> {
    let mut steps = links_come(state, &carried(state), sysctls);
    steps.extend(state.entries.iter().map(|entry| add(state, entry)));
    // Last, so that there is a rule for every packet at any time.
    let gone = entries::first_rules().into_iter().filter(|first| !has_rule(state, first));
    steps.extend(gone.map(|rule| remove(state, &rule)));
    steps.extend(carried(state).iter().filter_map(|link| address_mode(link)));
    steps
}

/// Makes a network that was as `old` as `new`. Devices that have come are in the guest already; one that has gone takes
/// along what was its.
pub fn change(old: &State, new: &State, sysctls: Sysctls) -> Vec<NetworkStep> {
    let mut steps = Vec::new();
    let gone = old.links.iter().filter(|link| link.role == Role::Made && new.link(link.index).is_none());
    steps.extend(gone.map(|link| step(format!("remove {}", link.describe()), true, links::remove(link.index), 0)));
    let had = |index| old.link(index).filter(|link| link.is_carried());
    let come: Vec<&Link> = carried(new).into_iter().filter(|link| had(link.index).is_none()).collect();
    steps.extend(links_come(new, &come, sysctls));
    for link in carried(new) {
        if let Some(before) = had(link.index) {
            steps.extend(link_changes(before, link));
        }
    }
    let had: HashSet<_> = old.entries.iter().map(|entry| &entry.steady).collect();
    let has: HashSet<_> = new.entries.iter().map(|entry| &entry.identity).collect();
    // With a link, the kernel removes what is its own.
    let stays = |entry: &&Entry| entry.identity.links().iter().all(|index| new.link(*index).is_some());
    let gone = old.entries.iter().filter(|entry| !has.contains(&entry.identity) && !entry.ages);
    let removed: Vec<_> = gone.filter(stays).collect();
    // A route of IPv6 with other metrics is the same one for the kernel: it is not added, and removed with the old one.
    let (first, last): (Vec<_>, Vec<_>) = removed.iter().rev().partition(|entry| entry.is_v6_route());
    steps.extend(first.into_iter().map(|entry| remove(old, entry)));
    steps.extend(new.entries.iter().filter(|entry| !had.contains(&entry.steady)).map(|entry| add(new, entry)));
    steps.extend(last.into_iter().map(|entry| remove(old, entry)));
    // The kernel removes more along with an address, or with a link that goes down, than the namespace's has removed.
    if removed.iter().any(|entry| entry.is_address()) || went_down(old, new) {
        steps.extend(new.entries.iter().map(|entry| add(new, entry)));
    }
    steps.extend(come.iter().filter_map(|link| address_mode(link)));
    // If the guest refuses a change, it is logged and the pod goes on.
    steps.iter_mut().for_each(|step| step.optional = true);
    steps
}

fn carried(state: &State) -> Vec<&Link> {
    state.links.iter().filter(|link| link.is_carried()).collect()
}

fn went_down(old: &State, new: &State) -> bool {
    let flags = |state: &State, index| state.link(index).map(Link::flag);
    old.links.iter().any(|link| new.link(link.index).is_some() && flags(old, link.index) != flags(new, link.index))
}

/// Brings links up that the guest has not.
fn links_come(state: &State, come: &[&Link], sysctls: Sysctls) -> Vec<NetworkStep> {
    let made = come.iter().filter(|link| link.role == Role::Made);
    let mut steps: Vec<_> = made.map(|link| make(state, link)).collect();
    for link in come {
        steps.push(step(format!("set up {}", link.describe()), false, link.set(), 0));
    }
    // Some depend on the name, and some are of use only before the link is up.
    if !sysctls.sysctls.is_empty() {
        steps.push(NetworkStep { step: Some(Step::Sysctls(sysctls)), ..NetworkStep::default() });
    }
    for link in come {
        if let Some(none) = link.address_mode(true) {
            steps.push(step(format!("keep {} from making addresses", link.describe()), true, none, 0));
        }
        steps.push(step(format!("tune {}", link.describe()), true, link.tune(), 0));
        if let Some(names) = link.other_names() {
            steps.push(step(
                format!("give {} its other names", link.describe()),
                true,
                names,
                NLM_F_CREATE | NLM_F_EXCL,
            ));
        }
        if link.has_master() {
            steps.extend(join(link));
        }
    }
    steps.extend(come.iter().map(|link| step(format!("bring up {}", link.describe()), false, link.flag(), 0)));
    steps
}

fn join(link: &Link) -> Vec<NetworkStep> {
    let mut steps = vec![step(format!("put {} where it belongs", link.describe()), false, link.join(), 0)];
    steps.extend(link.port().map(|port| step(format!("set up {} as a port", link.describe()), true, port, 0)));
    steps
}

fn link_changes(old: &Link, new: &Link) -> Vec<NetworkStep> {
    let mut steps = Vec::new();
    if old.set() != new.set() {
        steps.push(step(format!("change {}", new.describe()), true, new.set(), 0));
    }
    if let Some(mac) = new.changed_mac(old) {
        steps.push(step(format!("change the address of {}", new.describe()), true, mac, 0));
    }
    if old.tune() != new.tune() {
        steps.push(step(format!("tune {}", new.describe()), true, new.tune(), 0));
    }
    if old.join() != new.join() {
        steps.extend(join(new));
    }
    if old.flag() != new.flag() {
        steps.push(step(format!("change flags of {}", new.describe()), true, new.flag(), 0));
    }
    steps
}

fn address_mode(link: &Link) -> Option<NetworkStep> {
    let what = format!("let {} make its addresses", link.describe());
    link.address_mode(false).map(|message| step(what, true, message, 0))
}

fn has_rule(state: &State, first: &Entry) -> bool {
    state.entries.iter().any(|entry| entries::is_first_rule(entry, first))
}

fn add(state: &State, entry: &Entry) -> NetworkStep {
    step(format!("add {}", describe(state, entry)), false, entry.message.clone(), entry.flags)
}

fn remove(state: &State, entry: &Entry) -> NetworkStep {
    step(format!("remove {}", describe(state, entry)), true, entry.identity.clone(), 0)
}

fn describe(state: &State, entry: &Entry) -> String {
    let on = entry.message.links().first().and_then(|index| state.link(*index));
    let on = on.map(|link| format!(" on {}", link.name)).unwrap_or_default();
    format!("{}{on}", entry.describe())
}

/// Makes a link, which later steps name by its index in the namespace.
fn make(state: &State, link: &Link) -> NetworkStep {
    let message = link.make(&state.links);
    let mut step = step(format!("make {}", link.describe()), false, message, NLM_F_CREATE | NLM_F_EXCL);
    if let Some(Step::Netlink(netlink)) = &mut step.step {
        netlink.makes = link.index;
    }
    step
}

fn step(what: String, optional: bool, message: Message, flags: u16) -> NetworkStep {
    let (type_, flags) = (message.kind.into(), flags.into());
    let netlink = Netlink { type_, flags, payload: message.payload, ..Netlink::default() };
    NetworkStep { what, optional, step: Some(Step::Netlink(netlink)), ..NetworkStep::default() }
}
