//! Kernel parameters by their dotted names (sysctl(8)).

use std::io;
use std::path::PathBuf;

use bulkhead_protocol::error::chain;

/// Sets one parameter of the guest.
pub fn set(name: &str, value: &str) -> Result<(), SysctlError> {
    let path = path_of(name).ok_or_else(|| SysctlError::Name { name: name.into() })?;
    std::fs::write(path, value).map_err(|source| SysctlError::Set { name: name.into(), value: value.into(), source })
}

/// Takes a value of the node's. One that this kernel does not take is left: no pod has asked for it.
pub fn follow(name: &str, value: &str) {
    if let Err(error) = set(name, value) {
        tracing::warn!("{}", chain(&error));
    }
}

/// A parameter's value; nothing if the guest's kernel does not have it.
pub fn read(name: &str) -> Option<String> {
    std::fs::read_to_string(path_of(name)?).ok().map(|value| value.trim_end().to_owned())
}

/// The parameter's file. A name may be written with slashes too, and whichever comes first is the separator: the other one
/// is part of a word, for interfaces with a dot in their name.
pub fn path_of(name: &str) -> Option<PathBuf> {
    let separator = name.chars().find(|c| matches!(c, '.' | '/'))?;
    let words = name.split(separator).map(|word| match separator {
        '.' => word.replace('/', "."),
        _ => word.to_owned(),
    });
    let mut path = PathBuf::from("/proc/sys");
    for word in words {
        if word.is_empty() || word == "." || word == ".." || word.contains(['/', '\0']) {
            return None;
        }
        path.push(word);
    }
    Some(path)
}

/// A parameter cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// Not a name.
    #[error("\"{name}\" is no sysctl name")]
    Name { name: String },
    /// The kernel has no such parameter or refuses the value.
    #[error("cannot set sysctl {name} to \"{value}\"; the guest kernel may not have it or not take the value")]
    Set { name: String, value: String, source: io::Error },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separator_is_whichever_comes_first() {
        let path = |name| path_of(name).map(|path| path.display().to_string());
        assert_eq!(path("net.ipv4.ip_forward").as_deref(), Some("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(path("net.ipv4.conf.eth0/1.rp_filter").as_deref(), Some("/proc/sys/net/ipv4/conf/eth0.1/rp_filter"));
        assert_eq!(path("net/ipv4/conf/eth0.1/rp_filter").as_deref(), Some("/proc/sys/net/ipv4/conf/eth0.1/rp_filter"));
    }

    #[test]
    fn names_that_leave_the_tree_are_refused() {
        for name in ["", "hostname", "..", "net/../../x", "kernel..x", "kernel.//.x", ".x"] {
            assert!(matches!(set(name, "1"), Err(SysctlError::Name { .. })), "{name}");
        }
    }
}
