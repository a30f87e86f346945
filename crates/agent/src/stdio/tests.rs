use std::io::Read;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::copy;
use super::*;

fn owner(exec_id: &str) -> Owner {
    Owner { container_id: "c".into(), exec_id: exec_id.into() }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

#[test]
fn stream_is_attached_once() {
    let streams = Streams::default();
    streams.add(owner(""), [(Stream::Stdout, pipe().0)]);
    assert!(streams.attach(&owner(""), Stream::Stderr).is_none());
    assert!(streams.attach(&owner("x"), Stream::Stdout).is_none());
    let attached = streams.attach(&owner(""), Stream::Stdout);
    assert!(attached.is_some());
    assert!(streams.attach(&owner(""), Stream::Stdout).is_none());
}

#[test]
fn removing_a_container_ends_the_streams_of_all_its_processes() {
    let streams = Streams::default();
    streams.add(owner(""), [(Stream::Stdout, pipe().0)]);
    streams.add(owner("x"), [(Stream::Stdin, pipe().1)]);
    let mut attached = streams.attach(&owner("x"), Stream::Stdin).unwrap();
    assert!(attached.closed.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty));
    streams.remove_container("c");
    assert!(attached.closed.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Closed));
    assert!(streams.attach(&owner(""), Stream::Stdout).is_none());
}

#[tokio::test]
async fn output_is_copied_to_its_end_and_half_closed() {
    let (read, write) = pipe();
    let (ours, mut host) = tokio::net::UnixStream::pair().unwrap();
    rustix::io::write(&write, b"hello").unwrap();
    let copying = tokio::spawn(copy::output(Output::new(read), ours));
    let mut got = [0; 5];
    host.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"hello");
    drop(write);
    assert_eq!(host.read(&mut got).await.unwrap(), 0);
    copying.await.unwrap().unwrap();
}

/// What had been written can be told at any time, whoever has read how much of it.
#[tokio::test]
async fn output_is_metered_in_the_pipe_and_beyond_it_but_a_terminal_is_not() {
    let streams = Streams::default();
    let (read, write) = pipe();
    let master = rustix::pty::openpt(rustix::pty::OpenptFlags::RDWR | rustix::pty::OpenptFlags::NOCTTY).unwrap();
    streams.add(owner("x"), [(Stream::Stdout, read), (Stream::Stderr, master)]);
    let written = || streams.written(&owner("x"), Stream::Stdout);
    rustix::io::write(&write, b"hello").unwrap();
    assert_eq!((written(), streams.written(&owner("x"), Stream::Stderr)), (Some(5), None));
    let attached = streams.attach(&owner("x"), Stream::Stdout).unwrap();
    let End::Output(output) = attached.end else { panic!("stdout is output") };
    let (ours, mut host) = tokio::net::UnixStream::pair().unwrap();
    let copying = tokio::spawn(copy::output(output, ours));
    let mut got = [0; 5];
    host.read_exact(&mut got).await.unwrap();
    rustix::io::write(&write, b"more").unwrap();
    assert_eq!(written(), Some(9));
    drop(write);
    copying.await.unwrap().unwrap();
    assert_eq!((written(), streams.written(&owner("y"), Stream::Stdout)), (Some(9), None));
}

#[tokio::test]
async fn input_is_copied_and_its_end_closes_the_pipe() {
    let (read, write) = pipe();
    let (ours, mut host) = tokio::net::UnixStream::pair().unwrap();
    let copying = tokio::spawn(copy::input(ours, write));
    // More than a pipe holds, so that the copy has to wait for the reader.
    let sent = vec![7; 300_000];
    let reader = tokio::task::spawn_blocking(move || {
        let mut got = Vec::new();
        std::fs::File::from(read).read_to_end(&mut got).unwrap();
        got
    });
    host.write_all(&sent).await.unwrap();
    host.shutdown().await.unwrap();
    assert_eq!(reader.await.unwrap(), sent);
    copying.await.unwrap().unwrap();
}

#[tokio::test]
async fn input_whose_reader_is_gone_ends() {
    crate::sys::ignore_sigpipe();
    let (read, write) = pipe();
    drop(read);
    let (ours, mut host) = tokio::net::UnixStream::pair().unwrap();
    host.write_all(b"x").await.unwrap();
    assert!(copy::input(ours, write).await.is_err());
}
