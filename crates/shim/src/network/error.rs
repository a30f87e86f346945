//! Why a pod's network cannot be carried into the guest.

use super::netns::NetnsError;
use super::policy::PolicyError;

/// The pod's network cannot be carried into the guest.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// What a VM cannot be given of it.
    #[error(transparent)]
    Unsupported(#[from] PolicyError),
    /// More interfaces than slots.
    #[error("the pod has {0} network interfaces; at most {1} are supported")]
    TooMany(usize, usize),
    /// More than a message holds.
    #[error(
        "the pod's network namespace has more addresses, routes and rules than can be carried into a guest: {0} of them; \
         has somebody put a routing table of the Internet there?"
    )]
    TooMuch(usize),
    /// Another container's.
    #[error(
        "interface {0} is in another VM, and two VMs cannot share a network namespace; give the container a network of its own, or make a pod of both"
    )]
    Taken(String),
    /// /dev/net/tun.
    #[error("cannot create a tap for interface {interface}; load the kernel module tun on the node")]
    Tap {
        /// The pod's interface.
        interface: String,
        /// open(2) or ioctl(2).
        #[source]
        source: std::io::Error,
    },
    /// tc.
    #[error(
        "cannot redirect interface {interface} into the guest; load the kernel modules sch_ingress, cls_matchall and act_mirred on the node"
    )]
    Redirect {
        /// The pod's interface.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
    /// rtnetlink(7).
    #[error("cannot read the {what} of the pod's network namespace over netlink")]
    Dump {
        /// What was asked for.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// rtnetlink(7).
    #[error("cannot {what}")]
    Netlink {
        /// What was asked.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: rtnetlink::Error,
    },
}
