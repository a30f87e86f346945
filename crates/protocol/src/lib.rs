//! What crosses a boundary of Bulkhead: the agent's RPCs, the VMM's control messages, the header of a standard stream.
//!
//! The shim speaks to both sides, the VMM and the agent never to each other. Whoever receives validates: the guest is
//! hostile, and the VMM may have been taken over by it, so nothing here trusts a length, a count or an index.

pub mod control;
pub mod guest;
pub mod stdio;
pub mod vmspec;

/// The agent's ttrpc service, generated from `proto/agent.proto`.
#[cfg(feature = "agent")]
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::restriction)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/services.rs"));
    pub use agent::*;
    pub use agent_ttrpc::*;
}
