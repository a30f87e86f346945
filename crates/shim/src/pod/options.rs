//! Runtime options as containerd hands them to a runtime that is not runc: `runtimeoptions.v1.Options`
//! (containerd: api/types/runtimeoptions/v1/api.proto: 1 type_url, 2 config_path, 3 config_body).

use std::path::PathBuf;

use protobuf::well_known_types::any::Any;
use protobuf::{CodedInputStream, rt::WireType};

/// Whether these are options of ours. Those of another type say nothing to us.
pub fn are_ours(options: &Any) -> bool {
    options.type_url.ends_with("runtimeoptions.v1.Options")
}

/// The path of the configuration, if the options name one.
pub fn config_path(options: Option<&Any>) -> Option<PathBuf> {
    let options = options.filter(|options| are_ours(options))?;
    let path = field(&options.value, 2).ok()??;
    (!path.is_empty()).then(|| PathBuf::from(path))
}

fn field(bytes: &[u8], wanted: u32) -> protobuf::Result<Option<String>> {
    let mut input = CodedInputStream::from_bytes(bytes);
    let mut found = None;
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let (number, wire) = (tag >> 3, WireType::new(tag & 7));
        match wire {
            Some(WireType::LengthDelimited) if number == wanted => found = Some(input.read_string()?),
            Some(wire) => input.skip_field(wire)?,
            None => return Ok(None),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any { type_url: type_url.into(), value: value.to_vec(), ..Any::default() }
    }

    #[test]
    fn path_is_read_from_our_options_alone() {
        let value = b"\x0a\x01t\x12\x0b/etc/b.toml";
        assert_eq!(config_path(Some(&any("runtimeoptions.v1.Options", value))), Some("/etc/b.toml".into()));
        assert_eq!(config_path(Some(&any("containerd.runc.v1.Options", value))), None);
        assert_eq!(config_path(Some(&any("runtimeoptions.v1.Options", b"\x12\xff"))), None);
        assert_eq!(config_path(None), None);
    }
}
