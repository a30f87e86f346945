//! What becomes of a pod whose network has something that a VM cannot be given: the operator's `unsupported_network`.

use serde::Deserialize;

use super::unsupported::Unsupported;

/// Most things that a message names.
const NAMED: usize = 4;

/// What the operator wants.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// A pod is refused that would be without something that drops, redirects or rewrites traffic. Of the rest a warning tells.
    #[default]
    Refuse,
    /// A warning tells of everything.
    Warn,
}

impl Policy {
    /// Refuses a pod without these things, or warns of them.
    pub fn check(self, unsupported: &[Unsupported]) -> Result<(), PolicyError> {
        let (refused, warned): (Vec<_>, Vec<_>) =
            unsupported.iter().partition(|one| self == Self::Refuse && one.security);
        if !refused.is_empty() {
            return Err(PolicyError(list(&refused)));
        }
        if !warned.is_empty() {
            tracing::warn!(
                "the pod runs without these parts of its network, which a VM cannot have: {}",
                list(&warned)
            );
        }
        Ok(())
    }
}

fn list(all: &[&Unsupported]) -> String {
    let mut named = all.iter().take(NAMED).map(|one| one.what.clone()).collect::<Vec<_>>().join("; ");
    if all.len() > NAMED {
        named += &format!("; and {} more", all.len() - NAMED);
    }
    named
}

/// The pod is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "the pod's network has what a VM cannot be given: {0}; remove it there, run the pod with runc, or set unsupported_network = \"warn\" in Bulkhead's configuration to run pods without it"
)]
pub struct PolicyError(String);

#[cfg(test)]
mod tests {
    use super::*;

    fn thing(what: &str, security: bool) -> Unsupported {
        Unsupported { what: what.to_owned(), security }
    }

    #[test]
    fn only_what_is_about_security_is_refused_and_only_by_default() {
        let both = [thing("a qdisc", false), thing("a table", true)];
        let message = Policy::default().check(&both).unwrap_err().to_string();
        assert!(message.contains("a table") && !message.contains("a qdisc") && message.contains("unsupported_network"));
        Policy::Warn.check(&both).unwrap();
        Policy::Refuse.check(&both[..1]).unwrap();
        Policy::Refuse.check(&[]).unwrap();
    }

    #[test]
    fn long_list_is_cut_short() {
        let many: Vec<_> = (0..100).map(|number| thing(&format!("rule {number}"), true)).collect();
        let message = Policy::Refuse.check(&many).unwrap_err().to_string();
        assert!(message.contains("rule 3; and 96 more;"), "{message}");
    }
}
