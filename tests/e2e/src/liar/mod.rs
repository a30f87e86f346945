//! A VMM with a guest in one, neither of which is to be trusted (docs/negative-tests.md, 21).
//!
//! It answers the control socket and, as the guest's agent, the RPC and stream connections: honestly, but for the lies that
//! its script names. The script is the kernel parameter `liar=WHERE:WHAT,...`, which the operator's configuration sets:
//! `WHERE` is a method of the agent's, `Boot`, `AddDevice`, `connect-PORT`, `stdout` or `stdin`, and `WHAT` one of the lies of [`rpc`], [`control`] and
//! [`stream`]. Nothing is booted, so a pod is there in milliseconds. Threads and blocking calls throughout: a lie may hang.

mod control;
mod guest;
mod jail;
mod rpc;
mod stream;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};

use anyhow::{Context, Result, bail};
use bulkhead_protocol::control::{self as socket, Command, Reply, Request};
use bulkhead_protocol::guest::{AGENT_RPC_PORT, AGENT_STDIO_PORT};
use bulkhead_protocol::vmspec::DeviceSpec;

use guest::{Guest, forever};

/// The kernel parameter.
const PARAMETER: &str = "liar=";

/// Serves to the end of the control socket.
pub fn run() -> Result<()> {
    let control = std::io::stdin().as_fd().try_clone_to_owned()?;
    let (request, mut fds) = socket::receive::<Request>(&control)?.context("nothing was asked")?;
    let Command::Boot(spec) = request.command else { bail!("the machine is not booted first") };
    let cmdline = spec.cmdline.clone();
    let script = spec.cmdline.split(' ').find_map(|parameter| parameter.strip_prefix(PARAMETER)).unwrap_or_default();
    let script = script.split(',').filter_map(|lie| lie.split_once(':')).map(|(at, what)| (at.into(), what.into()));
    let console = spec.devices.iter().find_map(|device| match device {
        DeviceSpec::Console { output } => Some(output.0),
        _ => None,
    });
    if let Some(root) = spec.devices.iter().find_map(|device| match device {
        DeviceSpec::Fs { root, .. } => fds.get(root.0),
        _ => None,
    }) {
        jail::enter(root).context("cannot lock itself in")?;
    }
    let guest = Arc::new(Guest {
        control,
        script: script.collect(),
        cmdline,
        console: console.filter(|index| *index < fds.len()).map(|index| fds.swap_remove(index)),
        processes: Mutex::default(),
        changed: Condvar::new(),
    });
    drop(fds);
    if control::strike(&guest, "Boot")? {
        guest.reply(&Reply::Done { id: request.id })?;
        guest.reply(&Reply::GuestReady)?;
    }
    while let Some((request, fds)) = socket::receive::<Request>(&guest.control)? {
        obey(&guest, request, fds)?;
    }
    // A lie may have closed the socket, to stay.
    if guest.script.iter().any(|(_, what)| what == "vmm-closed") {
        forever();
    }
    Ok(())
}

fn obey(guest: &Arc<Guest>, request: Request, mut fds: Vec<OwnedFd>) -> Result<()> {
    let id = request.id;
    match request.command {
        Command::Boot(_) => bail!("the machine is booted twice"),
        Command::AddDevice(_) if !control::strike(guest, "AddDevice")? => Ok(()),
        Command::AddDevice(_) => guest.reply(&Reply::Added { id, slot: 9 }),
        Command::RemoveDevice { .. } => guest.reply(&Reply::Done { id }),
        Command::ResizeMemory { mib } => guest.reply(&Reply::Resized { id, mib }),
        Command::Counters => guest.reply(&Reply::Counters { id, devices: Vec::new() }),
        Command::ConnectVsock { port } => {
            let connection = UnixStream::from(fds.pop().context("a connection without a descriptor")?);
            if !control::strike(guest, &format!("connect-{port}"))? {
                return Ok(());
            }
            guest.reply(&Reply::Done { id })?;
            let guest = guest.clone();
            std::thread::spawn(move || match port {
                AGENT_RPC_PORT => rpc::serve(&guest, connection),
                AGENT_STDIO_PORT => stream::serve(&guest, connection),
                _ => Ok(()),
            });
            Ok(())
        }
    }
}
