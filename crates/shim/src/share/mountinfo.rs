//! Mount points below a directory, from /proc/thread-self/mountinfo (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The mount points at or below `path`, each as often as something is mounted there.
pub fn mounts_below(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let table = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(mount_points(&table).filter(|point| point.starts_with(path)).collect())
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
    fn root_has_mounts() {
        assert!(!mounts_below(Path::new("/")).unwrap().is_empty());
    }
}
