//! Which namespaces are the node's own: the device and inode of a namespace are its identity (namespaces(7)).

use std::fs::metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Whose they are: the first process's, and ours, for a node may be a container.
const NODES: [&str; 2] = ["/proc/1/ns", "/proc/self/ns"];

/// Whether that is behind a path; `name` is that of its kind in /proc. What cannot be looked at is not: whoever enters it is
/// told why.
pub fn is_nodes(path: &Path, name: &str) -> bool {
    let Ok(found) = metadata(path) else { return false };
    let same = |dir: &&str| {
        metadata(Path::new(dir).join(name)).is_ok_and(|own| (own.dev(), own.ino()) == (found.dev(), found.ino()))
    };
    NODES.iter().any(same)
}
