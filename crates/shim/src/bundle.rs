//! The OCI bundle: `config.json`, read once and bounded (runtime-spec: bundle.md).

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use crate::annotations::{self, AnnotationError, Role};

/// Largest config.json that is read, in bytes. Real ones are some tens of KiB, with seccomp.
const MAX_CONFIG: u64 = 4 << 20;

/// Reads a bundle's spec.
pub fn read_spec(bundle: &Path) -> Result<Spec, BundleError> {
    let path = bundle.join("config.json");
    let mut text = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_CONFIG + 1).read_to_end(&mut text))
        .map_err(|source| BundleError::Read { path: path.clone(), source })?;
    if u64::try_from(text.len()).is_ok_and(|len| len > MAX_CONFIG) {
        return Err(BundleError::TooLarge(path));
    }
    serde_json::from_slice(&text).map_err(|source| BundleError::Parse { path, source })
}

/// The role of the bundle's container. A bundle without a spec is a sandbox of containerd's sandbox API.
pub fn read_role(bundle: &Path) -> Result<Role, BundleError> {
    match read_spec(bundle) {
        Ok(spec) => spec_role(&spec),
        Err(BundleError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(Role::Sandbox),
        Err(error) => Err(error),
    }
}

/// The role that a spec's annotations give.
pub fn spec_role(spec: &Spec) -> Result<Role, BundleError> {
    let none = HashMap::new();
    annotations::role(spec.annotations().as_ref().unwrap_or(&none)).map_err(BundleError::Annotation)
}

/// The bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// config.json cannot be read.
    #[error("cannot read the container's OCI spec {path}; has containerd removed the bundle?")]
    Read {
        /// The file.
        path: PathBuf,
        /// open(2) or read(2).
        #[source]
        source: std::io::Error,
    },
    /// Beyond [`MAX_CONFIG`].
    #[error("the container's spec {0} is larger than 4 MiB")]
    TooLarge(PathBuf),
    /// Not an OCI spec.
    #[error("the container's spec {path} is not an OCI runtime spec")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// An annotation of the spec.
    #[error(transparent)]
    Annotation(AnnotationError),
}
