//! Both ends of a new process's standard streams.

use std::os::fd::{AsFd, OwnedFd};

use bulkhead_protocol::agent::Streams as Wanted;
use bulkhead_protocol::stdio::Stream;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::runtime::ProcessStdio;
use crate::runtime::message::WindowSize;

/// The agent's ends, by stream.
pub type AgentEnds = Vec<(Stream, OwnedFd)>;

/// Makes what the process gets and what the agent keeps. Streams that are not wanted are /dev/null; those of a terminal
/// come later, see [`terminal_ends`].
pub fn make(wanted: &Wanted) -> Result<(ProcessStdio, AgentEnds), Errno> {
    let mut ends = Vec::new();
    let mut stream = |stream: Stream, wanted: bool| -> Result<OwnedFd, Errno> {
        if !wanted {
            return open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        }
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (theirs, ours) = if stream == Stream::Stdin { (read, write) } else { (write, read) };
        ends.push((stream, ours));
        Ok(theirs)
    };
    let pipes = !wanted.terminal;
    let stdio = ProcessStdio {
        stdin: stream(Stream::Stdin, pipes && wanted.stdin)?,
        stdout: stream(Stream::Stdout, pipes && wanted.stdout)?,
        stderr: stream(Stream::Stderr, pipes && wanted.stderr)?,
        terminal: wanted.terminal.then(|| window_size(wanted.width, wanted.height)),
    };
    Ok((stdio, ends))
}

/// The agent's ends of a terminal: descriptors of its master, one for each direction that is wanted.
pub fn terminal_ends(wanted: &Wanted, master: impl AsFd) -> Result<AgentEnds, Errno> {
    [(Stream::Stdin, wanted.stdin), (Stream::Stdout, wanted.stdout)]
        .into_iter()
        .filter(|(_, wanted)| *wanted)
        .map(|(stream, _)| Ok((stream, fcntl_dupfd_cloexec(&master, 0)?)))
        .collect()
}

/// A size from the protocol; what no terminal can have becomes the largest that one can.
pub fn window_size(width: u32, height: u32) -> WindowSize {
    let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
    WindowSize { width: cells(width), height: cells(height) }
}
