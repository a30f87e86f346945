//! Whether a case has passed, and what is said about one that has not.

use super::Case;

/// What came of a case.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Both showed the same.
    Same,
    /// They differ, as the case says.
    Explained,
    /// Failed, and why.
    Failed(String),
}

/// Compares what was observed with runc and with Bulkhead.
pub fn verdict(case: Case, runc: &Result<String, String>, bulkhead: &Result<String, String>) -> Verdict {
    let (runc, bulkhead) = match (runc, bulkhead) {
        (Ok(runc), Ok(bulkhead)) => (runc, bulkhead),
        (runc, bulkhead) => {
            let say = |name, side: &Result<String, String>| match side {
                Ok(text) => format!("  {name} shows: {text}\n"),
                Err(error) => format!("  {name} fails: {error}\n"),
            };
            return Verdict::Failed(say("runc", runc) + &say("bulkhead", bulkhead));
        }
    };
    match (runc == bulkhead, case.difference) {
        (true, None) => Verdict::Same,
        (false, Some(_)) => Verdict::Explained,
        (true, Some(_)) => Verdict::Failed(format!(
            "  listed as a difference, but both show:\n{}  take the entry out of the table and of docs/compatibility.md\n",
            lines(runc, "    ")
        )),
        (false, None) => Verdict::Failed(difference(runc, bulkhead)),
    }
}

/// The lines that only one of them has; all of both when these differ in their order alone.
fn difference(runc: &str, bulkhead: &str) -> String {
    let only = |from: &str, other: &str, prefix: &str| {
        let other: Vec<_> = other.lines().collect();
        let lines = from.lines().filter(|line| !other.contains(line));
        lines.map(|line| format!("  {prefix} {line}\n")).collect::<String>()
    };
    let text = only(runc, bulkhead, "- runc:    ") + &only(bulkhead, runc, "+ bulkhead:");
    if text.is_empty() {
        return format!("  runc:\n{}  bulkhead:\n{}", lines(runc, "    "), lines(bulkhead, "    "));
    }
    text
}

fn lines(text: &str, prefix: &str) -> String {
    text.lines().map(|line| format!("{prefix}{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Area;
    use super::*;

    fn judge(difference: Option<&'static str>, runc: &str, bulkhead: &str) -> Verdict {
        let case = Case { area: Area::Security, name: "case", difference };
        verdict(case, &Ok(runc.into()), &Ok(bulkhead.into()))
    }

    #[test]
    fn only_what_is_listed_may_differ_and_then_must() {
        assert_eq!(judge(None, "a\n", "a\n"), Verdict::Same);
        assert_eq!(judge(Some("why"), "a\n", "b\n"), Verdict::Explained);
        assert!(matches!(judge(Some("why"), "a\n", "a\n"), Verdict::Failed(_)));
        assert!(matches!(judge(None, "a\nb\n", "b\na\n"), Verdict::Failed(text) if text.contains("runc:\n    a")));
        let Verdict::Failed(text) = judge(None, "a\nb\n", "a\nc\n") else { panic!("differs") };
        assert_eq!(text, "  - runc:     b\n  + bulkhead: c\n");
    }

    #[test]
    fn error_on_both_sides_is_no_agreement() {
        let case = Case { area: Area::Security, name: "case", difference: None };
        let error = Err("no pod".to_owned());
        assert!(matches!(verdict(case, &error, &error), Verdict::Failed(_)));
    }
}
