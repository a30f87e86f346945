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

/// Lines that come at once: a kernel's boot with all that it says is some two hundred, its panic about fifty.
const BURST: u32 = 300;

/// What one more line takes after them. A guest that does nothing else then writes 20 MB a day into the node's log.
const TIME_PER_LINE: Duration = Duration::from_secs(1);

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
    let mut budget = Budget::new(Instant::now());
    while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
        for line in lines.push(buffer.get(..count).unwrap_or_default()) {
            tail.set(&line);
            match budget.spend(Instant::now()) {
                Some(0) => tracing::info!(source, "{line}"),
                Some(left_out) => tracing::warn!(source, "{line} ({left_out} lines before it were left out)"),
                None => {}
            }
        }
    }
    if budget.left_out > 0 {
        tracing::warn!(source, "{} lines before the end were left out", budget.left_out);
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

/// A bucket of lines ([`BURST`]) that fills again slowly.
struct Budget {
    lines: u32,
    /// When the last line was added to it.
    filled: Instant,
    left_out: u64,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self { lines: BURST, filled: now, left_out: 0 }
    }

    /// Whether a line may be written now; if so, how many were left out since the last one.
    fn spend(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.filled).as_secs() / TIME_PER_LINE.as_secs();
        let earned = u32::try_from(earned).unwrap_or(u32::MAX);
        self.filled += TIME_PER_LINE * earned;
        self.lines = self.lines.saturating_add(earned).min(BURST);
        match self.lines.checked_sub(1) {
            Some(lines) => {
                self.lines = lines;
                Some(std::mem::take(&mut self.left_out))
            }
            None => {
                self.left_out = self.left_out.saturating_add(1);
                None
            }
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
    fn hostile_14_flood_on_the_console_is_cut_and_counted() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        assert_eq!((0..1000).filter(|_| budget.spend(start).is_some()).count(), 300);
        assert_eq!(budget.spend(start + Duration::from_secs(1)), Some(700));
        assert_eq!(budget.spend(start + Duration::from_secs(1)), None);
        // A quiet hour, and there is room for a boot or a panic again.
        let later = start + Duration::from_secs(3600);
        assert_eq!(budget.spend(later), Some(1));
        assert_eq!((0..1000).filter(|_| budget.spend(later).is_some()).count(), 299);
    }

    #[test]
    fn hostile_14_day_of_flood_on_the_console_is_a_line_a_second() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        // A line every 10 ms.
        let day = (0..8_640_000_u64).map(|i| start + Duration::from_millis(10 * i));
        assert_eq!(day.filter(|now| budget.spend(*now).is_some()).count(), 300 + 24 * 60 * 60 - 1);
    }
}
