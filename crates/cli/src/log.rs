//! The CRI's container log format: `TIMESTAMP stdout|stderr F|P TEXT`, one line each; `P` marks a part of a longer line.

use anyhow::{Result, bail};

/// One line of a container's log.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Line {
    /// RFC 3339 time with nanoseconds.
    pub time: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether the line ends here; false for a part of one.
    pub complete: bool,
    /// The text without its line feed.
    pub text: String,
}

/// Parses a whole log.
pub fn parse(log: &str) -> Result<Vec<Line>> {
    log.lines().map(parse_line).collect()
}

fn parse_line(line: &str) -> Result<Line> {
    let mut words = line.splitn(4, ' ');
    let (Some(time), Some(stream), Some(tag)) = (words.next(), words.next(), words.next()) else {
        bail!("log line has fewer than three fields: {line:?}");
    };
    if !matches!(stream, "stdout" | "stderr") || !time.contains('T') {
        bail!("log line is not of the CRI's format: {line:?}");
    }
    let complete = match tag.split(':').next() {
        Some("F") => true,
        Some("P") => false,
        _ => bail!("log line has tag {tag:?}, neither F nor P"),
    };
    let text = words.next().unwrap_or_default();
    Ok(Line { time: time.to_owned(), stream: stream.to_owned(), complete, text: text.to_owned() })
}

/// The text of one stream, parts joined, lines ended.
pub fn text_of(lines: &[Line], stream: &str) -> String {
    let mut text = String::new();
    for line in lines.iter().filter(|line| line.stream == stream) {
        text.push_str(&line.text);
        if line.complete {
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_lines_are_joined() {
        let lines = parse(
            "2026-01-01T00:00:00.1Z stdout P ab\n2026-01-01T00:00:00.2Z stderr F x\n2026-01-01T00:00:00.3Z stdout F c d\n",
        )
        .unwrap();
        assert_eq!(text_of(&lines, "stdout"), "abc d\n");
        assert_eq!(text_of(&lines, "stderr"), "x\n");
    }

    #[test]
    fn foreign_line_is_refused() {
        assert!(parse("hello world of logs\n").is_err());
        assert!(parse("2026-01-01T00:00:00Z stdout X a\n").is_err());
    }
}
