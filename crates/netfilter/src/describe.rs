//! What a message makes, and which one the kernel did not take, in words.

use bulkhead_protocol::agent::{Firewall, FirewallFailure, NftMessage};

use crate::attributes::text;
use crate::netlink::{HEADER, NFGENMSG};
use crate::nft::{self, chain, elements, message, object, rule, set, table};
use crate::{Uncarried, ipset, rules, tables, xtables};

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

/// Which part of the rules the guest did not take, and why. `None` if there is no such part.
pub fn failure(firewall: &Firewall, failure: &FirewallFailure) -> Option<Uncarried> {
    let index = usize::try_from(failure.message).ok()?;
    let reason = std::io::Error::from_raw_os_error(i32::try_from(failure.errno).unwrap_or(0));
    let Some(one) = firewall.nft.get(index) else {
        let index = index - firewall.nft.len();
        if let Some(table) = firewall.xtables.get(index) {
            return Some(xtables::failure(table, failure.offset, &reason));
        }
        let set = firewall.sets.get(index - firewall.xtables.len())?;
        let security = !firewall.xtables.is_empty() || !tables::acting(&firewall.nft).is_empty();
        return Some(ipset::failure(set, reason.raw_os_error().unwrap_or(0), security));
    };
    let place = usize::try_from(failure.offset).ok().and_then(|offset| offset.checked_sub(HEADER + NFGENMSG));
    let expression = place.and_then(|place| {
        rules::expressions(&one.attributes).iter().find(|one| one.covers(place)).map(rules::Expression::full_name)
    });
    let reason = match expression {
        Some(name) => format!("the guest's kernel does not take its expression \"{}\": {reason}", printable(&name)),
        None => format!("the guest's kernel does not take it: {reason}"),
    };
    // Without its parts a table that acts does not do what it did.
    let security = tables::acting(&firewall.nft).contains(&tables::key(one));
    Some(Uncarried { what: format!("{} ({reason})", message(one)), security })
}

/// A name that may be anything, bounded and without what would move a terminal's cursor.
pub fn printable(name: &str) -> String {
    name.chars().take(MAX_NAME).map(|one| if one.is_control() { '?' } else { one }).collect()
}
