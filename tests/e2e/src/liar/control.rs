//! Lies of the VMM, on its control socket and its pipes.

use std::io::IoSlice;
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::{Result, bail};
use bulkhead_protocol::control::{self as socket, ExitReason, Reply};
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, sendmsg, shutdown, sockopt};

use super::guest::Guest;

/// Tells the lies of the VMM that a place has; answers whether the honest answer follows.
pub(super) fn strike(guest: &Arc<Guest>, place: &str) -> Result<bool> {
    let mut honest = true;
    let own = place == "Boot" || place == "AddDevice" || place.starts_with("connect");
    for lie in guest.lies(place).filter(|lie| own || lie.starts_with("vmm-")) {
        honest &= tell(guest, lie)?;
    }
    Ok(honest)
}

fn tell(guest: &Arc<Guest>, lie: &str) -> Result<bool> {
    let guest = guest.clone();
    let endless = |mut step: Box<dyn FnMut(u64) -> Result<()> + Send>| {
        std::thread::spawn(move || {
            let mut number = 1_000_000;
            while step(number).is_ok() {
                number += 1;
            }
        });
        Ok(true)
    };
    let failed = |id, length: usize| Reply::Failed { id, message: "\u{1b}[2J\nlie ".repeat(length / 12) };
    match lie {
        "exit" => std::process::exit(1),
        "silent" => Ok(false),
        // Not a lie: what it was asked to boot.
        "tell" => guest.reply(&Reply::Failed { id: 0, message: guest.cmdline.clone() }).map(|()| false),
        // Answers to what was never asked, as fast as they are read.
        "vmm-replies" => endless(Box::new(move |id| guest.reply(&Reply::Done { id }))),
        "vmm-failures" => endless(Box::new(move |id| guest.reply(&failed(id, 8000)))),
        "vmm-exits" => endless(Box::new(move |_| guest.reply(&Reply::GuestExited { reason: ExitReason::Reset }))),
        "vmm-ready" => endless(Box::new(move |_| guest.reply(&Reply::GuestReady))),
        // Descriptors that nobody asked for: the shim must not keep them.
        "vmm-fds" => endless(Box::new(move |id| {
            let file = rustix::fs::memfd_create("lie", rustix::fs::MemfdFlags::CLOEXEC)?;
            Ok(socket::send(&guest.control, &Reply::Done { id }, &vec![file.as_fd(); socket::MAX_FDS])?)
        })),
        "vmm-stderr" => endless(Box::new(|id| {
            let text = format!("{id} \u{1b}[2J is a line of the VMM's\n").repeat(100);
            rustix::io::write(std::io::stderr(), text.as_bytes())?;
            Ok(())
        })),
        "vmm-console" => {
            endless(Box::new(move |_| match &guest.console {
                // A line that never ends. The pipe does not block: what does not fit is dropped, as the console's device does.
                Some(console) => match rustix::io::write(console, &[b'x'; 4096]) {
                    Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
                    Err(error) => Err(error.into()),
                },
                None => bail!("no console"),
            }))
        }
        // The guest has ended, the process stays.
        "vmm-exited" => guest.reply(&Reply::GuestExited { reason: ExitReason::Reset }).map(|()| true),
        "vmm-closed" => {
            shutdown(&guest.control, Shutdown::Both)?;
            Ok(false)
        }
        "vmm-refuses" => guest.reply(&failed(0, 60_000)).map(|()| false),
        "vmm-huge" => raw(&guest, &vec![b'{'; 1 << 20]).map(|()| false),
        "vmm-nonsense" => raw(&guest, b"{\"done\":{\"id\":-1}}").map(|()| false),
        "vmm-deep" => raw(&guest, &vec![b'['; 60_000]).map(|()| false),
        other => bail!("there is no lie {other:?}"),
    }
}

/// A packet that is no message of the protocol.
fn raw(guest: &Guest, bytes: &[u8]) -> Result<()> {
    // Beyond what any user may set: it runs as root.
    sockopt::set_socket_send_buffer_size_force(&guest.control, 4 << 20)?;
    sendmsg(&guest.control, &[IoSlice::new(bytes)], &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)?;
    Ok(())
}
