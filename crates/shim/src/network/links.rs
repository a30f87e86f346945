//! The links of the pod's namespace, and what the guest gets for each: a device of its own, or a link made again.

use bulkhead_protocol::rtnl::{self, Message, NEW_LINK, NEW_LINK_NAMES, attributes};

/// Of linux/if_link.h.
mod ifla {
    pub const ADDRESS: u16 = 1;
    pub const IFNAME: u16 = 3;
    pub const MTU: u16 = 4;
    pub const LINK: u16 = 5;
    pub const MASTER: u16 = 10;
    pub const TXQLEN: u16 = 13;
    pub const LINKINFO: u16 = 18;
    pub const IFALIAS: u16 = 20;
    pub const AF_SPEC: u16 = 26;
    pub const GROUP: u16 = 27;
    pub const LINK_NETNSID: u16 = 37;
    pub const GSO_MAX_SEGS: u16 = 40;
    pub const GSO_MAX_SIZE: u16 = 41;
    pub const PROP_LIST: u16 = 52;
    pub const GRO_MAX_SIZE: u16 = 58;
    pub const GSO_IPV4_MAX_SIZE: u16 = 63;
    pub const GRO_IPV4_MAX_SIZE: u16 = 64;
    /// In `LINKINFO`.
    pub const INFO_KIND: u16 = 1;
    pub const INFO_DATA: u16 = 2;
    pub const INFO_SLAVE_KIND: u16 = 4;
    pub const INFO_SLAVE_DATA: u16 = 5;
    /// In `AF_SPEC`'s part for IPv6.
    pub const INET6_ADDR_GEN_MODE: u16 = 8;
    /// In `INFO_DATA` of a veth.
    pub const VETH_PEER: u16 = 1;
}

/// Of linux/if.h.
pub const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
pub const IFF_NOARP: u32 = 0x80;
const IFF_PROMISC: u32 = 0x100;
const IFF_ALLMULTI: u32 = 0x200;
const IFF_MULTICAST: u32 = 0x1000;

/// The flags that somebody sets on a link. The others are its driver's.
const SET_FLAGS: u32 = IFF_UP | IFF_NOARP | IFF_PROMISC | IFF_ALLMULTI | IFF_MULTICAST;

/// Of linux/netlink.h.
const NLA_F_NESTED: u16 = 0x8000;

/// `ARPHRD_ETHER` of linux/if_arp.h.
const ARPHRD_ETHER: u16 = 1;

const AF_INET6: u16 = 10;

/// `IN6_ADDR_GEN_MODE_NONE` of linux/if_link.h.
const GEN_MODE_NONE: u8 = 1;

/// What limits of offloads are unless somebody changes them: `GSO_LEGACY_MAX_SIZE`, `GSO_MAX_SEGS`, `GRO_LEGACY_MAX_SIZE` of
/// linux/netdevice.h.
const MAX_SIZE: u32 = 65536;
const MAX_SEGS: u32 = 65535;

/// `DEFAULT_TX_QUEUE_LEN` of net/pkt_sched.h.
const QUEUE_LENGTH: u32 = 1000;

/// Kinds of links that need nothing but what their message says, so that the guest's kernel can make them again.
const MADE_AGAIN: [&str; 25] = [
    "bond",
    "bridge",
    "dummy",
    "erspan",
    "geneve",
    "gre",
    "gretap",
    "ifb",
    "ip6erspan",
    "ip6gre",
    "ip6gretap",
    "ip6tnl",
    "ipip",
    "ipvlan",
    "ipvtap",
    "macvlan",
    "macvtap",
    "sit",
    "veth",
    "vlan",
    "vrf",
    "vti",
    "vti6",
    "vxlan",
    "xfrm",
];

/// What the guest gets for a link.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// Its own loopback.
    Loopback,
    /// A network device: frames come from outside the namespace.
    Device,
    /// The same link, made by its kernel.
    Made,
    /// Nothing, and nobody misses it: a tap of ours, or a device that a tunnel's module makes in every namespace.
    None,
    /// Nothing, although somebody has made the link on purpose: the operator is warned.
    Unsupported,
}

/// A link of the namespace.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub role: Role,
    pub flags: u32,
    pub mtu: u32,
    kind: String,
    ethernet: bool,
    mac: Option<[u8; 6]>,
    master: u32,
    message: Message,
}

impl Link {
    /// Reads a kernel's message. A link without a name is none.
    pub fn read(message: Message) -> Option<Self> {
        let name = text(message.attribute(ifla::IFNAME)?);
        let number = |kind| message.attribute(kind).and_then(|value| rtnl::u32_at(value, 0));
        let layer = message.payload.get(2..4)?.try_into().ok().map(u16::from_ne_bytes)?;
        let mut link = Self {
            index: rtnl::u32_at(&message.payload, 4)?,
            name,
            role: Role::None,
            flags: rtnl::u32_at(&message.payload, 8)?,
            mtu: number(ifla::MTU).unwrap_or(1500),
            kind: message.link_kind().unwrap_or_default().to_owned(),
            ethernet: layer == ARPHRD_ETHER,
            mac: message.attribute(ifla::ADDRESS).and_then(|value| value.try_into().ok()),
            master: number(ifla::MASTER).unwrap_or(0),
            message,
        };
        link.role = link.find_role();
        Some(link)
    }

    fn find_role(&self) -> Role {
        let here = self.message.attribute(ifla::LINK_NETNSID).is_none();
        // What a link stands on, or the other end of a pair.
        let lower = self.lower() != 0;
        if self.flags & IFF_LOOPBACK != 0 {
            Role::Loopback
        } else if self.is_tap() {
            Role::None
        } else if self.is_fallback() {
            if self.flags & IFF_UP == 0 { Role::None } else { Role::Made }
        } else if here && MADE_AGAIN.contains(&self.kind.as_str()) {
            Role::Made
        } else if self.ethernet && self.mac.is_some() && (!here || !lower) {
            Role::Device
        } else {
            Role::Unsupported
        }
    }

    /// A tap that carries another interface's frames to the VMM.
    fn is_tap(&self) -> bool {
        self.name.strip_prefix("tap-").is_some_and(|index| index.parse::<u32>().is_ok()) && self.kind == "tun"
    }

    /// The device that a tunnel's module makes in every namespace, for packets that belong to no tunnel: the one of its kind
    /// without either end, key or link below (Linux: net/ipv4/ip_tunnel.c, `ip_tunnel_init_net`). A second one like it
    /// cannot be made.
    fn is_fallback(&self) -> bool {
        // Attributes that say which tunnel it is, and the one that says that routes do.
        let (ends, external): (&[u16], _) = match self.kind.as_str() {
            "ipip" | "sit" | "ip6tnl" => (&[1, 2, 3], 19),
            "gre" | "gretap" | "erspan" | "ip6gre" => (&[1, 4, 5, 6, 7], 18),
            "vti" | "vti6" => (&[1, 2, 3, 4, 5], u16::MAX),
            _ => return false,
        };
        let Some(data) = self.info(ifla::INFO_DATA) else { return false };
        attributes(data)
            .all(|(kind, value)| kind != external && (!ends.contains(&kind) || value.iter().all(|byte| *byte == 0)))
    }

    fn info(&self, wanted: u16) -> Option<&[u8]> {
        attributes(self.message.attribute(ifla::LINKINFO)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
    }

    fn lower(&self) -> u32 {
        self.number(ifla::LINK).unwrap_or(0)
    }

    fn number(&self, kind: u16) -> Option<u32> {
        self.message.attribute(kind).and_then(|value| rtnl::u32_at(value, 0))
    }

    /// The MAC of the guest's device.
    pub fn device_mac(&self) -> Option<[u8; 6]> {
        self.mac.filter(|_| self.role == Role::Device)
    }

    /// Whether the guest has it.
    pub fn is_carried(&self) -> bool {
        matches!(self.role, Role::Loopback | Role::Device | Role::Made)
    }

    /// For an operator: "wg0 (wireguard)".
    pub fn describe(&self) -> String {
        let kind = if self.kind.is_empty() { "of no kind that the guest knows" } else { &self.kind };
        format!("interface {} ({kind})", self.name)
    }

    /// The message that makes it in the guest.
    pub fn make(&self, all: &[Self]) -> Message {
        let mut message = header(0, 0, 0);
        message.push(ifla::IFNAME, &c_string(&self.name));
        // An ipvlan has that of the link below it, and a tunnel's is one of its ends.
        if let Some(mac) = self.mac.filter(|_| self.ethernet && !matches!(self.kind.as_str(), "ipvlan" | "ipvtap")) {
            message.push(ifla::ADDRESS, &mac);
        }
        let lower = self.lower();
        let mut info = Vec::new();
        rtnl::push(&mut info, ifla::INFO_KIND, self.kind.as_bytes());
        if self.kind == "veth" {
            let peer = all.iter().find(|link| link.index == lower);
            rtnl::push(&mut info, ifla::INFO_DATA, &peer.map(Self::as_peer).unwrap_or_default());
        } else if lower != 0 {
            message.push(ifla::LINK, &lower.to_ne_bytes());
        }
        if self.kind != "veth"
            && let Some(data) = self.info(ifla::INFO_DATA)
        {
            rtnl::push(&mut info, ifla::INFO_DATA, &settable(&self.kind, data));
        }
        message.push(ifla::LINKINFO, &info);
        message
    }

    fn as_peer(&self) -> Vec<u8> {
        let mut end = header(0, 0, 0);
        end.push(ifla::IFNAME, &c_string(&self.name));
        if let Some(mac) = self.mac {
            end.push(ifla::ADDRESS, &mac);
        }
        let mut data = Vec::new();
        rtnl::push(&mut data, ifla::VETH_PEER, &end.payload);
        data
    }

    /// The message that gives it its name and size. The kernel makes no link-local address for it: the guest gets those that
    /// the namespace has.
    pub fn set(&self) -> Message {
        let mut message = header(self.index, 0, 0);
        if self.role == Role::Device {
            message.push(ifla::IFNAME, &c_string(&self.name));
        }
        message.push(ifla::MTU, &self.mtu.to_ne_bytes());
        message
    }

    /// Whether its address has been changed, and the message that does so.
    pub fn changed_mac(&self, before: &Self) -> Option<Message> {
        let mac = self.mac.filter(|_| self.ethernet && self.mac != before.mac)?;
        let mut message = header(self.index, 0, 0);
        message.push(ifla::ADDRESS, &mac);
        Some(message)
    }

    /// How it makes its link-local address: not at all for now, or as in the namespace.
    pub fn address_mode(&self, none: bool) -> Option<Message> {
        let family = attributes(self.message.attribute(ifla::AF_SPEC)?).find(|(kind, _)| *kind == AF_INET6)?.1;
        let mode = attributes(family).find(|(kind, _)| *kind == ifla::INET6_ADDR_GEN_MODE)?.1;
        let mode = if none { &[GEN_MODE_NONE] } else { mode };
        let (mut inet6, mut spec) = (Vec::new(), Vec::new());
        rtnl::push(&mut inet6, ifla::INET6_ADDR_GEN_MODE, mode);
        rtnl::push(&mut spec, AF_INET6, &inet6);
        let mut message = header(self.index, 0, 0);
        message.push(ifla::AF_SPEC, &spec);
        Some(message).filter(|_| self.role != Role::Loopback)
    }

    /// The message with what a pod can do without.
    pub fn tune(&self) -> Message {
        let mut message = header(self.index, 0, 0);
        if let Some(length) = self.number(ifla::TXQLEN) {
            // The kernel gives a device without a queue the usual length when its frames are redirected.
            let length = if length == 0 && self.role == Role::Device { QUEUE_LENGTH } else { length };
            message.push(ifla::TXQLEN, &length.to_ne_bytes());
        }
        if let Some(alias) = self.message.attribute(ifla::IFALIAS) {
            message.push(ifla::IFALIAS, alias);
        }
        // A virtio device takes no larger packets than by default.
        let limits = [
            (ifla::GROUP, 0, u32::MAX),
            (ifla::GSO_MAX_SIZE, MAX_SIZE, MAX_SIZE),
            (ifla::GSO_MAX_SEGS, MAX_SEGS, MAX_SEGS),
            (ifla::GSO_IPV4_MAX_SIZE, MAX_SIZE, MAX_SIZE),
            (ifla::GRO_MAX_SIZE, MAX_SIZE, u32::MAX),
            (ifla::GRO_IPV4_MAX_SIZE, MAX_SIZE, u32::MAX),
        ];
        for (kind, default, most) in limits {
            if let Some(value) = self.number(kind).filter(|value| *value != default && *value <= most) {
                message.push(kind, &value.to_ne_bytes());
            }
        }
        message
    }

    /// The message with its other names.
    pub fn other_names(&self) -> Option<Message> {
        let mut message = header(self.index, 0, 0);
        message.kind = NEW_LINK_NAMES;
        // This kind of message is checked strictly.
        message.push(ifla::PROP_LIST | NLA_F_NESTED, self.message.attribute(ifla::PROP_LIST)?);
        Some(message)
    }

    /// The message that puts it into a bridge or bond, or takes it out.
    pub fn join(&self) -> Message {
        let mut message = header(self.index, 0, 0);
        message.push(ifla::MASTER, &self.master.to_ne_bytes());
        message
    }

    /// Whether it is in a bridge or bond.
    pub fn has_master(&self) -> bool {
        self.master != 0
    }

    /// The message with its settings as a bridge's port.
    pub fn port(&self) -> Option<Message> {
        let kind = self.info(ifla::INFO_SLAVE_KIND).filter(|kind| kind.starts_with(b"bridge"))?;
        let mut info = Vec::new();
        rtnl::push(&mut info, ifla::INFO_SLAVE_KIND, kind);
        let settings = settable("port", self.info(ifla::INFO_SLAVE_DATA)?);
        rtnl::push(&mut info, ifla::INFO_SLAVE_DATA, &settings);
        let mut message = header(self.index, 0, 0);
        message.push(ifla::LINKINFO, &info);
        Some(message)
    }

    /// The message that brings it up, or down, with the flags that somebody has set.
    pub fn flag(&self) -> Message {
        match self.role {
            // Nothing works without it.
            Role::Loopback => header(self.index, IFF_UP, IFF_UP),
            _ => header(self.index, self.flags & SET_FLAGS, SET_FLAGS),
        }
    }
}

/// The attributes of a link's kind that can be set. A kernel's message has what it only tells, too.
fn settable(kind: &str, data: &[u8]) -> Vec<u8> {
    let number = |wanted| attributes(data).find(|(kind, _)| *kind == wanted).map_or(0, |(_, value)| little(value));
    let is_set = |attribute: u16, value: &[u8]| match kind {
        // IFLA_BR_*: timers, priority, STP, VLANs if it tells them apart, forwarding of groups, snooping.
        "bridge" => match attribute {
            7 => little(value) != 0,
            8 => number(7) != 0,
            _ => matches!(attribute, 1..=9 | 23),
        },
        // IFLA_BRPORT_*: priority, cost, what it learns, floods and answers, isolation.
        "port" => matches!(attribute, 2..=10 | 12 | 27 | 28 | 30 | 32 | 33),
        // IFLA_MACVLAN_*: mode, flags, queue and cutoff of broadcasts.
        "macvlan" | "macvtap" => matches!(attribute, 1 | 2 | 7 | 9),
        // IFLA_BOND_*: a mode takes its own options alone, and none that is off.
        "bond" => match attribute {
            1 => true,
            3 | 17 | 18 => little(value) != 0,
            4 | 5 => number(3) != 0 && little(value) != 0,
            7 => little(value) != 0,
            8 | 9 => number(7) != 0,
            13 => number(1) == 1,
            14 => matches!(number(1), 2 | 4 | 5),
            21 | 22 => number(1) == 4,
            _ => false,
        },
        _ => true,
    };
    let mut kept = Vec::new();
    for (attribute, value) in attributes(data).filter(|(attribute, value)| is_set(*attribute, value)) {
        // Whether a value is nested is only said for the kernel's strict checks, which these kinds do not have.
        match (kind, attribute) {
            // IFLA_VLAN_FLAGS: the kernel tells them with a mask of all bits, and takes those that it knows.
            ("vlan", 2) => rtnl::push(&mut kept, attribute, &masked_flags(value)),
            // IFLA_VXLAN_TTL_INHERIT: the kernel tells a number, and takes an attribute without a value.
            ("vxlan", 28) if little(value) == 0 => {}
            ("vxlan", 28) => rtnl::push(&mut kept, attribute, &[]),
            _ => rtnl::push(&mut kept, attribute, value),
        }
    }
    kept
}

/// `struct ifla_vlan_flags` with the flags that can be changed (linux/if_vlan.h: `VLAN_FLAG_*`).
fn masked_flags(value: &[u8]) -> Vec<u8> {
    const FLAGS: u32 = 0x1f;
    [(little(value) & FLAGS).to_ne_bytes(), FLAGS.to_ne_bytes()].concat()
}

/// A number of one to four bytes in the host's byte order, which is little-endian on x86.
fn little(value: &[u8]) -> u32 {
    value.iter().take(4).rev().fold(0, |number, byte| (number << 8) | u32::from(*byte))
}

/// `struct ifinfomsg`.
fn header(index: u32, flags: u32, change: u32) -> Message {
    let numbers = [index, flags, change].map(u32::to_ne_bytes).concat();
    Message::new(NEW_LINK, &[&[0; 4][..], &numbers].concat())
}

/// The message that removes a link.
pub fn remove(index: u32) -> Message {
    Message { kind: NEW_LINK + 1, ..header(index, 0, 0) }
}

/// The message that asks for all links.
pub fn dump() -> Message {
    Message { kind: rtnl::GET_LINK, ..header(0, 0, 0) }
}

fn c_string(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, kind: &str, layer: u16, data: &[(u16, &[u8])], more: &[(u16, &[u8])]) -> Link {
        let (mut info, mut nested) = (Vec::new(), Vec::new());
        data.iter().for_each(|(kind, value)| rtnl::push(&mut nested, *kind, value));
        rtnl::push(&mut info, ifla::INFO_KIND, &c_string(kind));
        rtnl::push(&mut info, ifla::INFO_DATA, &nested);
        let mut message = header(5, 0, 0);
        message.payload[2..4].copy_from_slice(&layer.to_ne_bytes());
        message.push(ifla::IFNAME, &c_string(name)).push(ifla::ADDRESS, &[2, 0, 0, 0, 0, 1]);
        if !kind.is_empty() {
            message.push(ifla::LINKINFO, &info);
        }
        for (kind, value) in more {
            message.push(*kind, value);
        }
        Link::read(message).unwrap()
    }

    #[test]
    fn fallback_devices_of_tunnels_are_known_by_what_they_are() {
        let none: &[(u16, &[u8])] = &[(1, &[0; 4]), (2, &[0; 4]), (3, &[0; 4]), (6, &[0; 4]), (7, &[0; 4])];
        for (name, kind, layer) in [("renamed", "gretap", 1), ("erspan0", "erspan", 1), ("tunl0", "ipip", 768)] {
            assert_eq!(link(name, kind, layer, none, &[]).role, Role::None, "{name}");
        }
        let remote: &[(u16, &[u8])] = &[(6, &[0; 4]), (7, &[10, 0, 0, 1])];
        assert_eq!(link("gretap0", "gretap", 1, remote, &[]).role, Role::Made, "by a name alone it is none");
        assert_eq!(link("gre1", "gre", 778, &[(18, &[])], &[]).role, Role::Made, "where routes say the ends");
    }

    #[test]
    fn links_are_devices_if_their_frames_come_from_outside() {
        let role = |kind: &str, layer, more: &[(u16, &[u8])]| link("x", kind, layer, &[], more).role;
        let (lower, elsewhere) = ((ifla::LINK, &[7, 0, 0, 0][..]), (ifla::LINK_NETNSID, &[0; 4][..]));
        assert_eq!(role("veth", 1, &[lower, elsewhere]), Role::Device);
        assert_eq!(role("ipvlan", 1, &[lower, elsewhere]), Role::Device);
        assert_eq!(role("", 1, &[]), Role::Device, "a card");
        assert_eq!(role("vlan", 1, &[lower]), Role::Made);
        assert_eq!(role("veth", 1, &[lower]), Role::Made, "both ends are here");
        assert_eq!(role("wireguard", 65534, &[]), Role::Unsupported);
        assert_eq!(role("macsec", 1, &[lower]), Role::Unsupported);
        assert_eq!(link("tap-7", "tun", 1, &[], &[]).role, Role::None);
    }

    #[test]
    fn redirect_of_a_device_without_a_queue_is_no_change() {
        let with = |length: u32| link("eth0", "", 1, &[], &[(ifla::TXQLEN, &length.to_ne_bytes())]).tune();
        assert_eq!(with(0), with(QUEUE_LENGTH));
        assert_ne!(with(0), with(77));
    }

    #[test]
    fn what_the_kernel_tells_in_another_way_than_it_takes_it_is_told_in_that() {
        let told = |kind: &str, data: &[(u16, &[u8])]| {
            let mut nested = Vec::new();
            data.iter().for_each(|(kind, value)| rtnl::push(&mut nested, *kind, value));
            let settable = settable(kind, &nested);
            attributes(&settable).map(|(kind, value)| (kind, value.to_vec())).collect::<Vec<_>>()
        };
        let vlan = told("vlan", &[(1, &[7, 0]), (2, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])]);
        assert_eq!(vlan, [(1, vec![7, 0]), (2, vec![1, 0, 0, 0, 0x1f, 0, 0, 0])]);
        assert_eq!(told("vxlan", &[(1, &[7, 0, 0, 0]), (28, &[0])]).len(), 1);
        assert_eq!(told("vxlan", &[(28, &[1])]), [(28, vec![])]);
    }

    #[test]
    fn bond_is_made_with_the_options_of_its_mode() {
        let has = |mode: u8| {
            let data =
                [(1, &[mode][..]), (3, &[100, 0, 0, 0]), (4, &[0; 4]), (13, &[1]), (14, &[1]), (21, &[1]), (23, &[])];
            let mut nested = Vec::new();
            data.iter().for_each(|(kind, value)| rtnl::push(&mut nested, *kind, value));
            attributes(&settable("bond", &nested)).map(|(kind, _)| kind).collect::<Vec<_>>()
        };
        assert_eq!((has(1), has(4)), (vec![1, 3, 13], vec![1, 3, 14, 21]));
    }
}
