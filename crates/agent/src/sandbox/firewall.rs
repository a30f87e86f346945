//! Rules of the packet filter that CNI has put into the pod's namespace on the host.

use bulkhead_netfilter::ReplayError;
use bulkhead_protocol::agent::{Firewall, FirewallResult};

use super::NetworkError;
use crate::netns::Netns;

/// Puts rules into the pod's network namespace. What the kernel does not take is the answer: whether the pod can do without
/// is not the guest's to say.
pub async fn set(netns: &Netns, firewall: Firewall) -> Result<FirewallResult, FirewallError> {
    let replay = move || bulkhead_netfilter::replay(&firewall);
    let failures =
        netns.run(replay).await.map_err(|error| FirewallError::Namespace(NetworkError::Namespace(error)))??;
    for one in &failures {
        tracing::warn!(message = one.message, errno = one.errno, "the kernel does not take a rule of the pod's");
    }
    Ok(FirewallResult { failures, ..FirewallResult::default() })
}

/// The pod's rules cannot be put in.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// setns(2).
    #[error(transparent)]
    Namespace(NetworkError),
    /// nfnetlink.
    #[error(transparent)]
    Replay(#[from] ReplayError),
}
