//! One test with processes only: the reaper takes every child of the process it runs in, so two at a time would steal from
//! each other.

use std::process::{Command, Stdio};

use tokio::signal::unix::{SignalKind, signal};

use super::*;

#[tokio::test]
async fn ends_reach_their_owners_however_early_they_come() {
    let reaper = Arc::new(Reaper::default());
    let birth = reaper.expect();
    let early = Command::new("true").stdin(Stdio::null()).spawn().unwrap().id();
    let running = tokio::spawn(Arc::clone(&reaper).run(signal(SignalKind::child()).unwrap()));

    let failing = birth.claim(Command::new("false").spawn().unwrap().id()).wait().await;
    assert_eq!(failing.code, 1);
    // The first child ended before or during the wait for the second: its end was kept.
    assert_eq!(birth.claim(early).wait().await.code, 0);

    let pid = Command::new("sleep").arg("60").spawn().unwrap().id();
    let mut sleeping = birth.claim(pid);
    assert!(!sleeping.ended());
    assert!(reaper.kill(pid, 9).unwrap());
    assert_eq!(sleeping.wait().await.code, 137);
    assert!(!reaper.kill(pid, 9).unwrap(), "an ended process is not signalled");
    drop(birth);
    assert!(reaper.table().unclaimed.is_empty());
    running.abort();
}

#[test]
fn end_before_a_birth_is_not_that_of_its_child() {
    let reaper = Arc::new(Reaper::default());
    let exit = Exit { code: 7 };
    let before = reaper.expect();
    reaper.table().keep(1000, exit);
    let after = reaper.expect();
    assert!(!after.claim(1000).ended(), "the pid is another process's by now");
    assert!(before.claim(1000).ended());
    // Of several at a time it may be anyone's.
    reaper.table().keep(1001, exit);
    assert!(before.claim(1001).ended());
    assert!(!after.claim(1001).ended(), "an end is told once");
}
