//! HOME of a process whose environment has none.
//!
//! The C library would ask NSS, and a static one would load the container's own libraries for that (ARCHITECTURE.md, D6). So
//! this reads the passwd(5) file, as the process itself and inside of the container: a volume may be mounted over the image's,
//! and links lead where they lead there.

use std::io::Read;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

/// Most bytes of a passwd file that are read; the image's owner chooses its size.
const MAX_PASSWD: u64 = 1 << 20;

/// In place of HOME in the environment that libcontainer gets, which would ask the C library if there were none.
pub const PLACEHOLDER: &str = "HOME=(of the container's passwd file)";

/// Puts a user's home directory for the placeholder.
pub fn fill_in(env: &mut [String], uid: u32) {
    if let Some(home) = env.iter_mut().find(|pair| *pair == PLACEHOLDER) {
        *home = format!("HOME={}", find(Path::new("/"), uid));
    }
}

/// The home directory of a user in a root file system; "/" if it names none.
fn find(rootfs: &Path, uid: u32) -> String {
    read_passwd(rootfs).ok().and_then(|passwd| home_of(&passwd, uid)).unwrap_or_else(|| "/".into())
}

fn read_passwd(rootfs: &Path) -> std::io::Result<String> {
    let root = open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(&root, "etc/passwd", flags, Mode::empty(), resolve)?;
    if !rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode).is_file() {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file).take(MAX_PASSWD).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The sixth field of the first line whose third is the uid.
fn home_of(passwd: &str, uid: u32) -> Option<String> {
    let home = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.nth(2)?.parse() == Ok(uid);
        if found { fields.nth(2) } else { None }
    })?;
    (!home.is_empty()).then(|| home.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "# comment\nroot:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:33::/srv/web:/bin/false\nbare:x:34:34:::\n";

    #[test]
    fn home_is_the_sixth_field() {
        assert_eq!(home_of(PASSWD, 0).as_deref(), Some("/root"));
        assert_eq!(home_of(PASSWD, 33).as_deref(), Some("/srv/web"));
        assert_eq!(home_of(PASSWD, 34), None);
        assert_eq!(home_of(PASSWD, 99), None);
    }

    #[test]
    fn links_out_of_the_root_file_system_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", root.path().join("etc")).unwrap();
        assert_eq!(find(root.path(), 0), "/");
        std::fs::remove_file(root.path().join("etc")).unwrap();
        std::fs::create_dir_all(root.path().join("real")).unwrap();
        std::fs::write(root.path().join("real/passwd"), PASSWD).unwrap();
        std::os::unix::fs::symlink("/real", root.path().join("etc")).unwrap();
        assert_eq!(find(root.path(), 33), "/srv/web");
    }
}
