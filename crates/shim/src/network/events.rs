//! The kernel's word that something has changed in the pod's network namespace, by CNI or a daemon of the node.
//!
//! It only says that something has: all is read again, and the difference told to the agent. So it is no loss if notifications
//! are dropped.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;

use super::{NetnsError, netns};

/// `RTNLGRP_LINK`, `_NEIGH`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE` and `_IPV6_RULE` of
/// linux/rtnetlink.h.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// How long nothing may change before what has changed is read: a plugin makes many changes one after the other.
const SETTLED_AFTER: Duration = Duration::from_millis(50);

/// How long it may be read later than it has changed, however much changes.
const LONGEST_DELAY: Duration = Duration::from_millis(500);

/// Where the kernel tells of changes in a namespace.
#[derive(Debug)]
pub struct Events {
    network: OwnedFd,
    /// Of rules of nf_tables; x_tables tells nobody. Nothing on a node where nobody has asked for nf_tables yet.
    rules: Option<OwnedFd>,
}

impl Events {
    /// Of the calling thread's namespace, from now on.
    pub fn open() -> Result<Self, NetnsError> {
        let open = || {
            // No protocol is NETLINK_ROUTE, whose number is zero.
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
            let groups = GROUPS.iter().fold(0, |groups, group| groups | 1 << (group - 1));
            rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
            Ok(socket)
        };
        let network = open().map_err(|error: Errno| NetnsError::Socket(error.into()))?;
        let rules = bulkhead_netfilter::watch().map_err(NetnsError::Socket)?;
        Ok(Self { network, rules })
    }

    /// Makes the reactor watch them.
    pub fn watched(self) -> Result<Watched, NetnsError> {
        Ok(Watched { network: netns::watch(self.network)?, rules: self.rules.map(netns::watch).transpose()? })
    }
}

/// Events that the reactor watches.
#[derive(Debug)]
pub struct Watched {
    network: AsyncFd<OwnedFd>,
    rules: Option<AsyncFd<OwnedFd>>,
}

impl Watched {
    /// Waits until something has changed, and until it is done: who changes something makes many changes one after the other.
    /// Answers whether rules have, which are told apart: their counts change all the time.
    pub async fn next(&self) -> io::Result<bool> {
        let mut rules = self.changed().await?;
        let quiet = async {
            while let Ok(told) = tokio::time::timeout(SETTLED_AFTER, self.changed()).await {
                rules |= told.unwrap_or(false);
            }
        };
        let _ = tokio::time::timeout(LONGEST_DELAY, quiet).await;
        Ok(rules)
    }

    async fn changed(&self) -> io::Result<bool> {
        let rules = async {
            match &self.rules {
                Some(rules) => changed(rules).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            told = changed(&self.network) => told.map(|()| false),
            told = rules => told.map(|()| true),
        }
    }
}

/// Waits until something has changed. That the kernel has dropped notifications is a change, too.
async fn changed(events: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut ready = events.readable().await?;
        let told = drain(events.get_ref());
        ready.clear_ready();
        if told? {
            return Ok(());
        }
    }
}

/// Reads what is there: whether it is anything.
fn drain(events: &OwnedFd) -> io::Result<bool> {
    let (mut buffer, mut told) = ([0; 64], false);
    loop {
        // What a notification says beyond the buffer is cut off, as none of it is looked at.
        match rustix::net::recv(events, &mut buffer, RecvFlags::DONTWAIT) {
            Ok(_) | Err(Errno::NOBUFS) => told = true,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(told),
            Err(error) => return Err(error.into()),
        }
    }
}
