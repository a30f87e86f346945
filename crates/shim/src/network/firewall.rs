//! Rules of the packet filter in the pod's namespace. Frames pass through the namespace on the host before any of them is
//! looked at, so they work in the guest or not at all. A mesh's redirect and a network plugin's firewall are such rules.

use bulkhead_netfilter::Uncarried;
use bulkhead_protocol::agent::{Firewall, FirewallFailure};
use bulkhead_protocol::error::chain;

use super::unsupported::Unsupported;

/// Most rules that a guest may say it has not taken, as many as the agent tells.
const MAX_FAILURES: usize = 64;

/// Reads the rules of the calling thread's network namespace, and what of them cannot be carried into a guest. Nothing if they
/// cannot be read.
pub fn read() -> (Option<Firewall>, Vec<Unsupported>) {
    match bulkhead_netfilter::dump() {
        Ok(dump) => (Some(dump.firewall), dump.uncarried.into_iter().map(Unsupported::from).collect()),
        // Nobody knows what they are, so they may be anything.
        Err(error) => (None, vec![Unsupported { what: chain(&error), security: true }]),
    }
}

/// What makes rules of others, if they differ and both are known.
pub fn difference(old: Option<&Firewall>, new: Option<&Firewall>) -> Option<Firewall> {
    let difference = bulkhead_netfilter::replacing(old?, new?);
    Some(difference).filter(|difference| *difference != Firewall::default())
}

/// What the guest says that it has not taken. It may say anything; a message that is none of ours is left out.
pub fn not_taken(firewall: &Firewall, failures: &[FirewallFailure]) -> Vec<Unsupported> {
    let known = failures.iter().take(MAX_FAILURES).filter_map(|one| bulkhead_netfilter::failure(firewall, one));
    known.map(Unsupported::from).collect()
}

impl From<Uncarried> for Unsupported {
    fn from(one: Uncarried) -> Self {
        Self { what: one.what, security: one.security }
    }
}
