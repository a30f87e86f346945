//! Mount points below a directory, from /proc/thread-self/mountinfo (proc_pid_mountinfo(5)).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The mount points at or below `path`, each as often as something is mounted there.
pub fn mounts_below(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(mount_points(&table).filter(|point| point.starts_with(path)).collect())
}

/// A mount of the node.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct MountPoint {
    /// The kernel's number for it, which another one may have when it is gone.
    pub id: u64,
    /// Where it is.
    pub path: PathBuf,
    /// Whether it was carried over to slaves of the mount that it is mounted on: that is shared.
    pub propagates: bool,
}

/// The mounts of a table at or below `path`.
pub fn points_below(table: &[u8], path: &Path) -> Vec<MountPoint> {
    let lines = || {
        table.split(|byte| *byte == b'\n').filter_map(|line| {
            let fields: Vec<_> = line.split(|byte| *byte == b' ').collect();
            let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u64>().ok();
            let optional = fields.get(6..)?.iter().take_while(|field| **field != b"-");
            let shared = optional.clone().any(|field| field.starts_with(b"shared:"));
            Some((number(fields.first()?)?, number(fields.get(1)?)?, unescape(fields.get(4)?), shared))
        })
    };
    let shared: BTreeSet<_> = lines().filter(|(.., shared)| *shared).map(|(id, ..)| id).collect();
    let below = lines().filter(|(_, _, point, _)| point.starts_with(path));
    below.map(|(id, parent, path, _)| MountPoint { id, path, propagates: shared.contains(&parent) }).collect()
}

/// Where in its file system a path is that has no links and dots.
pub fn place_in_file_system(path: &Path) -> std::io::Result<Option<PathBuf>> {
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(place(&table, path))
}

fn place(table: &[u8], path: &Path) -> Option<PathBuf> {
    let mounts = table.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(3).map(unescape);
        Some((fields.next()?, fields.next()?))
    });
    // The innermost mount, and of several at one place the last one, which hides the others.
    let (root, point) =
        mounts.filter(|(_, point)| path.starts_with(point)).max_by_key(|(_, point)| point.components().count())?;
    Some(root.join(path.strip_prefix(point).ok()?))
}

fn mount_points(table: &[u8]) -> impl Iterator<Item = PathBuf> + '_ {
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4)).map(unescape)
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.get(..3).filter(|_| *first == b'\\').and_then(octal);
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_paths_are_read() {
        let table = b"36 35 98:0 /mnt1 /run/a\\040b rw,noatime master:1 - ext3 /dev/root rw\n37 36 0:1 / /run/c\\134 rw - t t rw\n";
        let points: Vec<_> = mount_points(table).collect();
        assert_eq!(points, [PathBuf::from("/run/a b"), PathBuf::from("/run/c\\")]);
    }

    #[test]
    fn place_is_told_by_the_innermost_and_last_mount() {
        let table = b"1 0 8:0 / / rw - a a rw\n2 1 8:1 /sub /mnt rw - b b rw\n3 2 8:2 /x /mnt/in rw - c c rw\n4 3 8:3 /y /mnt/in rw - d d rw\n";
        for (path, wanted) in [("/etc/x", "/etc/x"), ("/mnt/a", "/sub/a"), ("/mnt/in/b", "/y/b"), ("/mnt/in", "/y/")] {
            assert_eq!(place(table, Path::new(path)), Some(PathBuf::from(wanted)));
        }
    }

    #[test]
    fn mounts_are_carried_over_where_what_they_are_mounted_on_is_shared() {
        let table = b"1 0 8:0 / / rw shared:1 - a a rw\n2 1 8:1 / /v rw master:1 - b b rw\n3 2 8:2 / /v/x rw - c c rw\n4 1 8:3 / /w rw - d d rw\nnonsense\n";
        let found: Vec<_> =
            points_below(table, Path::new("/v")).into_iter().map(|point| (point.id, point.propagates)).collect();
        assert_eq!(found, [(2, true), (3, false)]);
    }

    #[test]
    fn root_has_mounts() {
        assert!(!mounts_below(Path::new("/")).unwrap().is_empty());
    }
}
