//! Kernel parameters of the pod's namespace: what CNI's plugins (tuning) have set, and what the node gives every namespace.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bulkhead_protocol::agent::{Sysctl, Sysctls};

use super::links::{Link, Role};

const NET: &str = "/proc/sys/net";

/// Longest value that is carried. None is longer, but for a range of ports or CPUs that somebody has made of single ones.
const MAX_VALUE: usize = 4096;

/// Parameters that are not carried: what is no value but an action, secrets of a namespace, logs of the host, what names CPUs of
/// the host, and what a link's own message says.
const LEFT: [&str; 6] =
    ["flush", "tcp_fastopen_key", "nf_log", "rps_default_mask", "addr_gen_mode", "nf_conntrack_buckets"];

/// Directories with one directory for each link.
const OF_LINKS: [&str; 4] = ["ipv4/conf", "ipv6/conf", "ipv4/neigh", "ipv6/neigh"];

/// Reads those of the calling thread's namespace that a guest with these links may have. One for all links comes before those
/// of each, which it changes.
pub fn read(links: &[&Link], whole: bool) -> Sysctls {
    let mut found = Vec::new();
    if whole {
        tree(Path::new(NET), &mut found, &|dir| !OF_LINKS.iter().any(|of| dir.ends_with(of)));
        for name in ["all", "default", "lo"] {
            each(name, &mut found);
        }
    }
    for link in links.iter().filter(|link| link.role != Role::Loopback) {
        each(&link.name, &mut found);
    }
    Sysctls { sysctls: found, ..Sysctls::default() }
}

fn each(link: &str, found: &mut Vec<Sysctl>) {
    for dir in OF_LINKS {
        tree(&Path::new(NET).join(dir).join(link), found, &|_| true);
    }
}

fn tree(dir: &Path, found: &mut Vec<Sysctl>, enter: &impl Fn(&Path) -> bool) {
    let mut entries: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        if LEFT.iter().any(|left| entry.file_name() == **left) {
            continue;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() && enter(&path) => tree(&path, found, enter),
            Ok(kind) if kind.is_file() => found.extend(value(&path)),
            _ => {}
        }
    }
}

/// A parameter that can be read and set. One that nobody has given a value cannot be read.
fn value(path: &Path) -> Option<Sysctl> {
    const SET: u32 = 0o200;
    if fs::metadata(path).ok()?.permissions().mode() & SET == 0 {
        return None;
    }
    let name = path.strip_prefix("/proc/sys").ok()?.to_str()?.to_owned();
    let value = fs::read_to_string(path).ok()?.trim_end().to_owned();
    let sysctl = Sysctl { name, value, ..Sysctl::default() };
    Some(sysctl).filter(|sysctl| !sysctl.value.is_empty() && sysctl.value.len() <= MAX_VALUE)
}
