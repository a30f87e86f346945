//! The shim as a library: the host side of one pod (ARCHITECTURE.md, bird's eye). The binary is [`run`] and nothing else.
//!
//! It is a library so that what the guest says can be put to it without a guest, by the fuzz targets above all. Public is
//! what they need.

mod about;
pub mod annotations;
mod bundle;
mod cli;
pub mod config;
pub mod deadlines;
mod endpoint;
mod events;
mod host_files;
mod host_pid;
mod io;
mod layers;
mod network;
mod node_namespaces;
mod own_thread;
mod paths;
pub mod pod;
mod retry;
pub mod sandbox;
mod service;
mod share;
pub mod sizing;
pub mod spec;
pub mod stats;

use std::ffi::OsString;
use std::process::ExitCode;

use cli::flags::{Action, Flags};

/// What the binary does with its arguments, its own name not among them.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let flags = match Flags::parse(arguments) {
        Ok(flags) => flags,
        Err(error) => return fail(&error),
    };
    let done = match flags.action {
        Action::Version => cli::info::print_version().map_err(anyhow::Error::from),
        Action::Info => cli::info::print_info().map_err(anyhow::Error::from),
        Action::Features => cli::info::print_features().map_err(anyhow::Error::from),
        Action::Start => cli::start::run(&flags).map_err(anyhow::Error::from),
        Action::Delete => cli::delete::run(&flags).map_err(anyhow::Error::from),
        Action::Clean => cli::dead::run().map_err(anyhow::Error::from),
        Action::Serve => cli::serve::run(&flags).map_err(anyhow::Error::from),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error.as_ref()),
    }
}

/// containerd shows a failed action's output to the user: one line with the whole chain of causes.
fn fail(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    eprintln!("{}", bulkhead_protocol::error::chain(error));
    ExitCode::FAILURE
}
