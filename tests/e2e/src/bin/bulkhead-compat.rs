//! `make test-compat`: runs the A/B suite in the test node.
//!
//!     bulkhead-compat [PART OF A CASE'S OR GROUP'S NAME]...
//!     bulkhead-compat --document      print the table of docs/compatibility.md
//!     bulkhead-compat --show WORD...  run, and print every observation

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Instant;

use bulkhead_e2e::compat::compare::{Verdict, verdict};
use bulkhead_e2e::compat::run::{self, Observations, Side};
use bulkhead_e2e::compat::{Area, Group, cases, document};

/// Counts of one area.
#[derive(Default)]
struct Count {
    same: usize,
    explained: usize,
    failed: usize,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut words: Vec<_> = std::env::args().skip(1).collect();
    if words.first().is_some_and(|word| word == "--document") {
        print!("{}", document::table(&cases::groups()));
        return ExitCode::SUCCESS;
    }
    let show = words.first().is_some_and(|word| word == "--show");
    if show {
        words.remove(0);
    }
    let mut counts = BTreeMap::<Area, Count>::new();
    let mut failed = 0;
    for mut group in cases::groups() {
        select(&mut group, &words);
        if group.cases().next().is_none() {
            continue;
        }
        let began = Instant::now();
        let outcome = run::group(&group).await;
        println!(
            "compat: group {}: {} cases, {:.0} s",
            group.name,
            group.cases().count(),
            began.elapsed().as_secs_f64()
        );
        let (runc, bulkhead) = match outcome {
            Ok(sides) => sides,
            Err(error) => {
                println!("FAILED group {}: {error:#}", group.name);
                failed += 1;
                continue;
            }
        };
        let (runc, bulkhead) = (side("runc", runc, &mut failed), side("bulkhead", bulkhead, &mut failed));
        judge(&group, &runc, &bulkhead, &mut counts, show);
    }
    summarize(&counts, failed)
}

/// Leaves in a group what matches one of the words, or all if there are none.
fn select(group: &mut Group, words: &[String]) {
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    if wanted(group.name) {
        return;
    }
    for probe in &mut group.probes {
        probe.scripts.retain(|script| wanted(script.case.name));
    }
    group.probes.retain(|probe| !probe.scripts.is_empty());
    group.acts.retain(|act| wanted(act.case.name));
}

/// What one side observed; a group that did not run, or left something behind, is a failure of its own.
fn side(handler: &str, outcome: Side, failed: &mut usize) -> Observations {
    outcome.unwrap_or_else(|error| {
        println!("FAILED with {handler}: {error:#}");
        *failed += 1;
        Observations::new()
    })
}

fn judge(group: &Group, runc: &Observations, bulkhead: &Observations, counts: &mut BTreeMap<Area, Count>, show: bool) {
    let missing = Err("not observed".to_owned());
    for case in group.cases() {
        let (left, right) = (runc.get(case.name).unwrap_or(&missing), bulkhead.get(case.name).unwrap_or(&missing));
        if show {
            println!("--- {}\n[runc]\n{}\n[bulkhead]\n{}", case.name, either(left), either(right));
        }
        let count = counts.entry(case.area).or_default();
        match verdict(case, left, right) {
            Verdict::Same => count.same += 1,
            Verdict::Explained => count.explained += 1,
            Verdict::Failed(why) => {
                count.failed += 1;
                print!("FAILED {}: {}\n{why}", case.area.name(), case.name);
            }
        }
    }
}

fn either(observed: &Result<String, String>) -> &str {
    observed.as_ref().unwrap_or_else(|error| error)
}

fn summarize(counts: &BTreeMap<Area, Count>, groups_failed: usize) -> ExitCode {
    let (mut passed, mut failed) = (0, groups_failed);
    println!("\n{:<12}{:>8}{:>12}{:>8}", "area", "same", "explained", "failed");
    for (area, count) in counts {
        println!("{:<12}{:>8}{:>12}{:>8}", area.name(), count.same, count.explained, count.failed);
        passed += count.same + count.explained;
        failed += count.failed;
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
