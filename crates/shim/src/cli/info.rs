//! `-v`, `-info` and `features`: who we are, for people, for containerd 2.x (containerd: pkg/shim/shim.go,
//! api/types/introspection.proto) and for CRI-O (cri-o: pkg/config/config.go, initializeRuntimeFeatures).

use std::collections::HashMap;
use std::io::Write;

use bulkhead_protocol::RELEASE;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

/// Prints the version for a person.
pub fn print_version() -> Result<(), InfoError> {
    let mut out = std::io::stdout();
    writeln!(out, "containerd-shim-bulkhead-v2:\n  Version: {RELEASE}").map_err(InfoError::Print)
}

/// How containerd names the type of [`super::features::features`], whose value is JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Types of mounts that containerd leaves to the runtime (containerd: core/runtime/v2/task_manager.go).
const ALLOWED_MOUNTS: &str = "containerd.io/runtime-allow-mounts";

/// Prints a `RuntimeInfo`.
pub fn print_info() -> Result<(), InfoError> {
    let bytes = info().write_to_bytes().map_err(InfoError::Encode)?;
    std::io::stdout().write_all(&bytes).map_err(InfoError::Print)
}

/// Prints what containers may ask for, as `runc features` does.
pub fn print_features() -> Result<(), InfoError> {
    writeln!(std::io::stdout(), "{}", super::features::features()).map_err(InfoError::Print)
}

fn info() -> RuntimeInfo {
    RuntimeInfo {
        name: "io.containerd.bulkhead.v2".to_owned(),
        version: MessageField::some(RuntimeVersion { version: RELEASE.to_owned(), ..RuntimeVersion::default() }),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: super::features::features().to_string().into_bytes(),
            ..Any::default()
        }),
        annotations: HashMap::from([(ALLOWED_MOUNTS.to_owned(), crate::layers::ALLOWED.to_owned())]),
        ..RuntimeInfo::default()
    }
}

/// `-v` or `-info` failed.
#[derive(Debug, thiserror::Error)]
pub enum InfoError {
    /// stdout is gone.
    #[error("cannot print")]
    Print(#[source] std::io::Error),
    /// Cannot happen with a message of ours.
    #[error("cannot encode the runtime's description")]
    Encode(#[source] protobuf::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_is_told_which_mounts_are_left_to_the_shim() {
        let info = RuntimeInfo::parse_from_bytes(&info().write_to_bytes().unwrap()).unwrap();
        assert_eq!(info.annotations["containerd.io/runtime-allow-mounts"], "erofs,format/*,mkdir/*");
    }
}
