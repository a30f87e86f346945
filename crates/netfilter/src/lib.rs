//! Packet filter rules of a network namespace, read in one and put into another: nf_tables by nfnetlink, and the legacy
//! tables of x_tables by socket options.
//!
//! The shim reads what CNI has put into the pod's namespace, the agent puts it into the guest. Rules are carried as the bytes
//! that the kernel tells and takes, so that this code does not have to know what a rule means: only what is told and not taken
//! (handles, counts of users) is left out, and the few things that mean nothing in another namespace (numbers of
//! interfaces, inodes of cgroups) are looked for. What the other kernel does not know, it says, and [`describe`] says which rule that is.
//!
//! Everything here works in the calling thread's network namespace, and waits for nothing but the kernel.

mod attributes;
mod describe;
mod dump;
mod ipset;
mod modules;
mod netlink;
mod nft;
mod replay;
mod rules;
mod sockopt;
mod tables;
mod watch;
mod words;
mod xtables;

pub use describe::failure;
pub use dump::{Dump, DumpError, dump};
pub use replay::{ReplayError, replacing, replay};
pub use watch::watch;

/// Something that is in a namespace and cannot be put into another.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Uncarried {
    /// What it is, and what of it the other kernel has not.
    pub what: String,
    /// Whether it is a part of what drops, redirects or rewrites traffic.
    pub security: bool,
}

/// Most bytes of rules, and most rules: those of a node with thousands of services have less.
const MAX_BYTES: usize = 2 << 20;

#[cfg(test)]
mod tests;
