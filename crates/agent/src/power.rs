//! The guest's end: PID 1 must not return, and must not leave a machine behind that nobody answers for.
//!
//! A reboot is how a guest ends itself (reboot(2)); the VMM exits on it.

use std::convert::Infallible;
use std::error::Error;
use std::fmt::Display;
use std::io::Write;

use bulkhead_protocol::error::chain;
use rustix::system::{RebootCommand, reboot};

/// Runs init. Whatever ends it, a panic included, is printed on the console and reboots the guest.
pub fn reboot_after<E: Error>(init: fn() -> Result<Infallible, E>) -> Result<Infallible, std::io::Error> {
    std::panic::set_hook(Box::new(|panic| {
        say(&panic);
        let _ = restart();
    }));
    let Err(error) = init();
    say(&chain(&error));
    restart()
}

/// Reboots at once. Returns only if the kernel refuses.
pub fn restart() -> std::io::Result<Infallible> {
    rustix::fs::sync();
    reboot(RebootCommand::Restart)?;
    // The kernel does not return from it.
    Err(std::io::ErrorKind::Unsupported.into())
}

/// Prints on the console. Unlike `eprintln!` it does not panic where there is none.
fn say(what: &dyn Display) {
    let _ = writeln!(std::io::stderr(), "bulkhead-agent: {what}");
}
