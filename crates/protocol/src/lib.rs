//! What crosses a boundary of Bulkhead: the agent's RPCs, the VMM's control messages, the headers of standard streams and
//! of forwarded connections, and what a node's processes leave for an operator's commands.
//!
//! The shim speaks to both sides, the VMM and the agent never to each other. Whoever receives validates: the guest is
//! hostile, and the VMM may have been taken over by it, so nothing here trusts a length, a count or an index.

/// The release. Shim, VMM and guest image are of the same: none of them speaks to another's.
pub const RELEASE: &str = env!("CARGO_PKG_VERSION");

pub mod control;
pub mod counters;
pub mod error;
pub mod forward;
pub mod guest;
pub mod handover;
pub mod huge_pages;
pub mod images;
pub mod node;
#[cfg(feature = "agent")]
pub mod rtnl;
pub mod stdio;
pub mod vmspec;

/// The agent's ttrpc service, generated from `proto/agent.proto`.
#[cfg(feature = "agent")]
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent/modules.rs"));
    pub use agent::*;
    pub use agent_ttrpc::*;
}

/// What an operator's command asks of a shim, generated from `proto/operator.proto`.
#[cfg(feature = "operator")]
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod operator {
    include!(concat!(env!("OUT_DIR"), "/operator/modules.rs"));
    pub use operator::*;
    pub use operator_ttrpc::*;
}

/// A pod's configuration as the CRI describes it, generated from `proto/cri.proto`.
#[cfg(feature = "cri")]
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod cri {
    include!(concat!(env!("OUT_DIR"), "/cri/modules.rs"));
    pub use cri::*;
}
