//! The last step to a container's program: what it is given, and what is said where it cannot be executed.

use std::os::unix::fs::PermissionsExt;

use bulkhead_protocol::agent::PidNamespace;
use bulkhead_protocol::stdio::Stream;
use serde_json::Value;

use crate::fixture::{self, Guest, message_of, streams};

const OWN: PidNamespace = PidNamespace::PID_NAMESPACE_OWN;

/// Puts a program into a container's image.
fn install(guest: &Guest, id: &str, name: &str, bytes: &[u8]) {
    let rootfs = guest.dir().join(id).join("rootfs");
    fixture::make_rootfs(&rootfs);
    let path = rootfs.join("bin").join(name);
    std::fs::write(&path, bytes).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs a container to its end; answers its exit status, its output and its errors.
async fn run(guest: &Guest, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> (u32, String, String) {
    let spec = fixture::spec(guest, id, args, change);
    guest.create_with(id, spec, streams("oe"), OWN, "").await.unwrap();
    guest.start_container(id).await.unwrap();
    let code = guest.wait(id, "").await.unwrap().code;
    (code, guest.read(id, "", Stream::Stdout).await, guest.read(id, "", Stream::Stderr).await)
}

#[tokio::test]
async fn program_that_cannot_be_executed_is_named_in_the_log() {
    let guest = Guest::start().await;
    install(&guest, "a", "other-machine", b"\x7fELF");
    let ended = run(&guest, "a", &["/bin/other-machine"], |_| {}).await;
    assert_eq!(ended, (1, String::new(), "exec /bin/other-machine: exec format error\n".into()));
    install(&guest, "b", "script", b"#!/bin/sh\r\necho hello\r\n");
    let ended = run(&guest, "b", &["script"], |_| {}).await;
    assert_eq!(ended, (1, String::new(), "exec /bin/script: no such file or directory\n".into()));

    // Of an exec it is told to whoever wants it.
    install(&guest, "c", "other-machine", b"\x7fELF");
    guest.create("c", &["sleep", "100"], streams("")).await.unwrap();
    guest.start_container("c").await.unwrap();
    let error = message_of(guest.exec("c", "e", &["other-machine"], streams("e")).await);
    assert!(error.contains("exec /bin/other-machine: exec format error"), "{error}");
}
