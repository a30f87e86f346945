//! The pods of this node, as their shims have left note of them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, bail};
use bulkhead_protocol::node::RUN_ROOT;

/// The directory of the one pod whose id begins so.
pub fn find(begin: &str) -> Result<PathBuf> {
    let namespaces = fs::read_dir(RUN_ROOT).into_iter().flatten().flatten();
    let pods = namespaces.flat_map(|namespace| fs::read_dir(namespace.path()).into_iter().flatten().flatten());
    let mut found: Vec<_> = pods
        .map(|pod| pod.path())
        .filter(|pod| pod.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(begin)))
        .collect();
    match (found.pop(), found.is_empty()) {
        (Some(pod), true) => Ok(pod),
        (Some(_), false) => bail!("more than one pod's id begins with {begin:?}; give more of it"),
        (None, _) => bail!("no pod with id {begin:?} runs here; `crictl pods` lists them, and this needs root"),
    }
}
