//! The kernel's word that something has changed in the pod's network namespace, by CNI or a daemon of the node.
//!
//! It only says that something has: all is read again, and the difference told to the agent. So it is no loss if notifications
//! are dropped.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;

use super::NetnsError;

/// `RTNLGRP_LINK`, `_NEIGH`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE` and `_IPV6_RULE` of
/// linux/rtnetlink.h.
const GROUPS: [u32; 8] = [1, 3, 5, 7, 8, 9, 11, 19];

/// How long nothing may change before what has changed is read: a plugin makes many changes one after the other.
const QUIET: Duration = Duration::from_millis(50);

/// How long it may be read later than it has changed, however much changes.
const LATEST: Duration = Duration::from_millis(500);

/// Opens a socket on which the kernel tells of changes in the calling thread's namespace.
pub fn open() -> Result<OwnedFd, NetnsError> {
    let open = || {
        // No protocol is NETLINK_ROUTE, whose number is zero.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        let groups = GROUPS.iter().fold(0, |groups, group| groups | 1 << (group - 1));
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
        Ok(socket)
    };
    open().map_err(|error: Errno| NetnsError::Socket(error.into()))
}

/// Waits until something has changed, and until it is done: who changes something makes many changes one after the other.
pub async fn next(events: &AsyncFd<OwnedFd>) -> std::io::Result<()> {
    changed(events).await?;
    settled(events).await;
    Ok(())
}

/// Waits until something has changed. That the kernel has dropped notifications is a change, too.
async fn changed(events: &AsyncFd<OwnedFd>) -> std::io::Result<()> {
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
fn drain(events: &OwnedFd) -> std::io::Result<bool> {
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

async fn settled(events: &AsyncFd<OwnedFd>) {
    let quiet = async { while tokio::time::timeout(QUIET, changed(events)).await.is_ok() {} };
    let _ = tokio::time::timeout(LATEST, quiet).await;
}
