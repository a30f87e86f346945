//! The operator's configuration, `/etc/bulkhead/config.toml`.
//!
//! Two types: [`RawConfig`] is what the file says, [`Config`] what is true after checking it against this node.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::vmspec::MAX_VCPUS;
use serde::Deserialize;

use crate::network::policy::Policy;

/// Where the configuration is unless somebody says otherwise.
pub const DEFAULT_PATH: &str = "/etc/bulkhead/config.toml";

/// Environment variable that names another file, for tests and for CRI-O.
pub const PATH_VARIABLE: &str = "BULKHEAD_CONFIG";

const LIB_DIR: &str = "/usr/lib/bulkhead";

/// Least boot memory in MiB: kernel, initramfs and agent need about half of it.
pub(crate) const LEAST_MEMORY_MIB: u64 = 64;

/// vCPUs of a pod that says nothing, unless the node has fewer or the file says otherwise: enough that one busy thread does not hold
/// up the others, few enough that a node of a hundred CPUs does not give each pod a hundred to bring online.
const FEW_VCPUS: u8 = 4;

/// What the file may say. An unknown key is an error: a misspelt limit must not be silently absent.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    vmm: Option<PathBuf>,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    default_vcpus: Option<u8>,
    max_vcpus: Option<u8>,
    default_memory_mib: Option<u64>,
    max_memory_mib: Option<u64>,
    kernel_params: Option<String>,
    annotations: Option<Vec<String>>,
    boot_timeout_s: Option<u64>,
    unsupported_network: Option<Policy>,
}

/// The configuration of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The VMM's binary.
    pub vmm: PathBuf,
    /// The guest's kernel, an uncompressed ELF file.
    pub kernel: PathBuf,
    /// The guest's image.
    pub initramfs: PathBuf,
    /// vCPUs of a pod that asks for fewer or for none; four, or what the node has, unless the file says otherwise.
    pub default_vcpus: u8,
    /// Most vCPUs of a pod; the node's, unless the file says otherwise.
    pub max_vcpus: u8,
    /// Memory in MiB that a pod begins with beyond the sum of its limits: for the guest's kernel and for containers without one.
    pub default_memory_mib: u64,
    /// Most memory of a pod in MiB.
    pub max_memory_mib: u64,
    /// The node.
    pub node: Node,
    /// Kernel parameters after our own.
    pub kernel_params: String,
    /// Which of our annotations pods may use.
    pub annotations: Vec<String>,
    /// How long a guest may take from the VMM's start until its agent listens.
    pub boot_timeout: Duration,
    /// What becomes of a pod whose network has something that a VM cannot be given.
    pub unsupported_network: Policy,
}

/// What a node has; a pod cannot use more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// CPUs that are online, at most as many as a VM can have.
    pub cpus: u8,
    /// Memory.
    pub memory_mib: u64,
}

impl Node {
    /// This node.
    pub fn here() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let pages = rustix::system::sysinfo().totalram;
        let unit = u64::from(rustix::system::sysinfo().mem_unit.max(1));
        Self { cpus: u8::try_from(cpus).unwrap_or(MAX_VCPUS).min(MAX_VCPUS), memory_mib: (pages * unit) >> 20 }
    }
}

impl Config {
    /// Reads the file that `path` names, else the one of [`PATH_VARIABLE`], else [`DEFAULT_PATH`], which may be absent.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let variable = std::env::var_os(PATH_VARIABLE).map(PathBuf::from);
        let named = path.map(Path::to_path_buf).or(variable);
        let may_be_absent = named.is_none();
        let path = named.unwrap_or_else(|| PathBuf::from(DEFAULT_PATH));
        let raw = match std::fs::read_to_string(&path) {
            Ok(text) => parse(&text).map_err(|(line, reason)| ConfigError::Parse { path, line, reason })?,
            Err(error) if may_be_absent && error.kind() == ErrorKind::NotFound => RawConfig::default(),
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        Self::validate(raw, Node::here())
    }

    /// Fills in defaults and checks the bounds. Pure.
    pub fn validate(raw: RawConfig, node: Node) -> Result<Self, ConfigError> {
        let lib = |name: &str| Path::new(LIB_DIR).join(name);
        let max_vcpus = raw.max_vcpus.unwrap_or(node.cpus.max(raw.default_vcpus.unwrap_or(1)));
        let config = Self {
            vmm: raw.vmm.unwrap_or_else(|| lib("bulkhead-vmm")),
            kernel: raw.kernel.unwrap_or_else(|| lib("vmlinux")),
            initramfs: raw.initramfs.unwrap_or_else(|| lib("initramfs.cpio")),
            default_vcpus: raw.default_vcpus.unwrap_or(FEW_VCPUS.min(node.cpus).min(max_vcpus)),
            max_vcpus,
            default_memory_mib: raw.default_memory_mib.unwrap_or(256),
            max_memory_mib: raw.max_memory_mib.unwrap_or(1 << 20),
            kernel_params: raw.kernel_params.unwrap_or_default(),
            node,
            annotations: raw.annotations.unwrap_or_default(),
            // Cold boots take well under a second on hardware; emulated CI nodes are some fifty times slower.
            boot_timeout: Duration::from_secs(raw.boot_timeout_s.unwrap_or(60)),
            unsupported_network: raw.unsupported_network.unwrap_or_default(),
        };
        let relative = [&config.vmm, &config.kernel, &config.initramfs].into_iter().find(|path| path.is_relative());
        if let Some(path) = relative {
            return Err(ConfigError::Relative(path.clone()));
        }
        bounded("default_vcpus", u64::from(config.default_vcpus), 1, u64::from(config.max_vcpus))?;
        bounded("max_vcpus", u64::from(config.max_vcpus), 1, u64::from(MAX_VCPUS))?;
        bounded("default_memory_mib", config.default_memory_mib, LEAST_MEMORY_MIB, config.max_memory_mib)?;
        bounded("boot_timeout_s", config.boot_timeout.as_secs(), 1, 3600)?;
        Ok(config)
    }
}

/// The library's own message is a picture of several lines; an operator gets one.
fn parse(text: &str) -> Result<RawConfig, (usize, String)> {
    toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        (before.matches('\n').count() + 1, error.message().trim().to_owned())
    })
}

pub(crate) fn bounded(what: &'static str, value: u64, least: u64, most: u64) -> Result<u64, ConfigError> {
    if (least..=most).contains(&value) { Ok(value) } else { Err(ConfigError::Bounds { what, value, least, most }) }
}

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read Bulkhead's configuration {path}; make it readable for root, or remove it for the defaults")]
    Read {
        /// The file.
        path: PathBuf,
        /// open(2) or read(2).
        #[source]
        source: std::io::Error,
    },
    /// Not TOML, or an unknown key.
    #[error("Bulkhead's configuration {path} is malformed, correct line {line}: {reason}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// Why, in TOML's words.
        reason: String,
    },
    /// A relative path would depend on who starts the shim.
    #[error("Bulkhead's configuration names {0}, a relative path; write an absolute one")]
    Relative(PathBuf),
    /// A number out of its bounds.
    #[error("{what} is {value} but must be {least} to {most}; change the pod or Bulkhead's configuration")]
    Bounds {
        /// Which number.
        what: &'static str,
        /// What it is.
        value: u64,
        /// Lower bound.
        least: u64,
        /// Upper bound.
        most: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Config, ConfigError> {
        Config::validate(toml::from_str(text).unwrap(), Node { cpus: 8, memory_mib: 16 << 10 })
    }

    #[test]
    fn empty_file_gives_the_defaults() {
        let config = config("").unwrap();
        assert_eq!(config.kernel, Path::new("/usr/lib/bulkhead/vmlinux"));
        assert_eq!((config.default_vcpus, config.max_vcpus, config.default_memory_mib), (4, 8, 256));
    }

    #[test]
    fn pods_without_limits_have_four_cpus_if_the_node_and_the_operator_have_as_many() {
        let default_vcpus = |text, cpus| {
            let node = Node { cpus, memory_mib: 16 << 10 };
            Config::validate(toml::from_str(text).unwrap(), node).unwrap().default_vcpus
        };
        assert_eq!([("", 8), ("", 2), ("", 1)].map(|(text, cpus)| default_vcpus(text, cpus)), [4, 2, 1]);
        assert_eq!(default_vcpus("max_vcpus = 3", 8), 3);
        assert_eq!(default_vcpus("max_vcpus = 8", 1), 1);
        assert_eq!(default_vcpus("default_vcpus = 6", 2), 6);
    }

    #[test]
    fn unknown_key_and_bad_bounds_are_refused() {
        let (line, reason) = parse("vmm = '/v'\nkernal = '/x'").unwrap_err();
        assert!(line == 2 && reason.contains("kernal") && !reason.contains('\n'), "{reason}");
        assert!(matches!(config("default_vcpus = 0"), Err(ConfigError::Bounds { what: "default_vcpus", .. })));
        assert!(matches!(config("max_vcpus = 65"), Err(ConfigError::Bounds { .. })));
        assert!(config("unsupported_network = 'warn'").is_ok_and(|config| config.unsupported_network == Policy::Warn));
        assert!(toml::from_str::<RawConfig>("unsupported_network = 'ignore'").is_err());
        assert!(matches!(config("kernel = 'vmlinux'"), Err(ConfigError::Relative(_))));
    }

    /// CRI-O leaves out a runtime whose configuration it does not take, and says so in its log alone (cri-o:
    /// pkg/config/config.go, RuntimeHandler).
    #[test]
    fn deployed_configuration_of_crio_has_nothing_that_it_refuses() {
        let deployed: toml::Table = toml::from_str(include_str!("../../../deploy/crio.conf")).unwrap();
        let handler = deployed["crio"]["runtime"]["runtimes"]["bulkhead"].as_table().unwrap();
        let keys: Vec<_> = handler.keys().map(String::as_str).collect();
        assert_eq!(keys, ["privileged_without_host_devices", "runtime_path", "runtime_root", "runtime_type"]);
        assert_eq!(handler["runtime_type"].as_str(), Some("vm"));
    }

    #[test]
    fn named_file_must_exist() {
        assert!(matches!(Config::load(Some(Path::new("/nonexistent/x"))), Err(ConfigError::Read { .. })));
    }
}
