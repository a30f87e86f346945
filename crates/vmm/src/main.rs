//! `bulkhead-vmm`: with `--control-fd` a shim's machine, with `run` a developer's.

mod args;
mod run;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

use anyhow::{Context, bail};
use bulkhead_protocol::control::ExitReason;
use bulkhead_vmm::control::{self, End};
use bulkhead_vmm::jail::Kind;
use clap::Parser;

use args::{Args, Mode};

fn main() -> ExitCode {
    end_process_on_panic();
    match start(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            bulkhead_vmm::vmm_log!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: Args) -> anyhow::Result<()> {
    match (args.control_fd, args.mode) {
        (Some(fd), None) => match control::serve(inherited(fd)?)? {
            End::Guest(reason) => finish(reason),
            End::Closed => Ok(()),
        },
        (None, Some(Mode::Run(options))) => finish(run::run(&options)?),
        (None, Some(Mode::Filters)) => {
            print_filters();
            Ok(())
        }
        _ => bail!("give either --control-fd, or a command: `run` or `filters`"),
    }
}

fn print_filters() {
    for kind in Kind::ALL {
        let calls = kind.calls();
        println!("{} {} {}", kind.name(), calls.len(), calls.join(" "));
    }
}

/// An orderly end of the guest is success.
fn finish(reason: ExitReason) -> anyhow::Result<()> {
    match reason {
        ExitReason::Reset => Ok(()),
        ExitReason::NoTask => bail!("{}", ExitReason::NO_TASK),
        ExitReason::MemoryGone => bail!("{}", ExitReason::MEMORY_GONE),
        ExitReason::VcpuFault => bail!("a vCPU met something that KVM cannot go on from, see above"),
    }
}

/// Takes over a descriptor that the parent process has left open for us, and closes all others but the standard ones: what
/// the parent has inherited itself, or forgotten, is no business of a guest's.
fn inherited(fd: RawFd) -> anyhow::Result<OwnedFd> {
    #![allow(unsafe_code)] // a number becomes an owned descriptor
    if matches!(fd, 1 | 2) {
        bail!("--control-fd {fd} is the standard output or error; stdin may be it");
    }
    // SAFETY: this is the first thing that the process does with descriptors, so nothing else owns it; that it is open is
    // checked before it is used.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Err(error) = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC) {
        std::mem::forget(fd);
        return Err(error).context("the descriptor given with --control-fd is not open");
    }
    let number = u32::try_from(fd.as_raw_fd()).unwrap_or(0);
    for (first, last) in [(3, number.saturating_sub(1)), (number.max(2) + 1, u32::MAX)] {
        // SAFETY: as above, nothing in the process owns a descriptor yet but `fd`, which is in neither range.
        if first <= last && unsafe { libc::close_range(first, last, 0) } != 0 {
            return Err(std::io::Error::last_os_error()).context("cannot close the descriptors of the parent process");
        }
    }
    Ok(fd)
}

/// A thread that panics must not leave a machine behind that half works.
fn end_process_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
}
