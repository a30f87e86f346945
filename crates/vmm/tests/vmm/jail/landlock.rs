//! Landlock's rules at work. What lies outside of the share has no path in the jail, so the process that tries it has kept
//! a descriptor that leads there.
#![allow(unsafe_code)] // reason: landlock_create_ruleset(2), unshare(2)

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use bulkhead_vmm::jail;
use rustix::fs::{AtFlags, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

use super::child::{self, CAME_THROUGH};

/// landlock(7): from which version of the interface on there are rules for files, for TCP, and for signals.
const FILES: i64 = 1;
const TCP: i64 = 4;
const SIGNALS: i64 = 6;

/// The version of the interface that this kernel has; a negative number if it has none.
fn version() -> i64 {
    const LANDLOCK_CREATE_RULESET_VERSION: u64 = 1;
    // SAFETY: without attributes and with this flag the call only answers with a number.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0_u64, 0_u64, LANDLOCK_CREATE_RULESET_VERSION) }
}

#[test]
fn hostile_19_landlock_allows_the_share_but_no_program_and_nothing_that_a_descriptor_leads_to() {
    if version() < FILES {
        println!("skipped: this kernel has no Landlock, or it is not enabled at boot (lsm=)");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    for directory in ["share", "outside"] {
        fs::create_dir(root.path().join(directory)).unwrap();
        fs::write(root.path().join(directory).join("file"), directory).unwrap();
    }
    fs::copy("/bin/true", root.path().join("outside/program")).unwrap();
    fs::create_dir(root.path().join("share/volume")).unwrap();
    let output = child::run("jail::landlock::jailed_process", root.path().to_str().unwrap());
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(CAME_THROUGH), "{text}");
    let left: Vec<_> = fs::read_dir(root.path().join("outside")).unwrap().flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
#[ignore = "the process that the test of Landlock looks at"]
fn jailed_process() {
    let Some(root) = child::input() else { return };
    let volume = Path::new(&root).join("share/volume");
    mount_for_this_thread(&volume);
    fs::copy("/bin/true", volume.join("program")).unwrap();
    let share = fs::File::open(Path::new(&root).join("share")).unwrap();
    let outside = fs::File::open(Path::new(&root).join("outside")).unwrap();
    let open = |flags, name: &str| openat(&outside, name, flags | OFlags::CLOEXEC, Mode::RUSR);
    let run = || {
        rustix::process::fchdir(&outside).unwrap();
        Command::new("./program").status()
    };
    let parent = rustix::process::getppid().unwrap();
    // Nothing but the jail is in the way of any of this.
    open(OFlags::RDWR, "file").unwrap();
    assert!(run().unwrap().success());
    TcpListener::bind("0.0.0.0:0").unwrap();
    rustix::process::test_kill_process(parent).unwrap();

    jail::enter(Some(share.into())).unwrap();

    assert_eq!(fs::read_to_string("/file").unwrap(), "share");
    fs::write("/volume/new", "").unwrap();
    fs::remove_file("/volume/new").unwrap();
    // The volume's mount would allow it.
    assert_eq!(Command::new("/volume/program").status().unwrap_err().kind(), ErrorKind::PermissionDenied);
    for flags in [OFlags::RDONLY, OFlags::WRONLY, OFlags::RDWR | OFlags::TRUNC] {
        assert_eq!(open(flags, "file").err(), Some(Errno::ACCESS), "{flags:?}");
    }
    assert_eq!(open(OFlags::RDONLY | OFlags::DIRECTORY, ".").err(), Some(Errno::ACCESS));
    assert_eq!(open(OFlags::WRONLY | OFlags::CREATE, "new").err(), Some(Errno::ACCESS));
    assert_eq!(rustix::fs::mkdirat(&outside, "new", Mode::RWXU), Err(Errno::ACCESS));
    assert_eq!(rustix::fs::symlinkat("/", &outside, "new"), Err(Errno::ACCESS));
    assert_eq!(rustix::fs::unlinkat(&outside, "file", AtFlags::empty()), Err(Errno::ACCESS));
    assert_eq!(run().unwrap_err().kind(), ErrorKind::PermissionDenied);
    if version() >= TCP {
        // Any port that takes no privilege.
        assert_eq!(TcpListener::bind("0.0.0.0:8080").unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    if version() >= SIGNALS {
        assert_eq!(rustix::process::test_kill_process(parent), Err(Errno::PERM));
    }
    std::process::exit(CAME_THROUGH);
}

/// Mounts what can be written and run, as a container's volume is, where no other process sees it.
fn mount_for_this_thread(place: &Path) {
    // SAFETY: descriptors stay as they are.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
    mount("none", place, "tmpfs", MountFlags::empty(), None).unwrap();
}
