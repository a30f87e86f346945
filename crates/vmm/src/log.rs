//! Lines to standard error, which the shim puts into its log.

use std::error::Error;
use std::fmt;
use std::io::Write;

/// Writes a line, if there is room for it.
///
/// Standard error is a non-blocking pipe that nobody may be reading. What finds no room there is lost: `eprintln!` would
/// panic, which is the end of the VM, and to wait would stop a vCPU or a device.
pub fn line(text: fmt::Arguments<'_>) {
    // At once: so much is written to a pipe as a whole or not at all (pipe(7), PIPE_BUF).
    let line = format!("bulkhead-vmm: {text}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Logs something that the guest cannot cause again and again; for anything else there is
/// [`guest_log`](crate::guest_log).
#[macro_export]
macro_rules! vmm_log {
    ($($arg:tt)*) => { $crate::log::line(format_args!($($arg)*)) };
}

/// An error and what caused it, in one line.
pub fn describe(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::{Command, Stdio};

    #[test]
    #[ignore = "the next test runs it, in a process of its own"]
    fn lines_without_room() {
        crate::vmm_log!("lost");
        crate::guest_log!("lost");
    }

    #[test]
    fn hostile_14_line_without_room_in_the_log_is_lost_and_ends_nothing() {
        let (reader, mut full) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&full, true).unwrap();
        while std::io::Write::write(&mut full, &[b'x'; 4096]).is_ok() {}
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "log::tests::lines_without_room", "--ignored", "--nocapture"]);
        let output = command.stdout(Stdio::piped()).stderr(full).spawn().unwrap().wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        drop(reader);
    }

    #[test]
    fn nothing_that_runs_beside_a_guest_panics_for_a_line() {
        let mut left = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        let mut seen = 0;
        // The developer's mode, and this file.
        let excepted = ["run.rs", "log.rs"];
        while let Some(path) = left.pop() {
            if path.is_dir() {
                left.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
            } else if !excepted.contains(&path.file_name().unwrap().to_str().unwrap()) {
                assert!(!std::fs::read_to_string(&path).unwrap().contains("eprint"), "{path:?}");
                seen += 1;
            }
        }
        assert!(seen > 50);
    }
}
