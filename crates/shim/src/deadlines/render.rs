//! The table as a reader of ARCHITECTURE.md has it.

use std::time::Duration;

use super::table::{Caller, Clock, Operation, Row, Scope};

/// Longest line, in characters.
const WIDTH: usize = 125;

/// A space that is no end of a line.
const TIE: char = '\u{a0}';

/// The table in Markdown: what there is in it but for the reasons. ARCHITECTURE.md has it between two markers.
pub fn markdown() -> String {
    let calls = lines(|scope| matches!(scope, Scope::Call(_)));
    let calls: Vec<_> = calls.iter().map(|call| wrapped(&format!("- {call}"), "  ")).collect();
    let list =
        |title: &str, belongs: fn(Scope) -> bool| wrapped(&format!("{title}: {}.", lines(belongs).join("; ")), "");
    [
        "Calls, and in brackets what comes in them one after the other:".to_owned(),
        calls.join("\n"),
        list("Parts of these", |scope| matches!(scope, Scope::Part(_))),
        list("Steps of any call", |scope| scope == Scope::Step),
        list("Apart from the calls' time", |scope| scope == Scope::Apart),
    ]
    .join("\n\n")
}

fn lines(belongs: impl Fn(Scope) -> bool) -> Vec<String> {
    let rows = Operation::ALL.iter().map(|operation| operation.row());
    rows.filter(|row| belongs(row.scope)).map(|row| line(&row)).collect()
}

fn line(row: &Row) -> String {
    let throttled = if row.clock == Clock::Pod { "\\*" } else { "" };
    let given = match row.scope {
        Scope::Call(caller) => given(caller),
        Scope::Part(_) | Scope::Step | Scope::Apart => String::new(),
    };
    let part = |part: &Operation| format!("{} {}", part.row().name, seconds(part.budget()));
    let way = |way: &&[Operation]| way.iter().map(part).collect::<Vec<_>>().join(", ");
    let ways = row.ways.iter().map(way).collect::<Vec<_>>().join("; or ");
    let ways = if ways.is_empty() { ways } else { format!(" ({ways})") };
    format!("{} {}{throttled}{given}{ways}", row.name, seconds(row.budget))
}

fn given(caller: Caller) -> String {
    let whose = match caller {
        Caller::Kubelet => "the kubelet's",
        Caller::Engine => return ", for an engine, which waits as long as it takes".to_owned(),
        Caller::Containerd => "containerd's",
        Caller::Systemd => "systemd's",
    };
    caller.gives().map(|time| format!(" of {whose} {}", seconds(time))).unwrap_or_default()
}

fn seconds(time: Duration) -> String {
    // Not to be torn apart.
    format!("{}{TIE}s", time.as_secs())
}

/// Breaks a text into lines, of which all but the first are indented.
fn wrapped(text: &str, indent: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last().map_or(0, |line| line.chars().count());
        if last + 1 + word.chars().count() > WIDTH {
            lines.push(indent.to_owned());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() && *line != indent {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.join("\n").replace(TIE, " ")
}
