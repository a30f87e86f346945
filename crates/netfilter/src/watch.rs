//! Notices that rules of nf_tables change (`NFNLGRP_NFTABLES`). x_tables tells nobody.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};

use crate::modules::would_load;
use crate::sockopt;

const SOL_NETLINK: i32 = 270;
const NETLINK_ADD_MEMBERSHIP: i32 = 1;
const NFNLGRP_NFTABLES: u32 = 7;

/// A socket that becomes readable when rules change in the calling thread's network namespace. `None` on a node where nobody
/// has asked for nf_tables yet.
pub fn watch() -> io::Result<Option<OwnedFd>> {
    if would_load("nfnetlink") || would_load("nf_tables") {
        return Ok(None);
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(NETFILTER))?;
    bind(&fd, &SocketAddrNetlink::new(0, 0))?;
    sockopt::set(&fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &NFNLGRP_NFTABLES.to_ne_bytes())?;
    Ok(Some(fd))
}
