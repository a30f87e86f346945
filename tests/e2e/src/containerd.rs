//! The node's containerd as a process: it is killed and started again while pods run.

use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::{Cri, v1};

use crate::{PATIENCE, node_command};

/// The node's containerd, as tests/node/lib/start runs it.
const PID_FILE: &str = "/run/node/containerd.pid";
const LOG: &str = "/run/node/log/containerd.log";

/// The process that serves.
pub fn pid() -> Result<u32> {
    let text = std::fs::read_to_string(PID_FILE).context("the node does not say which process is containerd")?;
    text.trim().parse().context("the pid of containerd is no number")
}

/// Its command line.
pub fn command() -> Result<Vec<String>> {
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", pid()?)).context("containerd does not run")?;
    Ok(line.split_terminator('\0').map(str::to_owned).collect())
}

/// Whether it runs: what has ended, waited for or not, has no command line.
pub fn runs() -> bool {
    command().is_ok_and(|command| !command.is_empty())
}

/// Kills containerd as a crash would and returns its command line.
pub fn crash() -> Result<Vec<String>> {
    let line = command()?;
    node_command("kill", &["-KILL", &pid()?.to_string()])?;
    Ok(line)
}

/// Starts containerd and returns when its CRI answers.
pub async fn start(cri: &Cri, command: &[String]) -> Result<()> {
    ensure!(!command.is_empty(), "containerd has no command line");
    let log = OpenOptions::new().append(true).open(LOG)?;
    // With the limits that tests/node/lib/start gives it, of which containers have theirs.
    let mut containerd = Command::new("prlimit");
    containerd
        .args(["--nofile=1048576", "--nproc=unlimited", "--core=unlimited"])
        .args(command)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0);
    std::fs::write(PID_FILE, format!("{}\n", containerd.spawn()?.id()))?;
    let begin = Instant::now();
    while cri.runtime().version(v1::VersionRequest::default()).await.is_err() {
        ensure!(begin.elapsed() < PATIENCE, "containerd does not come back");
        // There is no event for a socket that will be answered.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    Ok(())
}
