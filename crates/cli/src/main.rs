//! `bulkhead`: the operator's and the developer's command.

mod check;
mod clean;
mod run;

use anyhow::Result;
use bulkhead_cli::counters;
use clap::{Parser, Subcommand};

/// Pods in their own KVM guests.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what the processes of a running pod may do on this node, and whether their jail is closed (root)
    Check(check::CheckArguments),
    /// Remove what killed shims have left on this node, directories, cgroups and sockets, and name it (root)
    Clean(clean::CleanArguments),
    /// Show what the devices of a running pod have counted: requests by kind, bytes, kicks, interrupts (root)
    Counters(counters::CountersArguments),
    /// Run a pod from an image through the CRI, and show that it is in a guest of its own
    Run(run::RunArguments),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Check(arguments) => check::run(&arguments),
        Command::Clean(arguments) => clean::run(&arguments),
        Command::Counters(arguments) => counters::run(&arguments).await,
        Command::Run(arguments) => run::run(arguments).await,
    }
}
