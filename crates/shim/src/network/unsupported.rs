//! What a pod's network has and a VM cannot be given.

/// One such thing.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Unsupported {
    /// What it is, in words that stand in a list.
    pub what: String,
    /// Whether the pod would be open where it is closed without it, or reach what it shall not.
    pub security: bool,
}
