//! Why libcontainer has failed. Its processes tell each other the outermost of their errors, "failed to prepare rootfs", and only
//! log what was behind it. So a helper keeps what they log, in a file without a name that they inherit, and adds it to its answer.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::sync::Mutex;

use rustix::fs::{MemfdFlags, OFlags, memfd_create};
use tracing::Subscriber;

/// Most that is told, in bytes: the debugging form of a mount is some hundred, and what follows says the same from further out.
const MAX_TOLD: usize = 900;

/// What libcontainer has logged of errors in this process and its children.
pub struct CapturedErrors(File);

impl CapturedErrors {
    /// Keeps the errors that this process and its children log from now on, until they execute another program. Once in a process.
    pub fn capture() -> io::Result<Self> {
        let file = file()?;
        let _ = tracing::subscriber::set_global_default(errors_to(file.try_clone()?));
        Ok(Self(file))
    }

    /// The causes behind an error: what has been logged before the error itself and is not in its text, first cause first, in
    /// one line. What is logged after the error only repeats it.
    pub fn behind(&mut self, error: &str) -> Option<String> {
        let mut bytes = vec![0; MAX_TOLD];
        self.0.rewind().ok()?;
        let length = self.0.read(&mut bytes).ok()?;
        bytes.truncate(length);
        let text = String::from_utf8_lossy(&bytes);
        let innermost = error.rsplit(": ").next().unwrap_or(error);
        let lines: Vec<_> = text.lines().map(str::trim).collect();
        let end = lines.iter().position(|line| line.contains(innermost)).map_or(lines.len(), |last| last + 1);
        let news = |line: &&str| !line.is_empty() && !line.ends_with(innermost) && !error.contains(*line);
        let told: Vec<_> = lines.into_iter().take(end).filter(news).collect();
        (!told.is_empty()).then(|| told.join("; "))
    }
}

fn file() -> io::Result<File> {
    let file = File::from(memfd_create("captured-errors", MemfdFlags::CLOEXEC)?);
    // Writers and the reader share one file position; with O_APPEND the writers do not use it.
    rustix::fs::fcntl_setfl(file.as_fd(), OFlags::APPEND)?;
    Ok(file)
}

fn errors_to(file: File) -> impl Subscriber {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::ERROR)
        .with_writer(Mutex::new(file))
        .with_ansi(false)
        .with_level(false)
        .with_target(false)
        .without_time()
        .log_internal_errors(false)
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_behind_an_error_is_told_in_one_line_and_once() {
        let mut captured = CapturedErrors(file().unwrap());
        assert_eq!(captured.behind("failed"), None);
        tracing::subscriber::with_default(errors_to(captured.0.try_clone().unwrap()), || {
            tracing::warn!("beside the point");
            tracing::error!(code = 22, "failed to mount {:?}", "/x");
            tracing::error!(err = "Mount(EINVAL)", "failed to prepare rootfs");
            tracing::error!("failed to initialize: failed to prepare rootfs");
        });
        let told = "failed to mount \"/x\" code=22; failed to prepare rootfs err=\"Mount(EINVAL)\"";
        assert_eq!(captured.behind("cannot create: failed to prepare rootfs").unwrap(), told);
        assert_eq!(captured.behind("failed to mount \"/x\" code=22"), None);
        assert_eq!(captured.behind("cannot create: \"/x\" code=22"), None, "the first line says it");
    }
}
