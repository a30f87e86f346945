//! Standard streams: containerd's fifos on one side, a vsock connection for each stream on the other (ARCHITECTURE.md, D8).
//!
//! Bytes are copied with backpressure: a reader that does not read stops the writer in the guest. A fifo is opened for
//! reading and writing at once where the contract asks for it, so that neither open blocks nor a restart of containerd
//! breaks the stream (containerd: cmd/containerd-shim-runc-v2/process/io.go does the same with two descriptors).

mod copy;
mod error;
mod target;

use std::sync::{Mutex, PoisonError};

use bulkhead_protocol::agent::Streams;
use bulkhead_protocol::stdio::{ACCEPTED, Stream, StreamHeader, encode};
use futures::future::join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::about;
use crate::deadlines::{Deadline, Operation};
use crate::host_files;
use crate::sandbox::agent::{Agent, ProcessKey};
use crate::spec::ConsoleSize;
use copy::Progress;
pub use error::IoError;
use target::{Input, Output};

/// Where a process's streams are, as containerd says.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Stdio {
    /// Path, or empty for none.
    pub stdin: String,
    /// Path or URI, or empty for none.
    pub stdout: String,
    /// Path or URI, or empty for none.
    pub stderr: String,
    /// Whether the process has a terminal, whose output is stdout.
    pub terminal: bool,
    /// How large the terminal is at first. Not of containerd's words about streams but of the process's spec.
    pub console: ConsoleSize,
}

impl Stdio {
    /// The same for the agent.
    pub fn streams(&self) -> Streams {
        Streams {
            terminal: self.terminal,
            stdin: !self.stdin.is_empty(),
            stdout: !self.stdout.is_empty(),
            stderr: !self.stderr.is_empty() && !self.terminal,
            width: self.console.width,
            height: self.console.height,
            ..Streams::default()
        }
    }
}

/// How much had been written to a process's streams when it ended, where that is known.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Written {
    /// Bytes of stdout.
    pub stdout: Option<u64>,
    /// Bytes of stderr.
    pub stderr: Option<u64>,
}

impl Written {
    fn of(self, stream: Stream) -> Option<u64> {
        match stream {
            Stream::Stdin => None,
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }
}

/// The host's ends of a process's streams.
#[derive(Debug)]
struct Ends {
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
}

impl Ends {
    /// Opens them on a thread: what is no fifo is a file, on whatever disk.
    async fn open(deadline: Deadline, stdio: &Stdio) -> Result<Self, IoError> {
        let (stdio, streams) = (stdio.clone(), stdio.streams());
        let any = streams.stdin || streams.stdout || streams.stderr;
        let open = move || {
            let output = |wanted: bool, target| wanted.then(|| Output::open(target)).transpose();
            Ok(Self {
                stdout: output(streams.stdout, &stdio.stdout)?,
                stderr: output(streams.stderr, &stdio.stderr)?,
                stdin: streams.stdin.then(|| Input::open(&stdio.stdin)).transpose()?,
            })
        };
        if any { host_files::STREAMS.run(deadline, open).await? } else { open() }
    }
}

/// One stream that is copied from the guest.
#[derive(Debug)]
struct OutputCopy {
    stream: Stream,
    /// Closed at the end.
    progress: watch::Receiver<Progress>,
    task: JoinHandle<()>,
}

impl OutputCopy {
    fn start(stream: Stream, connection: UnixStream, output: Output, ended: watch::Receiver<bool>) -> Self {
        let (progress, follow) = watch::channel(Progress::default());
        let task = about::spawn(copy::from_guest(connection, output, ended, progress));
        Self { stream, progress: follow, task }
    }
}

/// The running copies of one process.
#[derive(Debug, Default)]
pub struct ProcessIo {
    /// Set to close stdin when what is in it has been read.
    close_stdin: Option<watch::Sender<bool>>,
    /// Set when the process has ended.
    ended: watch::Sender<bool>,
    input: Mutex<Option<JoinHandle<()>>>,
    outputs: Mutex<Vec<OutputCopy>>,
    /// Of what has no process: held for whoever waits at the other ends.
    held: Mutex<(Option<Input>, Vec<Output>)>,
}

impl ProcessIo {
    /// Opens the streams of a pod's own container, in which nothing runs. CRI-O names some, and opens its ends for as long as
    /// nobody opens these.
    pub async fn hold(deadline: Deadline, stdio: &Stdio) -> Result<Self, IoError> {
        let Ends { stdin, stdout, stderr } = Ends::open(deadline, stdio).await?;
        let mut io = Self::default();
        io.held = Mutex::new((stdin, [stdout, stderr].into_iter().flatten().collect()));
        Ok(io)
    }

    /// Connects the streams of a process that exists in the guest.
    pub async fn connect(deadline: Deadline, agent: &Agent, key: &ProcessKey, stdio: &Stdio) -> Result<Self, IoError> {
        let deadline = deadline.part(Operation::ConnectStreams);
        let mut io = Self::default();
        // Everything is opened and connected before the first byte is copied: a failure leaves nothing running.
        let Ends { stdin, stdout, stderr } = Ends::open(deadline, stdio).await?;
        let mut outputs = Vec::new();
        for (stream, output) in [(Stream::Stdout, stdout), (Stream::Stderr, stderr)] {
            if let Some(output) = output {
                outputs.push((stream, connect_stream(deadline, agent, key, stream).await?, output));
            }
        }
        if let Some(input) = stdin {
            let connection = connect_stream(deadline, agent, key, Stream::Stdin).await?;
            let (close, closed) = watch::channel(false);
            io.close_stdin = Some(close);
            io.input = Mutex::new(Some(about::spawn(copy::to_guest(input, connection, closed))));
        }
        let copies = outputs
            .into_iter()
            .map(|(stream, connection, output)| OutputCopy::start(stream, connection, output, io.ended.subscribe()));
        io.outputs = Mutex::new(copies.collect());
        Ok(io)
    }

    /// The process has ended: returns when what had been written then has been copied, or the guest falls silent or has had
    /// its time. Before that the end must not be told: containerd 1.6 closes its fifos upon it. What others write later, who
    /// have the streams from the process, goes on to be copied until [`Self::finish`].
    pub async fn process_ended(&self, deadline: Deadline, written: Written) {
        self.ended.send_replace(true);
        let followed: Vec<_> = {
            let outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
            outputs.iter().map(|output| all_copied(output.progress.clone(), written.of(output.stream))).collect()
        };
        if let Err(waited) = deadline.timeout(join_all(followed)).await {
            tracing::warn!(
                "a process has ended and its output still comes after {waited:?}; reporting the end, the rest is copied until the process is deleted"
            );
        }
    }

    /// containerd has closed stdin: what is in the fifo still goes to the process, then its stdin ends.
    pub fn close_stdin(&self) {
        if let Some(close) = &self.close_stdin {
            close.send_replace(true);
        }
    }

    /// Ends the copies: output is drained, in bounded time, and the fifos are closed.
    pub async fn finish(&self, deadline: Deadline) {
        drop(take(&self.held));
        if let Some(input) = take(&self.input) {
            input.abort();
        }
        let outputs = take(&self.outputs);
        let aborts: Vec<_> = outputs.iter().map(|output| output.task.abort_handle()).collect();
        let drained = join_all(outputs.into_iter().map(|output| output.task));
        if let Err(waited) = deadline.timeout(drained).await {
            tracing::info!("output did not end within {waited:?}, closing it");
            aborts.iter().for_each(tokio::task::AbortHandle::abort);
        }
    }
}

fn take<T: Default>(slot: &Mutex<T>) -> T {
    slot.lock().map(|mut value| std::mem::take(&mut *value)).unwrap_or_default()
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        if let Some(input) = take(&self.input) {
            input.abort();
        }
        take(&self.outputs).iter().for_each(|output| output.task.abort());
    }
}

/// Returns when as much of a stream has been copied as there was to copy, or nothing comes any more.
async fn all_copied(mut progress: watch::Receiver<Progress>, written: Option<u64>) {
    let enough = |progress: &Progress| progress.silent || written.is_some_and(|written| progress.bytes >= written);
    // An error is the end of the stream.
    let _ = progress.wait_for(enough).await;
}

async fn connect_stream(
    deadline: Deadline,
    agent: &Agent,
    key: &ProcessKey,
    stream: Stream,
) -> Result<UnixStream, IoError> {
    let header = StreamHeader { container_id: key.container.clone(), exec_id: key.exec.clone(), stream };
    let bytes = encode(&header).map_err(IoError::Header)?;
    let mut connection = agent.stream(deadline).await?;
    let handshake = async {
        connection.write_all(&bytes).await?;
        connection.read_u8().await
    };
    match deadline.part(Operation::StreamHandshake).timeout(handshake).await {
        Ok(Ok(ACCEPTED)) => Ok(connection),
        Ok(Ok(_)) => Err(IoError::Refused(stream)),
        Ok(Err(source)) => Err(IoError::Handshake(source)),
        Err(_) => Err(IoError::Handshake(std::io::ErrorKind::TimedOut.into())),
    }
}

#[cfg(test)]
mod tests;
