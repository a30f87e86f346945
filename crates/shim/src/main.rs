//! `containerd-shim-bulkhead-v2`: the host side of one pod (DESIGN section 2).
//!
//! containerd runs this binary with `start` for every container of a pod, the first of which leaves a daemon behind
//! that serves the pod, and with `delete` when the daemon's connection closed (containerd: core/runtime/v2/README.md).

mod annotations;
mod bundle;
mod cli;
mod config;
mod events;
mod host_pid;
mod io;
mod network;
mod paths;
mod pod;
mod sandbox;
mod service;
mod share;
mod sizing;
mod spec;
mod stats;

use std::process::ExitCode;

use cli::flags::{Action, Flags};

fn main() -> ExitCode {
    let flags = match Flags::parse(std::env::args_os().skip(1)) {
        Ok(flags) => flags,
        Err(error) => return fail(&error),
    };
    let done = match flags.action {
        Action::Version => cli::info::print_version().map_err(anyhow::Error::from),
        Action::Info => cli::info::print_info().map_err(anyhow::Error::from),
        Action::Start => cli::start::run(&flags).map_err(anyhow::Error::from),
        Action::Delete => cli::delete::run(&flags).map_err(anyhow::Error::from),
        Action::Serve => cli::serve::run(&flags).map_err(anyhow::Error::from),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error.as_ref()),
    }
}

/// containerd shows a failed action's output to the user: one line with the whole chain of causes.
fn fail(error: &(dyn std::error::Error + 'static)) -> ExitCode {
    eprintln!("{}", pod::error::chain(error));
    ExitCode::FAILURE
}
