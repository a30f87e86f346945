//! Errors as text, which is what crosses a boundary of them.

use std::error::Error;
use std::fmt::Write;

/// An error with its causes in one line, "outer: inner: innermost". A cause that the text has already is left out: some errors
/// repeat theirs.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let inner = error.to_string();
        if !text.contains(&inner) {
            let _ = write!(text, ": {inner}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open the door")]
    struct Outer(#[source] std::io::Error);

    #[derive(Debug, thiserror::Error)]
    #[error("it is late: {0}")]
    struct Repeating(#[source] Outer);

    #[test]
    fn chain_names_every_cause_once() {
        let outer = || Outer(std::io::Error::other("no key"));
        assert_eq!(chain(&outer()), "cannot open the door: no key");
        assert_eq!(chain(&Repeating(outer())), "it is late: cannot open the door: no key");
        assert_eq!(chain(&std::io::Error::other("no key")), "no key");
    }
}
