//! The formats of a control group's files (cgroup-v2.rst, Format).

/// The pairs of a flat keyed file, one to a line.
pub fn flat_keyed(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| line.split_once(' ')).filter_map(|(key, value)| Some((key, number(value)?)))
}

/// A number, or "max", which the protocol writes as the largest.
pub fn number(word: &str) -> Option<u64> {
    match word.trim() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}
