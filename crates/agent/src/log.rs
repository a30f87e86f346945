//! The agent's log, which is the guest's console.

use std::io;

/// Sends the log to standard error, without times: the console's reader adds them.
pub fn to_stderr(level: tracing::Level) {
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_ansi(false)
        .without_time()
        .log_internal_errors(false)
        .try_init();
}
