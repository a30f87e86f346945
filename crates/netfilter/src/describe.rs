//! Which message the kernel did not take, in words.

use bulkhead_protocol::agent::{Firewall, FirewallFailure};

use crate::netlink::{HEADER, NFGENMSG};
use crate::words::{message, printable};
use crate::{Uncarried, ipset, rules, tables, xtables};

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
