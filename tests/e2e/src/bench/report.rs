//! The results for people, and for tools/bench.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::results::{Figure, Measured, REFERENCE, Results, quantile};
use super::stage::Depth;
use crate::HANDLER;

/// Counters that the table has; the rest is in the JSON.
const COUNTS: [(&str, &[&str]); 4] = [
    ("requests", &["fs.requests"]),
    ("kicks", &["fs.kicks", "net.kicks", "vsock.kicks"]),
    ("interrupts", &["fs.interrupts", "net.interrupts", "vsock.interrupts"]),
    ("exits", &["kvm.exits"]),
];

/// Counts below this are not told by kind of request: one in a few hundred operations is a directory that was looked up.
const FEW: f64 = 0.01;

/// Everything, as tools/bench reads it. `revision` is of the tree that was measured.
pub fn as_json(results: &Results, revision: &str, depth: Depth) -> Value {
    let depth = match depth {
        Depth::Full => "full",
        Depth::Counts => "counts",
    };
    let first_line = |file: &str, begin: &str| {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(begin)).unwrap_or_default();
        line.split_once(": ").map_or(line, |(_, value)| value).trim().to_owned()
    };
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    json!({
        "revision": revision,
        "depth": depth,
        "machine": {
            "cpu": first_line("/proc/cpuinfo", "model name"),
            "cpus": cpus,
            "kernel": first_line("/proc/sys/kernel/osrelease", ""),
        },
        "cases": results.cases.iter().map(case).collect::<Vec<_>>(),
    })
}

fn case(measured: &Measured) -> Value {
    let handler = |name: &str| {
        let values = measured.values(name);
        let median = quantile(&values, 0.5)?;
        let calls = measured.calls(name).map(rounded);
        let p95 = quantile(&values, 0.95).map(rounded);
        Some(json!({ "median": rounded(median), "p95": p95, "rounds": values.len(), "calls": calls }))
    };
    let counts: Map<_, _> =
        measured.counts(HANDLER).into_iter().map(|(name, count)| (name.to_owned(), figure(count))).collect();
    json!({
        "name": measured.case.name,
        "quantity": measured.case.quantity,
        "unit": measured.case.unit,
        "operations": measured.case.operations,
        REFERENCE: handler(REFERENCE),
        HANDLER: handler(HANDLER),
        "ratio": measured.ratio(HANDLER).map(figure),
        "counts": counts,
    })
}

fn figure(figure: Figure) -> Value {
    json!({ "median": rounded(figure.median), "noise": rounded(figure.noise) })
}

/// Digits beyond these are noise, and make differences of files hard to read.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// The table for people: times of all operations of a case together, counts of one.
pub fn table(results: &Results) -> String {
    let mut text = String::new();
    let mut line = |words: &[String]| {
        let mut line = String::new();
        for (at, word) in words.iter().enumerate() {
            let _ = if at == 0 { write!(line, "{word:<40}") } else { write!(line, "{word:>12}") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    let heads =
        ["case", "runc", "bulkhead", "p95", "ratio", "per", "calls", "requests", "kicks", "interrupts", "exits"];
    line(&heads.map(str::to_owned));
    for measured in &results.cases {
        let (runc, bulkhead) = (measured.values(REFERENCE), measured.values(HANDLER));
        let counts = measured.counts(HANDLER);
        let mut words = vec![
            measured.case.name.clone(),
            with_quantity(quantile(&runc, 0.5), measured.case.quantity),
            with_quantity(quantile(&bulkhead, 0.5), measured.case.quantity),
            with_quantity(quantile(&bulkhead, 0.95), measured.case.quantity),
            words_of(measured.ratio(HANDLER).map(|ratio| ratio.median)),
            measured.case.unit.to_owned(),
            words_of(measured.calls(HANDLER)),
        ];
        for (_, names) in COUNTS {
            let medians = names.iter().filter_map(|name| counts.get(name)).map(|figure| figure.median);
            words.push(words_of(medians.reduce(|sum, count| sum + count)));
        }
        line(&words);
    }
    text.push_str("\nrequests by kind, of one operation\n");
    for measured in &results.cases {
        let counts = measured.counts(HANDLER);
        let mut kinds: Vec<_> = counts
            .iter()
            .filter_map(|(name, figure)| Some((name.strip_prefix("fs.")?, figure.median)))
            .filter(|(kind, count)| kind.starts_with(char::is_uppercase) && *count >= FEW)
            .collect();
        kinds.sort_by(|(_, one), (_, other)| other.total_cmp(one));
        if !kinds.is_empty() {
            let kinds: Vec<_> = kinds.into_iter().map(|(kind, count)| format!("{kind} {count:.2}")).collect();
            let _ = writeln!(text, "{:<40}  {}", measured.case.name, kinds.join(", "));
        }
    }
    text
}

fn with_quantity(value: Option<f64>, quantity: &str) -> String {
    value.map_or_else(String::new, |value| format!("{} {quantity}", short(value)))
}

fn words_of(value: Option<f64>) -> String {
    value.map_or_else(String::new, short)
}

/// Three digits or so.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::results::{Case, Sample};
    use super::*;

    fn results() -> Results {
        let mut results = Results::default();
        let case = Case::time("files/root/create", "file", 400);
        let counts = [("fs.requests", 800), ("fs.CREATE", 400), ("fs.kicks", 200), ("kvm.exits", 4000)];
        let counts = counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
        results.add(REFERENCE, case.clone(), Sample { value: 200.0, calls: 1200, ..Sample::default() });
        results.add(HANDLER, case, Sample { value: 1000.0, calls: 1200, counts });
        results
    }

    #[test]
    fn json_has_what_is_gated() {
        let json = as_json(&results(), "abc", Depth::Full);
        let case = &json["cases"][0];
        assert_eq!((&json["revision"], &json["depth"]), (&json!("abc"), &json!("full")));
        assert_eq!(case["ratio"], json!({ "median": 5.0, "noise": 0.0 }));
        assert_eq!(case["counts"]["fs.requests"], json!({ "median": 2.0, "noise": 0.0 }));
        assert_eq!(case["runc"], json!({ "median": 200.0, "p95": 200.0, "rounds": 1, "calls": 3.0 }));
    }

    #[test]
    fn table_has_a_line_for_each_case_and_one_for_its_kinds() {
        let table = table(&results());
        let lines: Vec<Vec<_>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        let expected =
            "files/root/create 200 ms 1000 ms 1000 ms 5.00 file 3.00 2.00 0.50 10.0".split(' ').collect::<Vec<_>>();
        assert_eq!(lines[1], expected);
        assert_eq!(lines[4], ["files/root/create", "CREATE", "1.00"]);
    }
}
