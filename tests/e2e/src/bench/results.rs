//! What was measured, case by case, and what it comes to.

use std::collections::{BTreeMap, BTreeSet};

/// The handler that all others are compared with.
pub const REFERENCE: &str = "runc";

/// One thing that is measured.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Case {
    /// Unique: group, place, and what is done.
    pub name: String,
    /// What the values are, `ms` or another unit; less is better.
    pub quantity: &'static str,
    /// What is done many times in a sample, in the singular.
    pub unit: &'static str,
    /// How many of these.
    pub operations: u32,
}

impl Case {
    /// One whose values are milliseconds.
    pub fn time(name: impl Into<String>, unit: &'static str, operations: u32) -> Self {
        Self { name: name.into(), quantity: "ms", unit, operations }
    }
}

/// Counters by name.
pub type Counts = BTreeMap<String, u64>;

/// One round of a case with one handler.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// All operations together, in the case's quantity.
    pub value: f64,
    /// System calls that the client has made.
    pub calls: u64,
    /// What the VM has counted meanwhile.
    pub counts: Counts,
}

/// A case with its samples by handler, in the order of the rounds.
pub struct Measured {
    /// The case.
    pub case: Case,
    samples: BTreeMap<&'static str, Vec<Sample>>,
}

/// All of them, in the order in which they were first measured.
#[derive(Default)]
pub struct Results {
    /// The cases.
    pub cases: Vec<Measured>,
}

impl Results {
    /// Adds a sample.
    pub fn add(&mut self, handler: &'static str, case: Case, sample: Sample) {
        let at = self.cases.iter().position(|measured| measured.case == case).unwrap_or_else(|| {
            self.cases.push(Measured { case, samples: BTreeMap::new() });
            self.cases.len() - 1
        });
        if let Some(measured) = self.cases.get_mut(at) {
            measured.samples.entry(handler).or_default().push(sample);
        }
    }
}

/// A number of many samples, and how far they are apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    /// The median.
    pub median: f64,
    /// How much of a difference is nothing.
    pub noise: f64,
}

impl Measured {
    /// The samples of a handler.
    pub fn of(&self, handler: &str) -> &[Sample] {
        self.samples.get(handler).map_or(&[], Vec::as_slice)
    }

    /// The values of a handler in ascending order.
    pub fn values(&self, handler: &str) -> Vec<f64> {
        sorted(self.of(handler).iter().map(|sample| sample.value))
    }

    /// A handler's median by the reference's. The noise is what the ratios of single rounds spread, between their quartiles.
    pub fn ratio(&self, handler: &str) -> Option<Figure> {
        let (mine, theirs) = (self.values(handler), self.values(REFERENCE));
        let median = quantile(&mine, 0.5)? / quantile(&theirs, 0.5)?;
        let rounds = self.of(handler).iter().zip(self.of(REFERENCE));
        let ratios = sorted(rounds.map(|(mine, theirs)| mine.value / theirs.value));
        let noise = quantile(&ratios, 0.75)? - quantile(&ratios, 0.25)?;
        median.is_finite().then_some(Figure { median, noise })
    }

    /// The system calls of one operation, as the client has made them.
    pub fn calls(&self, handler: &str) -> Option<f64> {
        let calls = self.of(handler).first().map(|sample| sample.calls)?;
        (calls > 0).then(|| lossy(calls) / f64::from(self.case.operations))
    }

    /// The counters of one operation. The noise is all that they spread.
    pub fn counts(&self, handler: &str) -> BTreeMap<&str, Figure> {
        let samples = self.of(handler);
        let names: BTreeSet<_> = samples.iter().flat_map(|sample| sample.counts.keys()).collect();
        let figure = |name: &String| {
            let counts = samples.iter().map(|sample| lossy(sample.counts.get(name).copied().unwrap_or(0)));
            let counts = sorted(counts.map(|count| count / f64::from(self.case.operations)));
            Some(Figure { median: quantile(&counts, 0.5)?, noise: counts.last()? - counts.first()? })
        };
        names.into_iter().filter_map(|name| Some((name.as_str(), figure(name)?))).collect()
    }
}

/// A count as a number to divide.
#[allow(clippy::cast_precision_loss)] // reason: no count here comes near 2^53
fn lossy(count: u64) -> f64 {
    count as f64
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The value below which this part of the sorted values is, between two of them in proportion.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)] // reason: indices of a small list
pub fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let at = part * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted.get(at.floor() as usize)?, sorted.get(at.ceil() as usize)?);
    Some(below + (above - below) * at.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(runc: &[f64], bulkhead: &[(f64, u64)]) -> Measured {
        let mut results = Results::default();
        let case = Case::time("files/root/stat", "file", 10);
        for value in runc {
            results.add(REFERENCE, case.clone(), Sample { value: *value, calls: 20, ..Sample::default() });
        }
        for (value, requests) in bulkhead {
            let counts = [("fs.requests".to_owned(), *requests)].into();
            results.add("bulkhead", case.clone(), Sample { value: *value, calls: 20, counts });
        }
        assert_eq!(results.cases.len(), 1);
        results.cases.remove(0)
    }

    #[test]
    fn quantiles_are_between_the_values() {
        assert_eq!(quantile(&[], 0.5), None);
        assert_eq!(quantile(&[7.0], 0.95), Some(7.0));
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.5), Some(2.5));
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 1.0), Some(3.0));
    }

    #[test]
    fn ratio_is_of_medians_and_its_noise_of_rounds() {
        let measured = measured(&[1.0, 1.0, 1.0], &[(2.0, 0), (4.0, 0), (3.0, 0)]);
        assert_eq!(measured.ratio("bulkhead"), Some(Figure { median: 3.0, noise: 1.0 }));
        assert_eq!(measured.ratio("kata"), None);
    }

    #[test]
    fn counts_and_calls_are_of_one_operation() {
        let measured = measured(&[1.0], &[(2.0, 10), (4.0, 10), (3.0, 15)]);
        assert_eq!(measured.counts("bulkhead").get("fs.requests"), Some(&Figure { median: 1.0, noise: 0.5 }));
        assert!(measured.counts(REFERENCE).is_empty());
        assert_eq!(measured.calls(REFERENCE), Some(2.0));
    }
}
