//! The node's commands, and its pace.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// How long anything may take that takes milliseconds on hardware: the node is emulated, tens of times slower.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Runs a command of the node; it must succeed. Returns its standard output.
pub fn node_command(program: &str, arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program} {arguments:?} failed: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
