//! That the table holds what it promises, that ARCHITECTURE.md tells it, and that deadlines keep to it.

use std::collections::HashSet;
use std::path::Path;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

/// Between these ARCHITECTURE.md has the table.
const MARKERS: [&str; 2] = ["<!-- deadlines: begin -->", "<!-- deadlines: end -->"];

#[test]
fn every_row_has_a_name_of_its_own_and_a_reason() {
    let mut names = HashSet::new();
    for operation in Operation::ALL {
        let Row { name, reason, budget, .. } = operation.row();
        assert!(!name.is_empty() && names.insert(name), "{operation:?} has no name of its own");
        assert!(reason.ends_with('.') && reason.len() > 10, "{operation:?} has no reason");
        assert!(!budget.is_zero(), "{operation:?} has no time");
    }
}

#[test]
fn parts_that_come_one_after_the_other_fit_their_operation() {
    for operation in Operation::ALL {
        for way in operation.row().ways {
            let sum: Duration = way.iter().map(|part| part.budget()).sum();
            assert!(sum <= operation.budget(), "{operation:?}: {way:?} take {sum:?}");
        }
    }
}

#[test]
fn part_says_what_it_is_a_part_of_and_is_no_longer_than_that() {
    for operation in Operation::ALL {
        for part in operation.row().ways.iter().copied().flatten() {
            if let Scope::Part(of) = part.row().scope {
                assert!(of.contains(operation), "{part:?} does not say that it is a part of {operation:?}");
            }
            assert!(!matches!(part.row().scope, Scope::Call(_)), "{part:?} is a call");
        }
        if let Scope::Part(of) = operation.row().scope {
            assert!(!of.is_empty(), "{operation:?} is a part of nothing");
            for whole in of {
                assert!(operation.budget() <= whole.budget(), "{operation:?} is longer than {whole:?}");
            }
        }
    }
}

#[test]
fn call_fits_what_its_caller_gives_also_in_a_pod_that_is_throttled() {
    for operation in Operation::ALL {
        let Row { budget, clock, scope: Scope::Call(caller), .. } = operation.row() else { continue };
        let Some(given) = caller.gives() else { continue };
        assert!(budget <= given, "{operation:?} takes {budget:?}, and {caller:?} waits {given:?}");
        let longest = longest(budget, clock);
        assert!(longest <= given, "{operation:?} takes {longest:?} in a throttled pod, and {caller:?} waits {given:?}");
    }
    let kubelet = Caller::Kubelet.gives().unwrap();
    assert!(LONGEST + Operation::KillVmm.budget() <= kubelet, "the VM cannot be killed in time after the longest call");
}

#[test]
fn architecture_tells_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../ARCHITECTURE.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let [begin, end] = MARKERS;
    let told = text.split_once(begin).and_then(|(_, rest)| rest.split_once(end)).map(|(told, _)| told);
    let told = told.unwrap_or_else(|| panic!("{} has no {begin} and {end}", path.display()));
    let expected = markdown();
    assert!(
        told.trim() == expected.trim(),
        "ARCHITECTURE.md tells another table of deadlines; replace what is between {begin} and {end} by this:\n\n{}\n\n{end}",
        expected.trim()
    );
}

#[tokio::test(start_paused = true)]
async fn parts_share_the_time_of_their_call() {
    let call = Deadline::begin(Operation::StartExec);
    assert_eq!(call.left(), 100 * SECOND);
    assert_eq!(call.part(Operation::GuestWork).left(), 60 * SECOND);
    tokio::time::sleep(60 * SECOND).await;
    let streams = call.part(Operation::ConnectStreams);
    assert_eq!((call.left(), streams.left()), (40 * SECOND, 40 * SECOND));
    assert_eq!(streams.part(Operation::GuestWork).left(), 40 * SECOND, "a part has no more than the whole");
    tokio::time::sleep(15 * SECOND).await;
    assert_eq!(call.part(Operation::GuestConnection).left(), 25 * SECOND);
    tokio::time::sleep(50 * SECOND).await;
    assert_eq!((call.left(), call.part(Operation::GuestAnswer).left()), (Duration::ZERO, Duration::ZERO));
    let late = call.part(Operation::GuestAnswer).timeout(std::future::pending::<()>()).await;
    assert_eq!(late, Err(Duration::ZERO));
    let ready = call.part(Operation::GuestAnswer).timeout(std::future::ready(7)).await;
    assert_eq!(ready, Ok(7), "what is there already is taken");
    // What does not end with the call says so by beginning anew, in a task as elsewhere.
    tokio::spawn(async move {
        assert_eq!(call.left(), Duration::ZERO);
        assert_eq!(Deadline::begin(Operation::GiveBack).left(), 60 * SECOND);
    })
    .await
    .unwrap();
}

#[tokio::test(start_paused = true)]
async fn call_that_turns_out_to_be_another_began_as_early() {
    let call = Deadline::begin(Operation::CreateContainer);
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(call.turned_into(Operation::CreateStandalone).left(), 270 * SECOND);
    let slow = call.turned_into(Operation::CreatePod).longer_by(120 * SECOND);
    assert_eq!(slow.left(), 220 * SECOND);
    assert_eq!(slow.part_of(Operation::BootGuest, 180 * SECOND).left(), 180 * SECOND);
}

/// A pod that may run for a tenth of the time.
#[tokio::test(start_paused = true)]
async fn time_in_which_the_pod_was_throttled_does_not_count_up_to_what_the_kubelet_waits() {
    let begun = Instant::now();
    // Groups above the pod's have been throttled before.
    let throttled = || Some(1000 * SECOND + begun.elapsed() * 9 / 10);
    let part = |budget| Deadline { throttled: throttled(), budget, ..Deadline::begin(Operation::CreatePod) };
    let slow = part(5 * SECOND).timeout_by(throttled, tokio::time::sleep(45 * SECOND)).await;
    assert!(slow.is_ok(), "it had 4.5 s: {slow:?}");
    let hung = part(5 * SECOND).timeout_by(throttled, std::future::pending::<()>()).await.unwrap_err();
    assert!((49 * SECOND..=51 * SECOND).contains(&hung), "{hung:?}");
    let long = part(60 * SECOND).timeout_by(throttled, std::future::pending::<()>()).await;
    assert_eq!(long, Err(LONGEST));
    let free = part(20 * SECOND).timeout_by(|| Some(1000 * SECOND), std::future::pending::<()>());
    assert_eq!(free.await, Err(20 * SECOND));
    // What its groups were throttled for before there was a pod is nobody's.
    let before = Deadline { throttled: None, ..part(20 * SECOND) };
    assert_eq!(before.timeout_by(throttled, std::future::pending::<()>()).await, Err(20 * SECOND));
}

#[tokio::test(start_paused = true)]
async fn what_the_host_does_alone_has_no_more_time_in_a_pod_that_is_throttled() {
    let begun = Instant::now();
    let throttled = || Some(begun.elapsed());
    let of_pod = |deadline: Deadline| Deadline { throttled: throttled(), ..deadline };
    let end = of_pod(Deadline::begin(Operation::OrderlyEnd)).timeout_by(throttled, std::future::pending::<()>());
    assert_eq!(end.await, Err(10 * SECOND));
    // Nor has a part of it.
    let asked = of_pod(Deadline::begin(Operation::OrderlyEnd).part(Operation::GuestAnswer));
    assert_eq!(asked.timeout_by(throttled, std::future::pending::<()>()).await, Err(10 * SECOND));
}
