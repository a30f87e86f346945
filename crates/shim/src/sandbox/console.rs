//! What the guest's console and the VMM's stderr say, into the shim's log: a line at a time, bounded and rate limited,
//! since the guest decides how much it is (docs/negative-tests.md, 14).

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use super::VmError;

/// Longest line that is kept, in bytes; the rest of it is dropped.
const MAX_LINE: usize = 256;

/// Lines in one second; a kernel's panic is about fifty.
const LINES: u32 = 100;

/// The last line that anything said, for an error message.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<String>>);

impl Tail {
    /// The line.
    pub fn last_line(&self) -> String {
        self.0.lock().map(|line| line.clone()).unwrap_or_default()
    }

    fn set(&self, line: &str) {
        if let Ok(mut last) = self.0.lock() {
            line.clone_into(&mut last);
        }
    }
}

/// Makes a pipe and follows it to its end, which is the task's; the other end of the pipe is the VMM's.
pub fn follow(source: &'static str, tail: &Tail) -> Result<(OwnedFd, JoinHandle<()>), VmError> {
    let (sender, receiver) = pipe::pipe().map_err(VmError::Socket)?;
    let task = tokio::spawn(read_lines(source, receiver, tail.clone()));
    Ok((sender.into_nonblocking_fd().map_err(VmError::Socket)?, task))
}

async fn read_lines(source: &'static str, mut pipe: pipe::Receiver, tail: Tail) {
    let mut buffer = [0; 1024];
    let mut lines = Lines::default();
    let mut budget = Budget::new();
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        for line in lines.push(buffer.get(..count).unwrap_or_default()) {
            tail.set(&line);
            match budget.spend(Instant::now()) {
                Spend::Ok => tracing::info!(source, "{line}"),
                Spend::First => tracing::warn!(source, "more than {LINES} lines in a second, dropping the rest"),
                Spend::Over => {}
            }
        }
    }
}

/// Cuts bytes into lines.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut done = Vec::new();
        for byte in bytes {
            if *byte == b'\n' {
                let line = String::from_utf8_lossy(&std::mem::take(&mut self.0)).into_owned();
                let line: String = line.chars().filter(|c| !c.is_control()).collect();
                if !line.trim().is_empty() {
                    done.push(line);
                }
            } else if self.0.len() < MAX_LINE {
                self.0.push(*byte);
            }
        }
        done
    }
}

/// So many lines in each second.
struct Budget {
    since: Instant,
    spent: u32,
}

enum Spend {
    Ok,
    First,
    Over,
}

impl Budget {
    fn new() -> Self {
        Self { since: Instant::now(), spent: 0 }
    }

    fn spend(&mut self, now: Instant) -> Spend {
        if now.duration_since(self.since) >= Duration::from_secs(1) {
            *self = Self { since: now, spent: 0 };
        }
        self.spent = self.spent.saturating_add(1);
        match self.spent.cmp(&(LINES + 1)) {
            std::cmp::Ordering::Less => Spend::Ok,
            std::cmp::Ordering::Equal => Spend::First,
            std::cmp::Ordering::Greater => Spend::Over,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_cleaned_and_bounded() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"one\r\n\n\x1b[1mtw"), ["one"]);
        assert_eq!(lines.push(b"o\n"), ["[1mtwo"]);
        assert!(lines.push(&[b'x'; 10_000]).is_empty());
        assert_eq!(lines.push(b"\n")[0].len(), MAX_LINE);
    }

    #[test]
    fn flood_is_cut_and_recovers() {
        let mut budget = Budget::new();
        let start = budget.since;
        let kept = (0..1000).filter(|_| matches!(budget.spend(start), Spend::Ok)).count();
        assert_eq!(kept, 100);
        assert!(matches!(budget.spend(start + Duration::from_secs(1)), Spend::Ok));
    }
}
