//! How `start` is asked and how it answers, which differs between containerd's versions.
//!
//! Up to 2.2 stdin holds the runtime options, or nothing, and a plain address on stdout is understood by all of them
//! (Task v2, one `start` for each container). From 2.3 on stdin is a `BootstrapParams`, and the answer a
//! `BootstrapResult` of version 3 (containerd: pkg/shim/compat.go, core/runtime/v2/shim.go parseStartResponse).

use std::io::Read;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;

use super::flags::Flags;

/// Longest stdin that is read. Options are a path or a configuration file's text.
const MAX_STDIN: u64 = 1 << 20;

/// Reads a bootstrap request from stdin, if the caller is new enough to send one.
pub fn read_params(mut stdin: impl Read, flags: &Flags) -> Option<BootstrapParams> {
    let mut bytes = Vec::new();
    stdin.by_ref().take(MAX_STDIN).read_to_end(&mut bytes).ok()?;
    let params = BootstrapParams::parse_from_bytes(&bytes).ok()?;
    // Options parse as this message too; that it repeats the flags tells them apart.
    (params.instance_id == flags.id && params.namespace == flags.namespace).then_some(params)
}

/// What `start` prints.
pub fn answer(params: Option<&BootstrapParams>, address: &str) -> Result<Vec<u8>, protobuf::Error> {
    match params {
        None => Ok(address.as_bytes().to_vec()),
        Some(_) => BootstrapResult {
            version: containerd_shim_protos::TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        }
        .write_to_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;

    fn flags() -> Flags {
        Flags::parse("-namespace k8s.io -id s1 start".split(' ').map(OsString::from)).unwrap()
    }

    #[test]
    fn containerd_1_6_is_answered_with_a_plain_address() {
        assert!(read_params(std::io::empty(), &flags()).is_none());
        assert_eq!(answer(None, "unix:///run/x").unwrap(), b"unix:///run/x");
    }

    #[test]
    fn options_are_not_taken_for_a_bootstrap_request() {
        let any = protobuf::well_known_types::any::Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: vec![1, 2, 3],
            ..Default::default()
        };
        assert!(read_params(any.write_to_bytes().unwrap().as_slice(), &flags()).is_none());
    }

    #[test]
    fn containerd_2_3_is_answered_with_version_3() {
        let asked = BootstrapParams {
            instance_id: "s1".into(),
            namespace: "k8s.io".into(),
            containerd_version: "2.3.0".into(),
            ..Default::default()
        };
        let params = read_params(asked.write_to_bytes().unwrap().as_slice(), &flags()).unwrap();
        let answer = BootstrapResult::parse_from_bytes(&answer(Some(&params), "unix:///a").unwrap()).unwrap();
        assert_eq!((answer.version, answer.address.as_str(), answer.protocol.as_str()), (3, "unix:///a", "ttrpc"));
    }
}
