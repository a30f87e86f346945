//! Messages of rtnetlink(7) as bytes: the shim reads them in the pod's namespace, the agent sends them to the guest's kernel.
//!
//! Between kernels of one byte order a message is the same, so what neither side knows of crosses as well. What differs is
//! the indices of links: a message has those of the namespace on the host, and the agent puts the guest's in their place.

mod socket;

use std::convert::Infallible;
use std::ops::Range;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

pub use socket::Socket;

/// `RTM_NEWLINK` of linux/rtnetlink.h; those of one object are `NEW`, `DEL`, `GET` in this order.
pub const NEW_LINK: u16 = 16;
/// `RTM_GETLINK`.
pub const GET_LINK: u16 = 18;
/// `RTM_NEWADDR`.
pub const NEW_ADDRESS: u16 = 20;
/// `RTM_NEWROUTE`.
pub const NEW_ROUTE: u16 = 24;
/// `RTM_NEWNEIGH`.
pub const NEW_NEIGHBOUR: u16 = 28;
/// `RTM_NEWRULE`.
pub const NEW_RULE: u16 = 32;
/// `RTM_NEWLINKPROP`.
pub const NEW_LINK_NAMES: u16 = 108;

/// Of linux/if_link.h.
pub const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;

/// Of linux/rtnetlink.h.
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;

/// Of linux/neighbour.h.
const NDA_IFINDEX: u16 = 8;
const NDA_MASTER: u16 = 9;

/// `NLA_TYPE_MASK` of linux/netlink.h: the other bits say that a value is nested or in network order.
const KIND: u16 = 0x3fff;

/// Offset of the index in `struct ifinfomsg`, `ifaddrmsg` and `ndmsg`.
const INDEX: usize = 4;

/// Size of `struct rtnexthop`, and the offset of its index.
const NEXT_HOP: usize = 8;

/// A message without its netlink(7) header.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Message {
    /// `RTM_*`.
    pub kind: u16,
    /// The object's fixed header and its attributes.
    pub payload: Vec<u8>,
}

impl Message {
    /// A message with its fixed header, to which attributes are added.
    pub fn new(kind: u16, header: &[u8]) -> Self {
        Self { kind, payload: header.to_vec() }
    }

    /// Adds an attribute.
    pub fn push(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        push(&mut self.payload, kind, value);
        self
    }

    /// Its attributes.
    pub fn attributes(&self) -> impl Iterator<Item = (u16, &[u8])> {
        self.ranges().map(|(kind, range)| (kind, self.payload.get(range).unwrap_or_default()))
    }

    /// An attribute's value.
    pub fn attribute(&self, kind: u16) -> Option<&[u8]> {
        self.attributes().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The kind of link that a message about one names: "vlan".
    pub fn link_kind(&self) -> Option<&str> {
        let kind = attributes(self.attribute(IFLA_LINKINFO)?).find(|(kind, _)| *kind == IFLA_INFO_KIND)?.1;
        std::str::from_utf8(kind).ok().map(|kind| kind.trim_end_matches('\0'))
    }

    fn ranges(&self) -> impl Iterator<Item = (u16, Range<usize>)> {
        ranges(&self.payload, header_len(self.kind)..self.payload.len())
    }

    /// The links of which it speaks, by their indices.
    pub fn links(&self) -> Vec<u32> {
        self.index_offsets()
            .into_iter()
            .filter_map(|at| u32_at(&self.payload, at))
            .filter(|index| *index != 0)
            .collect()
    }

    /// Puts other indices in the place of those that it has; fails with the first one for which there is none.
    pub fn translate(&mut self, index: impl Fn(u32) -> Option<u32>) -> Result<(), u32> {
        for at in self.index_offsets() {
            let Some(bytes) = self.payload.get_mut(at..at + 4) else { continue };
            let old = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            if old != 0 {
                bytes.copy_from_slice(&index(old).ok_or(old)?.to_ne_bytes());
            }
        }
        Ok(())
    }

    fn index_offsets(&self) -> Vec<usize> {
        let mut found = Vec::new();
        let object = self.kind & !3;
        if matches!(object, NEW_LINK | NEW_ADDRESS | NEW_NEIGHBOUR | NEW_LINK_NAMES) {
            found.push(INDEX);
        }
        for (kind, range) in self.ranges() {
            match (object, kind) {
                (NEW_LINK, IFLA_LINK | IFLA_MASTER)
                | (NEW_NEIGHBOUR, NDA_IFINDEX | NDA_MASTER)
                | (NEW_ROUTE, RTA_IIF | RTA_OIF) => found.push(range.start),
                (NEW_ROUTE, RTA_MULTIPATH) => {
                    found.extend(next_hops(&self.payload, range).map(|hop| hop.start + INDEX))
                }
                (NEW_LINK, IFLA_LINKINFO) => found.extend(self.lower_link(range)),
                _ => {}
            }
        }
        found
    }

    /// Where a tunnel's own attributes have the link below it.
    fn lower_link(&self, info: Range<usize>) -> Option<usize> {
        let attribute = match self.link_kind()? {
            "vxlan" => 3,
            "ipip" | "sit" | "ip6tnl" | "gre" | "gretap" | "erspan" | "ip6gre" | "ip6gretap" | "ip6erspan" | "vti"
            | "vti6" | "xfrm" => 1,
            _ => return None,
        };
        let data = ranges(&self.payload, info).find(|(kind, _)| *kind == IFLA_INFO_DATA)?.1;
        ranges(&self.payload, data).find(|(kind, _)| *kind == attribute).map(|(_, range)| range.start)
    }
}

/// The next hops in a value of `RTA_MULTIPATH`, with their attributes.
pub fn next_hops(bytes: &[u8], value: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut at = value.start;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, at)?);
        let end = at.checked_add(length).filter(|end| length >= NEXT_HOP && *end <= value.end)?;
        let hop = at..end;
        at = end.next_multiple_of(4);
        Some(hop)
    })
}

/// The size of an object's fixed header.
pub fn header_len(kind: u16) -> usize {
    match kind & !3 {
        NEW_LINK | NEW_LINK_NAMES => 16,
        NEW_ADDRESS => 8,
        _ => 12,
    }
}

/// The attributes in a nested value.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    ranges(bytes, 0..bytes.len()).map(|(kind, range)| (kind, bytes.get(range).unwrap_or_default()))
}

/// Adds an attribute to a nested value.
pub fn push(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // A length is 16 bits wide. Nothing that is told here comes near, and a cut value is none.
    let Ok(length) = u16::try_from(value.len() + 4) else { return };
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Attributes with where their values are. Ends at one that does not fit.
fn ranges(bytes: &[u8], within: Range<usize>) -> impl Iterator<Item = (u16, Range<usize>)> {
    let mut at = within.start;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, at)?);
        let kind = u16_at(bytes, at + 2)? & KIND;
        let end = at.checked_add(length).filter(|end| length >= 4 && *end <= within.end)?;
        let value = at + 4..end;
        at = end.next_multiple_of(4);
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// A number in a message, in the host's byte order.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.payload.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        for (to, from) in buffer.iter_mut().zip(&self.payload) {
            *to = *from;
        }
    }
}

impl NetlinkDeserializable for Message {
    type Error = Infallible;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Infallible> {
        Ok(Self::new(header.message_type, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nested(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, value) in attributes {
            push(&mut bytes, *kind, value);
        }
        bytes
    }

    #[test]
    fn every_index_is_found_and_nothing_else_is_touched() {
        let index = |n: u32| n.to_ne_bytes();
        let hop = |n: u32| [&[16, 0, 0, 0][..], &index(n), &nested(&[(5, &[10, 0, 0, 1])])].concat();
        let mut route = Message::new(NEW_ROUTE, &[2; 12]);
        route.push(1, &index(3)).push(RTA_OIF, &index(3)).push(RTA_MULTIPATH, &[hop(4), hop(3)].concat());
        assert_eq!(route.links(), [3, 4, 3]);
        route.translate(|old| Some(old + 10)).unwrap();
        assert_eq!(route.links(), [13, 14, 13]);
        assert_eq!(route.attribute(1), Some(&index(3)[..]));
        assert_eq!(route.translate(|_| None), Err(13));

        let info = |kind: &str, attribute| {
            nested(&[(1, kind.as_bytes()), (2 | 0x8000, &nested(&[(attribute, &index(6)), (9, &index(6))]))])
        };
        let mut link = Message::new(NEW_LINK, &[&[0; 4][..], &index(5), &[0; 8]].concat());
        link.push(IFLA_LINK, &index(7)).push(IFLA_LINKINFO | 0x8000, &info("vxlan\0", 3));
        assert_eq!(link.links(), [5, 7, 6]);
        assert_eq!(link.link_kind(), Some("vxlan"));
        let mut link = Message::new(NEW_LINK, &[0; 16]);
        link.push(IFLA_LINKINFO, &info("vlan", 1));
        assert!(link.links().is_empty(), "a VLAN's first attribute is its number");
    }

    #[test]
    fn cut_messages_end_where_they_are_cut() {
        let mut route = Message::new(NEW_ROUTE, &[0; 12]);
        route.push(RTA_OIF, &[1, 0, 0, 0]).push(RTA_MULTIPATH, &[16, 0, 0, 0, 1, 0, 0, 0]);
        let whole = route.payload.clone();
        for length in 0..whole.len() {
            route.payload.truncate(0);
            route.payload.extend_from_slice(&whole[..length]);
            let _ = (route.links(), route.translate(Some), route.link_kind());
        }
        let endless = Message { kind: NEW_ROUTE, payload: [vec![0; 12], vec![0, 0, 1, 0]].concat() };
        assert_eq!(endless.attributes().count(), 0);
    }
}
