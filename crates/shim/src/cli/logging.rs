//! The daemon's log: the bundle's `log` fifo, which containerd copies to its own (containerd: core/runtime/v2/README.md).
//!
//! The fifo is opened for reading too, so that writing neither blocks on open nor fails while containerd restarts; when
//! it is full, lines are dropped: a log must not hold up a pod.

use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use tracing_subscriber::fmt::MakeWriter;

/// Sends tracing's output to the fifo. Without a fifo (CRI-O, a hand-made bundle) there is no log.
pub fn init(bundle: &Path, debug: bool) {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(fifo) = rustix::fs::open(bundle.join("log"), flags, Mode::empty()) else { return };
    let level = if debug { tracing::Level::DEBUG } else { tracing::Level::INFO };
    let subscriber =
        tracing_subscriber::fmt().with_max_level(level).with_ansi(false).with_writer(Fifo(Arc::new(fifo))).finish();
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// A writer that drops what does not fit.
#[derive(Clone)]
struct Fifo(Arc<OwnedFd>);

impl Write for Fifo {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match rustix::io::write(&*self.0, bytes) {
            Ok(_) => Ok(bytes.len()),
            Err(error) if std::io::Error::from(error).kind() == ErrorKind::WouldBlock => Ok(bytes.len()),
            Err(error) => Err(error.into()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Fifo {
    type Writer = Self;

    fn make_writer(&'a self) -> Self::Writer {
        self.clone()
    }
}
