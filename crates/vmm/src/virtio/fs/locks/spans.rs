//! The locked bytes of one owner in one file.

use super::request::{How, Span};

/// Locked spans, none of which overlap.
#[derive(Debug, Default)]
pub struct Spans(Vec<(How, Span)>);

impl Spans {
    /// What the kernel does with an owner's locks when one more is set or unset.
    pub fn set(&mut self, how: How, span: Span) {
        let mut kept = Vec::with_capacity(self.0.len() + 2);
        for (was, old) in self.0.drain(..) {
            if !old.overlaps(span) {
                kept.push((was, old));
                continue;
            }
            if old.start < span.start {
                kept.push((was, Span { start: old.start, end: span.start - 1 }));
            }
            if old.end > span.end {
                kept.push((was, Span { start: span.end + 1, end: old.end }));
            }
        }
        if how != How::Unlock {
            merge(&mut kept, how, span);
        }
        self.0 = kept;
    }

    /// The locks that are in the way of another owner's.
    pub fn excludes(&self, how: How, span: Span) -> bool {
        self.0.iter().any(|(held, bytes)| bytes.overlaps(span) && held.excludes(how))
    }

    /// Whether any of the bytes is locked.
    pub fn overlap(&self, span: Span) -> bool {
        self.0.iter().any(|(_, bytes)| bytes.overlaps(span))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (How, Span)> + '_ {
        self.0.iter().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Adds a span; neighbours of the same kind become one with it.
fn merge(spans: &mut Vec<(How, Span)>, how: How, mut span: Span) {
    spans.retain(|(was, old)| {
        let touches = old.end.saturating_add(1) == span.start || span.end.saturating_add(1) == old.start;
        if *was == how && touches {
            span = Span { start: span.start.min(old.start), end: span.end.max(old.end) };
        }
        *was != how || !touches
    });
    spans.push((how, span));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(changes: &[(How, u64, u64)]) -> Vec<(How, u64, u64)> {
        let mut spans = Spans::default();
        for (how, start, end) in changes {
            spans.set(*how, Span { start: *start, end: *end });
        }
        let mut all: Vec<_> = spans.iter().map(|(how, span)| (how, span.start, span.end)).collect();
        all.sort_by_key(|(_, start, _)| *start);
        all
    }

    #[test]
    fn spans_are_split_and_merged_as_by_the_kernel() {
        use How::{Read, Unlock, Write};
        assert_eq!(after(&[(Read, 0, 9), (Unlock, 3, 5)]), [(Read, 0, 2), (Read, 6, 9)]);
        assert_eq!(after(&[(Read, 0, 9), (Write, 3, 5)]), [(Read, 0, 2), (Write, 3, 5), (Read, 6, 9)]);
        assert_eq!(after(&[(Read, 0, 4), (Read, 5, 9)]), [(Read, 0, 9)]);
        assert_eq!(after(&[(Read, 5, 9), (Write, 0, 4)]), [(Write, 0, 4), (Read, 5, 9)]);
        assert_eq!(after(&[(Read, 2, 3), (Write, 0, Span::LAST)]), [(Write, 0, Span::LAST)]);
        assert_eq!(after(&[(Read, 2, 3), (Unlock, 0, Span::LAST)]), []);
        assert_eq!(after(&[(Write, 0, Span::LAST), (Unlock, Span::LAST, Span::LAST)]), [(Write, 0, Span::LAST - 1)]);
    }
}
