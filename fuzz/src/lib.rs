//! The fuzz targets, each a function of bytes that panics when something is wrong.
//!
//! What faces a guest is fuzzed as the guest reaches it: devices through queues in guest memory, the transport through its
//! registers, the shim through the bytes that the agent sends. A target does the same for the same bytes, ends for all of
//! them, and does a bounded amount of work. README.md says how to work with a crash.

mod agent;
mod control;
mod devices;
mod fs;
mod guest;
mod input;
mod mem;
mod mmio;
mod net;
mod oci;
pub mod script;
mod virtqueue;
mod vsock;

pub use agent::agent_replies;
pub use control::{control_messages, vmspec_config};
pub use devices::{balloon, block, console, pmem, rng};
pub use fs::fs;
pub use mem::mem;
pub use mmio::mmio_registers;
pub use net::net;
pub use oci::oci_spec;
pub use virtqueue::virtqueue;
pub use vsock::vsock;

/// A target.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Target); 15] = [
    ("agent_replies", agent_replies),
    ("balloon", balloon),
    ("block", block),
    ("console", console),
    ("control_messages", control_messages),
    ("fs", fs),
    ("mem", mem),
    ("mmio_registers", mmio_registers),
    ("net", net),
    ("oci_spec", oci_spec),
    ("pmem", pmem),
    ("rng", rng),
    ("virtqueue", virtqueue),
    ("vmspec_config", vmspec_config),
    ("vsock", vsock),
];
