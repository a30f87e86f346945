//! Rules of the packet filter in the pod's namespace. Frames pass through the namespace on the host before any of them is
//! looked at, so they work in the guest or not at all. A mesh's redirect and a network plugin's firewall are such rules.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_netfilter::{DumpError, Uncarried};
use bulkhead_protocol::agent::{Firewall, FirewallResult};
use tokio::io::Interest;
use tokio::net::UnixDatagram;
use tokio::time::{Instant, timeout_at};

use super::netns;
use super::policy::Policy;
use super::unsupported::Unsupported;
use crate::sandbox::agent::Agent;

/// How long rules may go on to change before they are read: whoever writes them by iptables(8) changes one after the other.
/// What changes is in the guest within a second.
const SETTLED: Duration = Duration::from_millis(100);
const CHANGING: Duration = Duration::from_millis(500);

/// Reads the rules of the calling thread's network namespace, and what of them cannot be carried into a guest.
pub fn read() -> (Firewall, Vec<Unsupported>) {
    dump().unwrap_or_else(|error| {
        // Nobody knows what they are, so they may be anything.
        let what = crate::pod::error::chain(&error);
        (Firewall::default(), vec![Unsupported { what, security: true }])
    })
}

fn dump() -> Result<(Firewall, Vec<Unsupported>), DumpError> {
    let dump = bulkhead_netfilter::dump()?;
    Ok((dump.firewall, dump.uncarried.into_iter().map(Unsupported::from).collect()))
}

/// What the guest says that it has not taken. It may say anything; a message that is none of ours is left out.
pub fn not_taken(firewall: &Firewall, result: &FirewallResult) -> Vec<Unsupported> {
    let known = result.failures.iter().filter_map(|one| bulkhead_netfilter::failure(firewall, one));
    known.map(Unsupported::from).collect()
}

impl From<Uncarried> for Unsupported {
    fn from(one: Uncarried) -> Self {
        Self { what: one.what, security: one.security }
    }
}

/// Carries rules of nf_tables that change while the pod runs. Those of x_tables are looked at then as well; of their own
/// changes the kernel tells nobody.
#[derive(Debug)]
pub struct Follower {
    /// Of netlink; datagrams they are all.
    watch: OwnedFd,
    last: Firewall,
}

impl Follower {
    /// Watches the calling thread's network namespace, whose rules are `last`. To be made before they are read.
    pub fn open() -> Option<Self> {
        let watch = bulkhead_netfilter::watch();
        let watch = watch.inspect_err(|error| tracing::warn!(%error, "changes of the pod's rules are not followed"));
        Some(Self { watch: watch.ok()??, last: Firewall::default() })
    }

    /// What the guest has.
    pub fn begin_with(mut self, firewall: &Firewall) -> Self {
        self.last = firewall.clone();
        self
    }

    /// Follows until the VM ends or the namespace is gone.
    pub async fn serve(self, netns: PathBuf, agent: Agent) {
        tokio::select! {
            followed = self.follow(&netns, &agent) => {
                if let Err(error) = followed {
                    tracing::warn!("changes of the pod's rules are not followed any more: {}", crate::pod::error::chain(&error));
                }
            }
            () = agent.vm_ended() => {}
        }
    }

    async fn follow(self, netns: &Path, agent: &Agent) -> io::Result<()> {
        let Self { watch, mut last } = self;
        let watch = UnixDatagram::from_std(watch.into())?;
        while netns.exists() {
            change(&watch).await?;
            let Ok(dumped) = netns::run_in(netns, async || dump()).await else { return Ok(()) };
            let (now, unsupported) = match dumped {
                Ok((now, _)) if now == last => continue,
                Ok(dumped) => dumped,
                // The guest keeps those that it has.
                Err(error) => {
                    tracing::warn!("the pod's rules have changed: {}", crate::pod::error::chain(&error));
                    continue;
                }
            };
            let difference = bulkhead_netfilter::replacing(&last, &now);
            match agent.set_firewall(&difference).await {
                Ok(result) => {
                    let not_taken = not_taken(&difference, &result);
                    // The pod runs already: all that can be done is to tell.
                    let _ = Policy::Warn.check(&[unsupported, not_taken].concat());
                    last = now;
                }
                Err(error) => tracing::warn!("the pod's rules have changed: {}", crate::pod::error::chain(&error)),
            }
        }
        Ok(())
    }
}

/// Waits for a change, and until no other follows it soon.
async fn change(watch: &UnixDatagram) -> io::Result<()> {
    let changed = || watch.async_io(Interest::READABLE, || bulkhead_netfilter::changed(watch));
    changed().await?;
    let end = Instant::now() + CHANGING;
    while let Ok(more) = timeout_at(end.min(Instant::now() + SETTLED), changed()).await {
        more?;
    }
    Ok(())
}
