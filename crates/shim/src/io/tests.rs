//! Copies between fifos and a socketpair that stands for the guest's stream.

use super::*;
use crate::host_files::HostFilesError;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn fifo(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    path
}

#[tokio::test]
async fn output_reaches_the_fifo_and_its_reader_sees_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "out");
    let mut reader = tokio::net::unix::pipe::OpenOptions::new().open_receiver(&path).unwrap();
    let (mut guest, connection) = UnixStream::pair().unwrap();
    let copy = tokio::spawn(copy::from_guest(
        connection,
        Output::open(path.to_str().unwrap()).unwrap(),
        watch::channel(false).1,
        watch::channel(Progress::default()).0,
    ));
    guest.write_all(b"hello").await.unwrap();
    drop(guest);
    let mut text = String::new();
    reader.read_to_string(&mut text).await.unwrap();
    copy.await.unwrap();
    assert_eq!(text, "hello");
}

#[tokio::test]
async fn streams_of_no_process_are_held_open_until_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "out");
    let reader = tokio::task::spawn_blocking({
        let path = path.clone();
        // As CRI-O does, which waits for a writer.
        move || std::fs::File::open(path)
    });
    let held = ProcessIo::hold(
        Deadline::begin(Operation::CreatePod),
        &Stdio { stdout: path.display().to_string(), ..Stdio::default() },
    )
    .await
    .unwrap();
    let mut reader = reader.await.unwrap().unwrap();
    rustix::io::ioctl_fionbio(&reader, true).unwrap();
    let mut text = String::new();
    assert_eq!(reader.read_to_string(&mut text).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    held.process_ended(Deadline::begin(Operation::CopyOutput), Written::default()).await;
    held.finish(Deadline::begin(Operation::DrainOutput)).await;
    assert_eq!((reader.read_to_string(&mut text).unwrap(), text.as_str()), (0, ""));
    let gone = Stdio { stderr: dir.path().join("gone").display().to_string(), ..Stdio::default() };
    assert!(matches!(ProcessIo::hold(Deadline::begin(Operation::CreatePod), &gone).await, Err(IoError::Open { .. })));
}

#[tokio::test]
async fn stdin_ends_only_after_close_and_keeps_what_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "in");
    let input = Input::open(path.to_str().unwrap()).unwrap();
    let (mut guest, connection) = UnixStream::pair().unwrap();
    let (close, closed) = watch::channel(false);
    let copy = tokio::spawn(copy::to_guest(input, connection, closed));
    for text in ["one", "two"] {
        // A writer that comes and goes, as containerd does when it restarts.
        std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let mut writer = tokio::net::unix::pipe::OpenOptions::new().open_sender(&path).unwrap();
        writer.write_all(text.as_bytes()).await.unwrap();
    }
    let mut got = [0; 6];
    guest.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"onetwo");
    close.send_replace(true);
    assert_eq!(guest.read(&mut got).await.unwrap(), 0);
    copy.await.unwrap();
}

#[tokio::test]
async fn file_uri_is_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("logs/c.log");
    let (mut guest, connection) = UnixStream::pair().unwrap();
    let output = Output::open(&format!("file://{}?x=y", path.display())).unwrap();
    guest.write_all(b"line\n").await.unwrap();
    drop(guest);
    copy::from_guest(connection, output, watch::channel(false).1, watch::channel(Progress::default()).0).await;
    let mut text = String::new();
    std::fs::File::open(path).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "line\n");
    assert!(matches!(Output::open("binary:///bin/logger"), Err(IoError::Scheme(_))));
}

#[tokio::test]
async fn fifo_that_is_gone_is_not_made_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("c-stdout").display().to_string();
    let gone = dir.path().join("fifo/c-stdout").display().to_string();
    for target in [&plain, &gone, &format!("fifo://{plain}")] {
        let refused = Output::open(target);
        assert!(matches!(&refused, Err(IoError::Open { source, .. }) if source.kind() == std::io::ErrorKind::NotFound));
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    // A file that is there is what it is.
    std::fs::write(&plain, "").unwrap();
    assert!(matches!(Output::open(&plain), Ok(Output::File(_))));
}

/// The copies of a process that has stdout alone.
fn of_stdout(connection: UnixStream, target: &Path) -> ProcessIo {
    let output = Output::open(&format!("file://{}", target.display())).unwrap();
    let mut io = ProcessIo::default();
    io.outputs = Mutex::new(vec![OutputCopy::start(Stream::Stdout, connection, output, io.ended.subscribe())]);
    io
}

const UNKNOWN: Written = Written { stdout: None, stderr: None };

#[tokio::test(start_paused = true)]
async fn a_stream_that_never_ends_is_given_up_after_its_process() {
    let dir = tempfile::tempdir().unwrap();
    let (_guest, connection) = UnixStream::pair().unwrap();
    let io = of_stdout(connection, &dir.path().join("log"));
    io.process_ended(Deadline::begin(Operation::CopyOutput), UNKNOWN).await;
    // A guest that says too much of it is waited for no longer either.
    io.process_ended(Deadline::begin(Operation::CopyOutput), Written { stdout: Some(u64::MAX), ..UNKNOWN }).await;
    io.finish(Deadline::begin(Operation::DrainOutput)).await;
}

/// As of `sh -c 'echo line; sleep 1000 &'`.
#[tokio::test(start_paused = true)]
async fn end_waits_for_what_was_written_before_and_not_for_who_still_has_the_stream() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let (mut guest, connection) = UnixStream::pair().unwrap();
    let io = of_stdout(connection, &log);
    let (begun, written) = (tokio::time::Instant::now(), Written { stdout: Some(5), ..UNKNOWN });
    let (_, sent) =
        futures::join!(io.process_ended(Deadline::begin(Operation::CopyOutput), written), guest.write_all(b"line\n"));
    sent.unwrap();
    assert_eq!((std::fs::read_to_string(&log).unwrap().as_str(), begun.elapsed()), ("line\n", Duration::ZERO));
    guest.write_all(b"later\n").await.unwrap();
    drop(guest);
    io.finish(Deadline::begin(Operation::DrainOutput)).await;
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "line\nlater\n");
}

#[test]
fn a_terminal_has_a_size_and_no_stderr() {
    let console = ConsoleSize { width: 91, height: 23 };
    let stdio = Stdio { stdin: "i".into(), stdout: "o".into(), stderr: "e".into(), terminal: true, console };
    let streams = stdio.streams();
    assert!(streams.terminal && streams.stdin && streams.stdout && !streams.stderr);
    assert_eq!((streams.width, streams.height), (91, 23));
}

/// A shim that did not run for a while finds the silence over and bytes in the stream at once: the bytes come first.
#[tokio::test(start_paused = true)]
async fn output_that_came_while_nobody_looked_is_not_taken_for_silence() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..32 {
        let path = dir.path().join(round.to_string());
        let (mut guest, connection) = UnixStream::pair().unwrap();
        let io = of_stdout(connection, &path);
        let mut ended = std::pin::pin!(io.process_ended(Deadline::begin(Operation::CopyOutput), UNKNOWN));
        assert!(futures::poll!(&mut ended).is_pending());
        guest.write_all(b"line\n").await.unwrap();
        drop(guest);
        tokio::time::advance(Duration::from_secs(10)).await;
        ended.await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "line\n", "round {round}");
    }
}

/// As of a disk that hangs: open(2) of a fifo waits for its reader, and write(2) for room.
#[tokio::test]
async fn regular_file_that_hangs_holds_up_nobody_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "log");
    let stdio = Stdio { stdout: format!("file://{}", path.display()), ..Stdio::default() };
    tokio::time::pause();
    let opened = ProcessIo::hold(Deadline::begin(Operation::CreatePod), &stdio).await;
    assert!(matches!(opened, Err(IoError::HostFiles(HostFilesError::Hung(_)))), "{opened:?}");
    tokio::time::resume();
    let mut reader = tokio::net::unix::pipe::OpenOptions::new().open_receiver(&path).unwrap();

    let (mut guest, connection) = UnixStream::pair().unwrap();
    let output = Output::open(&stdio.stdout).unwrap();
    let copy = tokio::spawn(copy::from_guest(
        connection,
        output,
        watch::channel(false).1,
        watch::channel(Progress::default()).0,
    ));
    let sent = vec![7; 1 << 20];
    let sending = tokio::spawn(async move { guest.write_all(&sent).await });
    // More than fits into the fifo: this returns only if the copy does not hold up the thread.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!copy.is_finished() && !sending.is_finished());
    let mut got = Vec::new();
    reader.read_to_end(&mut got).await.unwrap();
    sending.await.unwrap().unwrap();
    copy.await.unwrap();
    assert_eq!(got.len(), 1 << 20);
}
