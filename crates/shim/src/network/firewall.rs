//! Rules of the packet filter in the pod's namespace. Frames pass through the namespace on the host before any of them is
//! looked at, so they work in the guest or not at all. A mesh's redirect and a network plugin's firewall are such rules.

use bulkhead_netfilter::{DumpError, Uncarried};
use bulkhead_protocol::agent::{Firewall, FirewallFailure};

use super::unsupported::Unsupported;
use crate::pod::error::chain;

/// Reads the rules of the calling thread's network namespace, and what of them cannot be carried into a guest.
pub fn read() -> (Firewall, Vec<Unsupported>) {
    dump().unwrap_or_else(|error| {
        // Nobody knows what they are, so they may be anything.
        (Firewall::default(), vec![Unsupported { what: chain(&error), security: true }])
    })
}

fn dump() -> Result<(Firewall, Vec<Unsupported>), DumpError> {
    let dump = bulkhead_netfilter::dump()?;
    Ok((dump.firewall, dump.uncarried.into_iter().map(Unsupported::from).collect()))
}

/// What the guest says that it has not taken. It may say anything; a message that is none of ours is left out.
pub fn not_taken(firewall: &Firewall, failures: &[FirewallFailure]) -> Vec<Unsupported> {
    let known = failures.iter().filter_map(|one| bulkhead_netfilter::failure(firewall, one));
    known.map(Unsupported::from).collect()
}

impl From<Uncarried> for Unsupported {
    fn from(one: Uncarried) -> Self {
        Self { what: one.what, security: one.security }
    }
}
