//! One process of a container: its init or an exec.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::termios::{Winsize, tcsetwinsize};
use tokio::net::unix::pipe;

use crate::guest_time;
use crate::reaper::{Exit, ExitWatch};
use crate::runtime::Created;
use crate::runtime::message::WindowSize;

/// How long an init that was started may take to its program. It runs the container's own startContainer hooks on its way,
/// and reads the program from the host.
const EXECUTE_TIMEOUT: Duration = Duration::from_secs(10);

/// A process, running or ended.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    exit: ExitWatch,
    terminal: Option<OwnedFd>,
    until_executed: Option<pipe::Receiver>,
}

impl Process {
    pub(super) fn new(created: Created) -> Self {
        Self {
            pid: created.pid,
            exit: created.exit,
            terminal: created.terminal,
            until_executed: created.until_executed,
        }
    }

    /// Its pid in the guest's root pid namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        self.exit.ended()
    }

    /// Waits until an init that was started executes its program or has ended, in bounded time.
    pub async fn executed(&self) {
        if let Some(pipe) = &self.until_executed {
            // Nobody writes: readable is at its end.
            let _ = guest_time::timeout(EXECUTE_TIMEOUT, pipe.readable()).await;
        }
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        self.exit.clone().wait().await
    }

    /// Changes the size of its terminal, which tells it by SIGWINCH. `false` if it has none.
    pub fn resize(&self, size: WindowSize) -> rustix::io::Result<bool> {
        let Some(master) = &self.terminal else { return Ok(false) };
        let size = Winsize { ws_col: size.width, ws_row: size.height, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(master, size).map(|()| true)
    }
}
