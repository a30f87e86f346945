//! Rules and names of the kernel's, as people read them.

use bulkhead_protocol::agent::NftMessage;

use crate::attributes::text;
use crate::nft::{self, chain, elements, message, object, rule, set, table};

/// Longest name of the kernel's in a message.
const MAX_NAME: usize = 64;

/// What a message makes.
pub fn message(one: &NftMessage) -> String {
    let name = |kind| text(&one.attributes, kind).map(|name| printable(&name)).unwrap_or_default();
    let table = format!("table {} {}", u8::try_from(one.family).map_or("unknown", nft::family), name(table::NAME));
    match u8::try_from(one.kind) {
        Ok(message::NEW_CHAIN) => format!("chain {} of {table}", name(chain::NAME)),
        Ok(message::NEW_RULE) => format!("a rule in chain {} of {table}", name(rule::CHAIN)),
        Ok(message::NEW_SET) => format!("set {} of {table}", name(set::NAME)),
        Ok(message::NEW_ELEMENTS) => format!("elements of set {} of {table}", name(elements::SET)),
        Ok(message::NEW_OBJECT) => format!("object {} of {table}", name(object::NAME)),
        _ => table,
    }
}

/// A name that may be anything, bounded and without what would move a terminal's cursor.
pub fn printable(name: &str) -> String {
    name.chars().take(MAX_NAME).map(|one| if one.is_control() { '?' } else { one }).collect()
}
