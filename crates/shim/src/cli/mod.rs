//! What containerd runs: the command line, `start`, `delete`, and the daemon that `start` leaves behind.

pub mod bootstrap;
mod confine;
pub mod dead;
pub mod delete;
mod features;
pub mod flags;
pub mod info;
pub mod logging;
pub mod serve;
pub mod start;
mod version;
