//! The daemon's log: the bundle's `log` fifo, which containerd copies to its own (containerd: core/runtime/v2/README.md).
//!
//! The lines of all pods come together there, so each says whose it is: the pod by its name and its sandbox's id, and the
//! container and exec that it is about, by the span that [`crate::about`] opens.
//!
//! The fifo is opened for reading too, so that writing neither blocks on open nor fails while containerd restarts; when
//! it is full, lines are dropped: a log must not hold up a pod.

use std::fmt;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::about;

/// Sends tracing's output to the fifo. Without a fifo (a hand-made bundle) there is no log.
pub fn init(bundle: &Path, sandbox: &str, debug: bool) {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(fifo) = rustix::fs::open(bundle.join("log"), flags, Mode::empty()) else { return };
    let level = if debug { tracing::Level::DEBUG } else { tracing::Level::INFO };
    let _ = tracing::subscriber::set_global_default(lines(sandbox, level, Fifo(Arc::new(fifo))));
}

fn lines<W>(sandbox: &str, level: tracing::Level, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let format = Lines { sandbox: sandbox.to_owned() };
    tracing_subscriber::fmt().with_max_level(level).with_ansi(false).event_format(format).with_writer(writer).finish()
}

/// `time level module: pod=namespace/name sandbox=id container=id exec=id: what`, as far as there are such.
struct Lines {
    sandbox: String,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        SystemTime.format_time(&mut line)?;
        write!(line, " {:>5} {}:", event.metadata().level(), event.metadata().target())?;
        if let Some(name) = about::pod_name() {
            write!(line, " pod={name}")?;
        }
        write!(line, " sandbox={}", self.sandbox)?;
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>()
                && !fields.is_empty()
            {
                write!(line, " {fields}")?;
            }
        }
        write!(line, ": ")?;
        context.format_fields(line.by_ref(), event)?;
        writeln!(line)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_says_whose_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let subscriber = lines("s1", tracing::Level::INFO, Arc::new(file.reopen().unwrap()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(code = 7, "of the pod");
            let span = about::process("c1", "");
            let _entered = span.enter();
            tracing::info!("of a container");
            about::process("c1", "e1").in_scope(|| tracing::warn!("of an exec"));
        });
        let text = std::fs::read_to_string(file.path()).unwrap();
        let ends: Vec<_> = text.lines().filter_map(|line| line.split_once("logging::tests: ")).collect();
        let ends: Vec<_> = ends.iter().map(|(_, end)| *end).collect();
        let expected = [
            "sandbox=s1: of the pod code=7",
            "sandbox=s1 container=c1: of a container",
            "sandbox=s1 container=c1 exec=e1: of an exec",
        ];
        assert_eq!(ends, expected, "{text}");
    }
}
