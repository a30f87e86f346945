//! One process of a container: its init or an exec.

use std::os::fd::OwnedFd;

use rustix::termios::{Winsize, tcsetwinsize};

use crate::reaper::{Exit, ExitWatch};
use crate::runtime::Created;
use crate::runtime::message::WindowSize;

/// A process, running or ended.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    exit: ExitWatch,
    terminal: Option<OwnedFd>,
}

impl Process {
    pub(super) fn new(created: Created) -> Self {
        Self { pid: created.pid, exit: created.exit, terminal: created.terminal }
    }

    /// Its pid in the guest's root pid namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it has ended.
    pub fn ended(&self) -> bool {
        self.exit.ended()
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
