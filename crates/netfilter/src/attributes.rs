//! Attributes of netlink messages: type, length, value (Linux: include/uapi/linux/netlink.h, struct nlattr).

pub use bulkhead_protocol::rtnl::push as put;

/// Bits of the type that say how the value is to be read.
const FLAGS: u16 = 0xc000;

/// `NLA_F_NESTED`.
pub const NESTED: u16 = 0x8000;

/// `NLA_F_NET_BYTEORDER`.
pub const NETWORK_ORDER: u16 = 0x4000;

/// Length and type.
pub const HEADER: usize = 4;

/// One attribute.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Attribute<'a> {
    /// Its type with the flags.
    raw: u16,
    /// Its value.
    pub value: &'a [u8],
    /// Where it begins.
    pub offset: usize,
}

impl Attribute<'_> {
    /// Its type.
    pub fn kind(&self) -> u16 {
        self.raw & !FLAGS
    }
}

/// The attributes in some bytes, as far as they are whole.
pub fn all(bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    let mut offset = 0_usize;
    std::iter::from_fn(move || {
        let header = bytes.get(offset..offset.checked_add(HEADER)?)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = bytes.get(offset + HEADER..offset.checked_add(length)?)?;
        let attribute = Attribute { raw: u16::from_ne_bytes([header[2], header[3]]), value, offset };
        offset += aligned(length);
        Some(attribute)
    })
}

/// The value of the first one of a type.
pub fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    all(bytes).find(|attribute| attribute.kind() == kind).map(|attribute| attribute.value)
}

/// A number, which netfilter has in network order.
pub fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    find(bytes, kind)?.try_into().ok().map(u32::from_be_bytes)
}

/// A text up to its zero byte.
pub fn text(bytes: &[u8], kind: u16) -> Option<String> {
    let value = find(bytes, kind)?;
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    Some(String::from_utf8_lossy(value.get(..end)?).into_owned())
}

/// Appends a number in network order.
pub fn put_number(to: &mut Vec<u8>, kind: u16, value: u32) {
    put(to, kind, &value.to_be_bytes());
}

/// Appends a text with its zero byte.
pub fn put_text(to: &mut Vec<u8>, kind: u16, text: &str) {
    put(to, kind, &[text.as_bytes(), &[0]].concat());
}

/// Appends attributes inside of one.
pub fn put_nested(to: &mut Vec<u8>, kind: u16, inner: &[u8]) {
    put(to, kind | NESTED, inner);
}

/// Each of these as `change` makes it: its type with the flags, and its value.
pub fn map(bytes: &[u8], change: impl Fn(u16, &[u8]) -> (u16, Vec<u8>)) -> Vec<u8> {
    let mut mapped = Vec::new();
    for attribute in all(bytes) {
        let (raw, value) = change(attribute.raw, attribute.value);
        put(&mut mapped, raw, &value);
    }
    mapped
}

/// Those of some types, as they are.
pub fn keep(bytes: &[u8], kinds: &[u16]) -> Vec<u8> {
    let mut kept = Vec::new();
    for attribute in all(bytes).filter(|attribute| kinds.contains(&attribute.kind())) {
        put(&mut kept, attribute.raw, attribute.value);
    }
    kept
}

/// Netlink's alignment (`NLMSG_ALIGN`, `NLA_ALIGN`).
pub fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_written_and_torn_ones_left_out() {
        let mut bytes = Vec::new();
        put_text(&mut bytes, 1, "nat");
        put_number(&mut bytes, 2, 7);
        put_nested(&mut bytes, 3, &[1, 2, 3]);
        assert_eq!((text(&bytes, 1).as_deref(), number(&bytes, 2)), (Some("nat"), Some(7)));
        assert_eq!((find(&bytes, 3), find(&bytes, 4)), (Some([1, 2, 3].as_slice()), None));
        assert_eq!(keep(&bytes, &[1, 2, 3]), bytes);
        assert_eq!(all(&keep(&bytes, &[2])).count(), 1);
        for end in 0..bytes.len() {
            assert!(all(&bytes[..end]).count() <= 3);
        }
        assert_eq!(all(&[0, 0, 1, 0, 0, 0, 0, 0]).count(), 0, "a length below that of the header");
    }
}
