//! The shim's command line. containerd writes Go flags, `-namespace k8s.io -id x start`, which clap does not read
//! (containerd: pkg/shim/shim.go, Go's package flag).

use std::ffi::OsString;
use std::path::PathBuf;

use bulkhead_protocol::guest::{MAX_IDENTIFIER, is_identifier};

/// What the binary is asked to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Start or find the daemon of the container's pod, print its address.
    Start,
    /// Clean up what a dead shim left.
    Delete,
    /// Clean up what all dead shims of the node left. Not part of containerd's contract: `bulkhead clean` runs it.
    Clean,
    /// Be the daemon. Not part of containerd's contract: `start` runs it.
    Serve,
    /// Print the version.
    Version,
    /// Print a `RuntimeInfo`.
    Info,
    /// Print the features alone, as runc does.
    Features,
}

/// The parsed command line.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Flags {
    /// The action.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's GRPC socket.
    pub address: String,
    /// containerd's binary.
    pub publish_binary: String,
    /// The container's id; for the daemon the sandbox's.
    pub id: String,
    /// The bundle; only given with `delete`, otherwise the working directory is it.
    pub bundle: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
    /// Where the daemon listens. Go shims have the flag too.
    pub socket: String,
}

/// A command line that is not containerd's.
#[derive(Debug, thiserror::Error, Eq, PartialEq)]
pub enum FlagsError {
    /// Not a flag of the contract.
    #[error("unknown flag -{0}; containerd starts this binary, it is not meant to be run by hand (try -v)")]
    Unknown(String),
    /// A flag without its value.
    #[error("flag -{0} needs a value")]
    NoValue(String),
    /// A boolean flag with something else.
    #[error("flag -{0} is true or false")]
    NotBoolean(String),
    /// Not UTF-8.
    #[error("an argument is not UTF-8")]
    NotUtf8,
    /// No action, or an unknown one.
    #[error("unknown action {0:?}; expected start or delete")]
    Action(String),
    /// An id that could not be a file name.
    #[error(
        "-{0} {1:?} is not an identifier of containerd (letters and digits with single . _ or - between them, at most {MAX_IDENTIFIER})"
    )]
    Identifier(&'static str, String),
}

impl Flags {
    /// Parses the arguments after the binary's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, FlagsError> {
        let mut flags = Self::empty();
        let mut args = args.into_iter();
        let mut action = None;
        while let Some(arg) = args.next() {
            let arg = arg.into_string().map_err(|_| FlagsError::NotUtf8)?;
            let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                // Go's flag package stops at the first argument that is no flag.
                action = Some(arg);
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            if flags.set_boolean(name, inline.as_deref())? {
                continue;
            }
            let value = match inline {
                Some(value) => value,
                None => next_value(&mut args, name)?,
            };
            flags.set(name, value)?;
        }
        flags.finish(action)
    }

    fn empty() -> Self {
        Self {
            action: Action::Serve,
            namespace: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            id: String::new(),
            bundle: None,
            debug: false,
            socket: String::new(),
        }
    }

    /// Returns whether the flag is a boolean one.
    fn set_boolean(&mut self, name: &str, inline: Option<&str>) -> Result<bool, FlagsError> {
        let on = match inline {
            None | Some("true" | "1" | "t") => true,
            Some("false" | "0" | "f") => false,
            Some(_) if name == "debug" || name == "info" || is_version(name) => {
                return Err(FlagsError::NotBoolean(name.to_owned()));
            }
            Some(_) => return Ok(false),
        };
        match name {
            "debug" => self.debug = on,
            "info" if on => self.action = Action::Info,
            "info" => {}
            name if is_version(name) => {
                if on {
                    self.action = Action::Version;
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), FlagsError> {
        match name {
            "namespace" => self.namespace = value,
            "address" => self.address = value,
            "publish-binary" => self.publish_binary = value,
            "id" => self.id = value,
            "bundle" => self.bundle = Some(PathBuf::from(value)),
            "socket" => self.socket = value,
            "debug-socket" => {}
            other => return Err(FlagsError::Unknown(other.to_owned())),
        }
        Ok(())
    }

    fn finish(mut self, action: Option<String>) -> Result<Self, FlagsError> {
        if matches!(self.action, Action::Version | Action::Info) {
            return Ok(self);
        }
        if action.as_deref() == Some("clean") {
            return Ok(Self { action: Action::Clean, ..self });
        }
        self.action = match action.as_deref() {
            Some("version") => return Ok(Self { action: Action::Version, ..self }),
            Some("features") => return Ok(Self { action: Action::Features, ..self }),
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some("serve") => Action::Serve,
            other => return Err(FlagsError::Action(other.unwrap_or_default().to_owned())),
        };
        check_identifier("id", &self.id)?;
        check_identifier("namespace", &self.namespace)?;
        Ok(self)
    }
}

/// However it is asked for: containerd writes `-v`, CRI-O `--version`.
fn is_version(flag: &str) -> bool {
    matches!(flag, "v" | "V" | "version")
}

fn next_value(args: &mut impl Iterator<Item = OsString>, name: &str) -> Result<String, FlagsError> {
    let value = args.next().ok_or_else(|| FlagsError::NoValue(name.to_owned()))?;
    value.into_string().map_err(|_| FlagsError::NotUtf8)
}

fn check_identifier(flag: &'static str, value: &str) -> Result<(), FlagsError> {
    if is_identifier(value) { Ok(()) } else { Err(FlagsError::Identifier(flag, value.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, FlagsError> {
        Flags::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_start_line_is_read() {
        let flags = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id c1 start",
        )
        .unwrap();
        assert_eq!((flags.action, flags.id.as_str(), flags.namespace.as_str()), (Action::Start, "c1", "k8s.io"));
        assert!(!flags.debug);
    }

    #[test]
    fn delete_has_a_bundle_and_double_dashes_work() {
        let flags = parse("--namespace=default --id a -bundle /b -debug delete").unwrap();
        assert_eq!((flags.action, flags.bundle), (Action::Delete, Some(PathBuf::from("/b"))));
        assert!(flags.debug);
    }

    #[test]
    fn version_and_cleaning_need_nothing_else() {
        for line in ["-v", "--v", "-V", "-version", "--version", "--version=true", "-debug -version", "version"] {
            assert_eq!(parse(line).unwrap().action, Action::Version, "{line}");
        }
        assert!(parse("--version=false").is_err(), "that asks for nothing");
        assert_eq!(parse("features").unwrap().action, Action::Features);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("clean").unwrap().action, Action::Clean);
    }

    #[test]
    fn bad_lines_are_refused() {
        assert_eq!(parse("-id"), Err(FlagsError::NoValue("id".into())));
        assert_eq!(parse("-what x start"), Err(FlagsError::Unknown("what".into())));
        assert!(matches!(parse("-id a -namespace b stop"), Err(FlagsError::Action(_))));
        assert!(matches!(parse("-id ../../etc -namespace b start"), Err(FlagsError::Identifier("id", _))));
        assert!(matches!(parse("-namespace b start"), Err(FlagsError::Identifier("id", _))));
        assert!(matches!(parse("-id a -namespace b -debug=maybe start"), Err(FlagsError::NotBoolean(_))));
    }
}
