//! How `start` is asked and how it answers, which differs between containerd's versions
//! (containerd: pkg/shim/compat.go, core/runtime/v2/shim.go parseStartResponse).
//!
//! | caller | stdin | environment | answer |
//! | --- | --- | --- | --- |
//! | 1.6, CRI-O | options, or nothing | no `GRPC_ADDRESS`, or an empty one | the address, which means version 2 |
//! | 1.7 | options, or nothing | `GRPC_ADDRESS` | JSON, version 2: it refuses a later one |
//! | 2.0 to 2.2 | options, or nothing | `GRPC_ADDRESS` | JSON, version 3 |
//! | 2.3 and later | `BootstrapParams` | `GRPC_ADDRESS` | `BootstrapResult`, version 3 |
//!
//! With version 3 a pod's containers use the sandbox's connection, without a `start` and a `delete` of their own. A
//! `start` for a container is therefore from a caller that knows its pod by version 2, and is answered with that.

use std::io::Read;
use std::path::PathBuf;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use super::flags::Flags;
use crate::pod::options;

/// Longest stdin that is read. Options are a path or a configuration file's text.
const MAX_STDIN: u64 = 1 << 20;

/// Environment variable that callers since 1.7 set; CRI-O leaves it empty.
pub const GRPC_VARIABLE: &str = "GRPC_ADDRESS";

/// The contract with a `start` for each container, and the one without.
const EACH_CONTAINER: i32 = 2;
const WHOLE_POD: i32 = containerd_shim_protos::TASK_API_VERSION;

/// Who runs `start`, as far as can be told from what it gives.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Caller {
    params: Option<BootstrapParams>,
    options: Option<Any>,
    reads_json: bool,
}

impl Caller {
    /// Reads stdin and the value of [`GRPC_VARIABLE`].
    pub fn read(mut stdin: impl Read, grpc: Option<&str>, flags: &Flags) -> Self {
        let reads_json = grpc.is_some_and(|address| !address.is_empty());
        let mut bytes = Vec::new();
        if stdin.by_ref().take(MAX_STDIN).read_to_end(&mut bytes).is_err() {
            return Self { reads_json, ..Self::default() };
        }
        // Options parse as this message too; that it repeats the flags tells them apart.
        let params = BootstrapParams::parse_from_bytes(&bytes).ok();
        let params = params.filter(|params| params.instance_id == flags.id && params.namespace == flags.namespace);
        let options = match &params {
            Some(params) => {
                let mut extensions = params.extensions.iter().filter_map(|extension| extension.value.as_ref());
                extensions.find(|value| options::are_ours(value)).cloned()
            }
            None => Any::parse_from_bytes(&bytes).ok(),
        };
        Self { params, options, reads_json }
    }

    /// The configuration that the runtime's options name.
    pub fn config_path(&self) -> Option<PathBuf> {
        options::config_path(self.options.as_ref())
    }

    /// Where events go, if the caller says so here and not in the environment.
    pub fn ttrpc_address(&self) -> Option<&str> {
        let address = self.params.as_ref().map(|params| params.containerd_ttrpc_address.as_str());
        address.filter(|address| !address.is_empty())
    }

    /// What `start` prints. `major` finds out containerd's major version, if that matters; `is_member` is whether the
    /// container joins a pod that runs.
    pub fn answer(
        &self,
        address: &str,
        is_member: bool,
        major: impl FnOnce() -> Option<u32>,
    ) -> Result<Vec<u8>, protobuf::Error> {
        let version = |knows_pods: bool| if knows_pods && !is_member { WHOLE_POD } else { EACH_CONTAINER };
        if self.params.is_some() {
            let answer = BootstrapResult {
                version: version(true),
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            };
            return answer.write_to_bytes();
        }
        if !self.reads_json {
            return Ok(address.as_bytes().to_vec());
        }
        let version = version(!is_member && major().is_some_and(|major| major >= 2));
        Ok(serde_json::json!({ "version": version, "address": address, "protocol": "ttrpc" }).to_string().into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::bootstrap_api::Extension;
    use protobuf::MessageField;
    use std::ffi::OsString;

    const ADDRESS: &str = "unix:///run/x";

    fn flags() -> Flags {
        Flags::parse("-namespace k8s.io -id s1 start".split(' ').map(OsString::from)).unwrap()
    }

    fn options() -> Any {
        let value = b"\x0a\x01t\x12\x0b/etc/b.toml".to_vec();
        Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }
    }

    fn answer(caller: &Caller, is_member: bool, major: Option<u32>) -> String {
        String::from_utf8(caller.answer(ADDRESS, is_member, || major).unwrap()).unwrap()
    }

    #[test]
    fn containerd_1_6_and_crio_are_answered_with_a_plain_address() {
        for grpc in [None, Some("")] {
            let caller = Caller::read(std::io::empty(), grpc, &flags());
            assert_eq!(answer(&caller, false, Some(2)), ADDRESS);
        }
    }

    #[test]
    fn version_in_json_follows_containerds_and_a_member_its_pod() {
        let stdin = options().write_to_bytes().unwrap();
        let caller = Caller::read(stdin.as_slice(), Some("/run/containerd/containerd.sock"), &flags());
        assert_eq!(caller.config_path(), Some("/etc/b.toml".into()));
        for (is_member, major, version) in
            [(false, Some(1), 2), (false, None, 2), (false, Some(2), 3), (true, Some(2), 2)]
        {
            let answer: serde_json::Value = serde_json::from_str(&answer(&caller, is_member, major)).unwrap();
            assert_eq!(answer, serde_json::json!({"version": version, "address": ADDRESS, "protocol": "ttrpc"}));
        }
    }

    #[test]
    fn containerd_2_3_is_answered_in_its_own_form() {
        let asked = BootstrapParams {
            instance_id: "s1".into(),
            namespace: "k8s.io".into(),
            containerd_version: "2.3.0".into(),
            containerd_ttrpc_address: "/run/t".into(),
            // Options are one extension among others.
            extensions: [Any { type_url: "another.v1.Extension".into(), ..options() }, options()]
                .map(|value| Extension { value: MessageField::some(value), ..Extension::default() })
                .to_vec(),
            ..BootstrapParams::default()
        };
        let caller = Caller::read(asked.write_to_bytes().unwrap().as_slice(), Some("/run/g"), &flags());
        assert_eq!((caller.config_path(), caller.ttrpc_address()), (Some("/etc/b.toml".into()), Some("/run/t")));
        let bytes = caller.answer(ADDRESS, false, || None).unwrap();
        let answer = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!((answer.version, answer.address.as_str(), answer.protocol.as_str()), (3, ADDRESS, "ttrpc"));
    }

    #[test]
    fn request_for_another_instance_is_no_request() {
        let asked = BootstrapParams { instance_id: "s2".into(), namespace: "k8s.io".into(), ..Default::default() };
        let caller = Caller::read(asked.write_to_bytes().unwrap().as_slice(), None, &flags());
        assert_eq!(answer(&caller, false, None), ADDRESS);
    }
}
