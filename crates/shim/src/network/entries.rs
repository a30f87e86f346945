//! Addresses, neighbours, routes and rules of the pod's namespace, as messages that make them in the guest.
//!
//! The kernel's messages about what there is are the ones that make it, but for what it only tells. What is not known here
//! is not sent: the guest's kernel might ignore it.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_protocol::rtnl::{self, Message, NEW_ADDRESS, NEW_NEIGHBOUR, NEW_ROUTE, NEW_RULE, header_len};
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};

use super::unsupported::Unsupported;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Of linux/if_addr.h.
mod ifa {
    pub const ADDRESS: u16 = 1;
    pub const LOCAL: u16 = 2;
    pub const CACHEINFO: u16 = 6;
    pub const FLAGS: u16 = 8;
    pub const PROTO: u16 = 11;
    /// `IFAPROT_KERNEL_RA`.
    pub const PROTO_RA: u8 = 2;
    pub const F_TEMPORARY: u32 = 0x01;
    pub const F_NODAD: u32 = 0x02;
    pub const F_NOPREFIXROUTE: u32 = 0x200;
    /// What somebody sets: home address, temporary ones made from it, no route, joined groups, stable privacy.
    pub const F_SET: u32 = 0x10 | 0x100 | F_NOPREFIXROUTE | 0x400 | 0x800;
}

/// Of linux/rtnetlink.h.
mod rta {
    pub const DST: u16 = 1;
    pub const OIF: u16 = 4;
    pub const GATEWAY: u16 = 5;
    pub const MULTIPATH: u16 = 9;
    pub const CACHEINFO: u16 = 12;
    pub const TABLE: u16 = 15;
    pub const VIA: u16 = 18;
    pub const ENCAP_TYPE: u16 = 21;
    pub const EXPIRES: u16 = 23;
    pub const NH_ID: u16 = 30;
    /// What a route's maker sets: DST to MULTIPATH, FLOW, TABLE, MARK, VIA, NEWDST, PREF, ENCAP_TYPE, ENCAP, UID to DPORT.
    pub const SET: [u16; 23] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 16, 18, 19, 20, 21, 22, 23, 25, 26, 27, 28, 29];
    /// What the kernel tells beside that: protocol info, cache info, counters, padding.
    pub const TOLD: [u16; 5] = [10, 12, 14, 17, 24];
}

/// Of linux/fib_rules.h: all that there is up to the masks of DSCP and flow label, but for padding and what is not used.
const FRA_SET: [u16; 26] =
    [1, 2, 3, 4, 6, 10, 11, 12, 13, 14, 15, 16, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31];
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FRA_PROTOCOL: u16 = 21;
/// `FR_ACT_TO_TBL` and `FIB_RULE_INVERT`.
const TO_TABLE: u8 = 1;
const INVERT: u32 = 2;

const RT_TABLE_LOCAL: u32 = 255;
const RT_TABLE_MAIN: u32 = 254;
const RT_TABLE_DEFAULT: u32 = 253;
const RTPROT_REDIRECT: u8 = 1;
const RTPROT_KERNEL: u8 = 2;
const RTPROT_RA: u8 = 9;
const RTN_UNICAST: u8 = 1;
const RTM_F_CLONED: u32 = 0x200;
const RTNH_F_ONLINK: u8 = 4;
/// `RTNH_F_PERVASIVE` and `RTNH_F_ONLINK`: the others tell of the link's state.
const NEXT_HOP_SET: u8 = 2 | RTNH_F_ONLINK;
/// `LWTUNNEL_ENCAP_*` that name a link or a program of the host: seg6local, BPF, RPL.
const HOST_ENCAPS: [u16; 3] = [6, 7, 8];

/// Of linux/neighbour.h.
mod nda {
    pub const DST: u16 = 1;
    pub const LLADDR: u16 = 2;
    /// DST, LLADDR, VLAN, PORT, VNI, IFINDEX, PROTOCOL, FLAGS_EXT.
    pub const SET: [u16; 8] = [1, 2, 5, 6, 7, 8, 12, 15];
    pub const NUD_NOARP: u16 = 0x40;
    pub const NUD_PERMANENT: u16 = 0x80;
    pub const NTF_PROXY: u8 = 0x08;
    pub const NTF_EXT_LEARNED: u8 = 0x10;
}

/// Ticks in which the kernel tells times, a second (`USER_HZ`).
const TICKS: u32 = 100;

/// One of them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// The message that makes it.
    pub message: Message,
    /// The message that removes it, which is also what it is known by.
    pub identity: Message,
    /// What is the same as long as nobody changes it: times pass by themselves.
    pub steady: Message,
    /// `NLM_F_*` with which it is made.
    pub flags: u16,
    /// A router has told it. The guest hears routers and keeps it, while here it ends when its time has passed.
    pub ages: bool,
}

impl Entry {
    fn new(message: Message, flags: u16) -> Self {
        let identity = Message { kind: message.kind + 1, ..message.clone() };
        Self { steady: message.clone(), message, identity, flags: flags | NLM_F_CREATE, ages: false }
    }

    /// Whether it is a route of IPv6.
    pub fn is_v6_route(&self) -> bool {
        self.message.kind == NEW_ROUTE && self.message.payload.first() == Some(&AF_INET6)
    }

    /// Whether it is an address, with which routes go.
    pub fn is_address(&self) -> bool {
        self.message.kind == NEW_ADDRESS
    }

    /// For an operator: "route to 10.0.0.0/8".
    pub fn describe(&self) -> String {
        describe(&self.message)
    }
}

/// An address. Nothing for those that the guest's kernel makes itself: loopback's, and temporary ones.
pub fn address(told: &Message, loopback: bool) -> Option<Entry> {
    let (family, length) = (*told.payload.first()?, *told.payload.get(1)?);
    let own = ip(told.attribute(ifa::LOCAL).or_else(|| told.attribute(ifa::ADDRESS))?)?;
    let short = told.payload.get(2).copied().map_or(0, u32::from);
    let mut flags = told.attribute(ifa::FLAGS).and_then(|value| rtnl::u32_at(value, 0)).unwrap_or(short);
    if loopback && (own == Ipv6Addr::LOCALHOST || (own == Ipv4Addr::LOCALHOST && length == 8)) {
        return None;
    }
    if family == AF_INET6 && flags & ifa::F_TEMPORARY != 0 {
        return None;
    }
    flags &= ifa::F_SET;
    if family == AF_INET6 {
        // The host's CNI has made sure that the address is the pod's; detection would delay its use by a second.
        flags |= ifa::F_NODAD;
    }
    let mut message = head(told)?;
    // Its short form is not looked at where the long one is.
    *message.payload.get_mut(2)? = 0;
    let mut identity = Message { kind: NEW_ADDRESS + 1, ..message.clone() };
    let mut steady = message.clone();
    for (kind, value) in told.attributes() {
        match kind {
            ifa::FLAGS => continue,
            ifa::CACHEINFO => {
                message.push(kind, value);
                steady.push(kind, &lasting(value));
                continue;
            }
            ifa::ADDRESS | ifa::LOCAL => {
                identity.push(kind, value);
            }
            _ => {}
        }
        message.push(kind, value);
        steady.push(kind, value);
    }
    message.push(ifa::FLAGS, &flags.to_ne_bytes());
    steady.push(ifa::FLAGS, &flags.to_ne_bytes());
    let ages = told.attribute(ifa::PROTO) == Some(&[ifa::PROTO_RA]);
    if ages {
        steady = identity.clone();
    }
    Some(Entry { message, identity, steady, flags: NLM_F_CREATE | NLM_F_REPLACE, ages })
}

/// `struct ifa_cacheinfo` without the times that pass: those of an address that stays are as good as none.
fn lasting(info: &[u8]) -> Vec<u8> {
    let number = |at| rtnl::u32_at(info, at).unwrap_or(0);
    let still = |value: u32| if matches!(value, 0 | u32::MAX) { value } else { 1 };
    let changed = if number(4) == u32::MAX { 0 } else { number(12) };
    [still(number(0)), still(number(4)), changed].map(u32::to_ne_bytes).concat()
}

/// An address whose prefix has no route by the kernel gets none in the guest either: some CNI plugins (ptp) take it away, and
/// neighbours are not on the link then.
pub fn without_prefix_route(entry: &mut Entry, routes: &[Entry]) {
    let has = routes.iter().any(|route| is_prefix_route(&route.message, &entry.message).unwrap_or(false));
    // One that is a prefix of its own needs none in IPv4.
    let alone = entry.message.payload.get(..2) == Some(&[AF_INET, 32])
        && entry.message.attribute(ifa::ADDRESS) == entry.message.attribute(ifa::LOCAL);
    if has || alone {
        return;
    }
    for message in [&mut entry.message, &mut entry.steady] {
        // The flags are the last attribute.
        if let Some(flags) = message.payload.last_chunk_mut::<4>() {
            *flags = (u32::from_ne_bytes(*flags) | ifa::F_NOPREFIXROUTE).to_ne_bytes();
        }
    }
}

fn is_prefix_route(route: &Message, address: &Message) -> Option<bool> {
    let (family, length) = (*address.payload.first()?, *address.payload.get(1)?);
    // Of a peer in IPv4, the route is to the peer.
    let base = if family == AF_INET { ifa::ADDRESS } else { ifa::LOCAL };
    let base = address.attribute(base).or_else(|| address.attribute(ifa::ADDRESS))?;
    let dst = route.attribute(rta::DST)?;
    let same_link = route.attribute(rta::OIF)? == address.payload.get(4..8)?;
    let kernel = route.payload.get(5) == Some(&RTPROT_KERNEL) && route.attribute(rta::GATEWAY).is_none();
    let prefix = (route.payload.first(), route.payload.get(1)) == (Some(&family), Some(&length));
    Some(same_link && kernel && prefix && masked(dst, length) == masked(base, length))
}

fn masked(address: &[u8], length: u8) -> Vec<u8> {
    let keep = |at: usize| u8::try_from(usize::from(length).saturating_sub(at * 8).min(8)).unwrap_or(0);
    let mask = |bits: u8| u8::MAX.checked_shl(8 - u32::from(bits)).unwrap_or(0);
    address.iter().enumerate().map(|(at, byte)| byte & mask(keep(at))).collect()
}

/// A neighbour that somebody has written: permanent ones, those that a program keeps, proxies. `arp` says whether the link
/// asks for neighbours; without, the kernel writes them.
pub fn neighbour(told: &Message, arp: bool) -> Option<Entry> {
    let state = told.payload.get(8..10)?.try_into().ok().map(u16::from_ne_bytes)?;
    let flags = *told.payload.get(10)?;
    let mac = told.attribute(nda::LLADDR).and_then(<[u8]>::first);
    // Those of groups and of the broadcast address are the kernel's.
    let written = arp && state & nda::NUD_NOARP != 0 && mac.is_some_and(|first| first & 1 == 0);
    if !written && state & nda::NUD_PERMANENT == 0 && flags & (nda::NTF_PROXY | nda::NTF_EXT_LEARNED) == 0 {
        return None;
    }
    let mut message = head(told)?;
    let mut identity = Message { kind: NEW_NEIGHBOUR + 1, ..message.clone() };
    for (kind, value) in told.attributes().filter(|(kind, _)| nda::SET.contains(kind)) {
        message.push(kind, value);
        if kind == nda::DST {
            identity.push(kind, value);
        }
    }
    Some(Entry { identity, ..Entry::new(message, NLM_F_REPLACE) })
}

/// A route. Nothing for those that the guest's kernel makes itself: local ones, and what routers tell it.
pub fn route(told: &Message, unsupported: &mut Vec<Unsupported>) -> Option<Entry> {
    let [family, _, _, _, _, protocol, _, kind] = *told.payload.first_chunk()?;
    let flags = rtnl::u32_at(&told.payload, 8)?;
    let number = |kind| told.attribute(kind).and_then(|value| rtnl::u32_at(value, 0));
    let table = number(rta::TABLE).or_else(|| told.payload.get(4).copied().map(u32::from))?;
    let own = protocol == RTPROT_KERNEL && (kind != RTN_UNICAST || table == RT_TABLE_LOCAL);
    if own || matches!(protocol, RTPROT_REDIRECT | RTPROT_RA) || flags & RTM_F_CLONED != 0 || table == 0 {
        return None;
    }
    let mut message = head(told)?;
    if family == AF_INET6 {
        // The kernel ignores an IPv6 route's scope.
        *message.payload.get_mut(6)? = 0;
    }
    message.payload.get_mut(8..12)?.copy_from_slice(&(flags & u32::from(NEXT_HOP_SET)).to_ne_bytes());
    let hops = [rta::OIF, rta::GATEWAY, rta::VIA, rta::MULTIPATH];
    let mut missing = None;
    for (kind, value) in told.attributes() {
        match kind {
            rta::MULTIPATH => {
                message.push(kind, &next_hops(value));
            }
            // The kernel tells of what a next hop object consists, too.
            rta::NH_ID if protocol == RTPROT_KERNEL || hops.iter().any(|hop| told.attribute(*hop).is_some()) => {}
            rta::NH_ID if told.payload.get(7) != Some(&RTN_UNICAST) => {}
            _ if rta::SET.contains(&kind) => {
                message.push(kind, value);
            }
            _ if rta::TOLD.contains(&kind) => {}
            _ => missing = Some(format!("attribute {kind}")),
        }
    }
    let encap =
        told.attribute(rta::ENCAP_TYPE).and_then(|value| value.first_chunk()).map(|value| u16::from_ne_bytes(*value));
    if let Some(encap) = encap.filter(|encap| HOST_ENCAPS.contains(encap)) {
        missing = Some(format!("encapsulation {encap}"));
    }
    if let Some(missing) = missing {
        unsupported.push(Unsupported { what: format!("{} ({missing})", describe(&message)), security: true });
        return None;
    }
    let mut entry = Entry::new(message, NLM_F_APPEND);
    let expires = told.attribute(rta::CACHEINFO).and_then(|info| rtnl::u32_at(info, 8)).filter(|ticks| *ticks != 0);
    if let Some(ticks) = expires {
        entry.message.push(rta::EXPIRES, &(ticks / TICKS).max(1).to_ne_bytes());
        entry.ages = family == AF_INET6 && protocol == RTPROT_KERNEL;
    }
    Some(entry)
}

/// Next hops with the flags that somebody has set.
fn next_hops(value: &[u8]) -> Vec<u8> {
    let mut hops = value.to_vec();
    for hop in rtnl::next_hops(value, 0..value.len()) {
        if let Some(flags) = hops.get_mut(hop.start + 2) {
            *flags &= NEXT_HOP_SET;
        }
    }
    hops
}

/// Whether a route needs no other: its next hop is on a link.
pub fn is_on_link(entry: &Entry) -> bool {
    [rta::GATEWAY, rta::VIA, rta::MULTIPATH].iter().all(|kind| entry.message.attribute(*kind).is_none())
}

/// A rule.
pub fn rule(told: &Message, unsupported: &mut Vec<Unsupported>) -> Option<Entry> {
    let mut message = head(told)?;
    let flags = rtnl::u32_at(&message.payload, 8)?;
    message.payload.get_mut(8..12)?.copy_from_slice(&(flags & INVERT).to_ne_bytes());
    // A priority of zero is not told, and one that is not given is chosen by the kernel.
    if told.attribute(FRA_PRIORITY).is_none() {
        message.push(FRA_PRIORITY, &[0; 4]);
    }
    let mut missing = None;
    for (kind, value) in told.attributes() {
        match kind {
            // Padding.
            18 => {}
            _ if FRA_SET.contains(&kind) => {
                message.push(kind, value);
            }
            _ => missing = Some(kind),
        }
    }
    if let Some(kind) = missing {
        unsupported.push(Unsupported { what: format!("{} (attribute {kind})", describe(&message)), security: true });
        return None;
    }
    Some(Entry::new(message, NLM_F_EXCL))
}

/// The rules that a namespace has when it is made (Linux: net/ipv4/fib_rules.c, net/ipv6/fib6_rules.c).
pub fn first_rules() -> Vec<Entry> {
    let all = [
        (AF_INET, 0, RT_TABLE_LOCAL),
        (AF_INET, 32766, RT_TABLE_MAIN),
        (AF_INET, 32767, RT_TABLE_DEFAULT),
        (AF_INET6, 0, RT_TABLE_LOCAL),
        (AF_INET6, 32766, RT_TABLE_MAIN),
    ];
    let rule = |(family, priority, table): (u8, u32, u32)| {
        let short = u8::try_from(table).unwrap_or(0);
        let mut message = Message::new(NEW_RULE, &[family, 0, 0, 0, short, 0, 0, TO_TABLE, 0, 0, 0, 0]);
        message.push(FRA_PRIORITY, &priority.to_ne_bytes()).push(FRA_TABLE, &table.to_ne_bytes());
        Entry::new(message, NLM_F_EXCL)
    };
    all.into_iter().map(rule).collect()
}

/// Whether it is one of those.
pub fn is_a_first_rule(entry: &Entry) -> bool {
    first_rules().iter().any(|first| is_first_rule(entry, first))
}

/// Whether two rules are the same for the kernel's first ones: nothing but a priority and a table.
pub fn is_first_rule(entry: &Entry, first: &Entry) -> bool {
    let (ours, its) = (&entry.message, &first.message);
    let number =
        |message: &Message, kind| message.attribute(kind).and_then(|value| rtnl::u32_at(value, 0)).unwrap_or(0);
    let same = |kind| number(ours, kind) == number(its, kind);
    // Those that limit a rule; FRA_SUPPRESS_PREFIXLEN is told in any case.
    let plain = ours.attributes().all(|(kind, value)| match kind {
        FRA_PRIORITY | FRA_TABLE | FRA_PROTOCOL => true,
        14 => value == [0xff; 4],
        4 => value == [0; 4],
        _ => false,
    });
    let header = |message: &Message| message.payload.get(..12).map(<[u8]>::to_vec);
    plain && header(ours) == header(its) && same(FRA_PRIORITY) && same(FRA_TABLE)
}

/// The fixed header, as a message of its own.
fn head(told: &Message) -> Option<Message> {
    Some(Message::new(told.kind, told.payload.get(..header_len(told.kind))?))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

fn describe(message: &Message) -> String {
    let show = |kind| message.attribute(kind).and_then(ip).map(|ip| ip.to_string());
    let number = |kind| message.attribute(kind).and_then(|value| rtnl::u32_at(value, 0)).unwrap_or(0);
    let length = message.payload.get(1).copied().unwrap_or(0);
    match message.kind & !3 {
        NEW_ADDRESS => {
            format!("address {}/{length}", show(ifa::LOCAL).or_else(|| show(ifa::ADDRESS)).unwrap_or_default())
        }
        NEW_ROUTE => {
            let family = if message.payload.first() == Some(&AF_INET6) { "IPv6 " } else { "" };
            let to = show(rta::DST).map_or_else(|| "by default".to_owned(), |to| format!("to {to}/{length}"));
            let mut text = format!("{family}route {to}");
            if let Some(gateway) = show(rta::GATEWAY) {
                let _ = write!(text, " via {gateway}");
            }
            text
        }
        NEW_NEIGHBOUR => format!("neighbour {}", show(nda::DST).unwrap_or_default()),
        _ => format!("routing rule {}", number(FRA_PRIORITY)),
    }
}

/// The message that asks for all neighbours, or all proxies.
pub fn dump_neighbours(proxies: bool) -> Message {
    let mut header = [0; 12];
    header[10] = if proxies { nda::NTF_PROXY } else { 0 };
    Message::new(NEW_NEIGHBOUR + 2, &header)
}

/// The messages that ask for all objects of a kind, of each family.
pub fn dumps(kind: u16) -> [Message; 2] {
    [AF_INET, AF_INET6].map(|family| {
        let mut header = vec![0; header_len(kind)];
        if let Some(first) = header.first_mut() {
            *first = family;
        }
        Message::new(kind + 2, &header)
    })
}
