//! A network namespace with a name, as a CNI makes it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::node_command;

/// The namespace, gone with the value.
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    /// Makes it, with nothing in it but loopback.
    pub fn new(name: &str) -> Result<Self> {
        node_command("ip", &["netns", "add", name])?;
        Ok(Self { name: name.to_owned(), path: Path::new("/run/netns").join(name) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a link to it in /proc reads (namespaces(7)).
    pub fn link(&self) -> Result<PathBuf> {
        let inode = std::fs::metadata(&self.path).context("the network namespace is gone")?.ino();
        Ok(format!("net:[{inode}]").into())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = node_command("ip", &["netns", "del", &self.name]);
    }
}
