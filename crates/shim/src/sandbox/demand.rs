//! Memory for containers without a limit: the guest says when it needs more, or less, and gets it step by step
//! ([`crate::sizing`]). It may ask as often as it likes. It gets no more than there is room for on the host ([`super::room`]),
//! and doubles what it has, so it has all of that after a few steps; what leads to nothing is heard once a second.

use std::sync::Arc;
use std::time::Duration;

use super::agent::AgentError;
use super::{Sandbox, room};

/// Time from a demand that was refused, or was one for less, to the next that is listened to. One that is met needs no bound: each
/// doubles the VM, and it shrinks no oftener than that.
const LISTEN_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Does what the guest demands, to the VM's end.
pub async fn follow(sandbox: Arc<Sandbox>) {
    if !sandbox.resizer.can_grow() {
        return;
    }
    let mut refused = false;
    loop {
        let less = match sandbox.agent.next_demand(refused, sandbox.resizer.has_grown().await).await {
            Ok(demand) => demand.less,
            Err(error) => {
                if let AgentError::Refused { .. } = error {
                    tracing::warn!(%error, "the guest does not report its need for memory: containers without a limit keep the memory that they have now");
                }
                return;
            }
        };
        refused = !less && !grow(&sandbox).await;
        if less {
            sandbox.resizer.shrink_on_demand(&sandbox.vm, &sandbox.agent).await;
        }
        if (less || refused) && tokio::time::timeout(LISTEN_AGAIN_AFTER, sandbox.vm.ended()).await.is_ok() {
            return;
        }
    }
}

/// Whether there is more.
async fn grow(sandbox: &Sandbox) -> bool {
    let most_mib = room::most_mib(sandbox.cgroup.as_ref(), sandbox.vm.pid());
    match sandbox.resizer.grow_on_demand(&sandbox.vm, &sandbox.agent, most_mib).await {
        Ok(grown) => grown,
        Err(error) => {
            tracing::warn!(%error, "cannot give the pod more memory on demand");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn guest_that_demands_without_end_gets_what_there_is_and_is_heard_once_a_second_then() {
        let dir = tempfile::tempdir().unwrap();
        let (sandbox, agent) = Sandbox::fake(dir.path()).await;
        let begin = Instant::now();
        let following = tokio::spawn(follow(sandbox.clone()));
        agent.called("NextDemand again", 2).await;
        assert!(begin.elapsed() >= 2 * LISTEN_AGAIN_AFTER);
        // From 256 MiB to the 4 GiB of the node, if this host has as much: 4 steps.
        assert!((1..=4).contains(&agent.calls("ResizeGuest ")), "{}", agent.calls("ResizeGuest "));
        assert_eq!(agent.calls("NextDemand "), agent.calls("ResizeGuest ") + 1, "each step is one demand");
        assert!(sandbox.resizer.has_grown().await);
        // And back, in as many steps.
        agent.hold("more");
        agent.called("ResizeGuest ", 2 * agent.calls("ResizeGuest ")).await;
        sandbox.vm.kill().await;
        following.await.unwrap();
    }
}
