//! `bulkhead clean`: has the shim clean up what killed shims have left on this node, as the next pod's would.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Options of `bulkhead clean`.
#[derive(clap::Args)]
pub struct CleanArguments {
    /// The shim; without a directory it is looked for in PATH
    #[arg(long, default_value = "containerd-shim-bulkhead-v2")]
    shim: PathBuf,
}

/// Prints what was removed, one a line.
pub fn run(arguments: &CleanArguments) -> Result<()> {
    let shim = &arguments.shim;
    let status = Command::new(shim).arg("clean").status();
    let status = status.with_context(|| format!("cannot run {}; --shim says where it is", shim.display()))?;
    ensure!(
        status.success(),
        "{} failed to clean up ({status}); run it as root, and see its messages above",
        shim.display()
    );
    Ok(())
}
