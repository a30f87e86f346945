//! The first moments of a guest: mounts, the root that containers can leave, the cgroup hierarchy.
//!
//! Nothing here depends on the pod (ARCHITECTURE.md, D7): a template is made of a guest that has come through this and
//! waits. Everything here is paid before the guest is ready, so it does no more than it must.

use std::convert::Infallible;
use std::io;

use rustix::fs::{Mode, mkdir};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move, mount_remount};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::cgroup::{self, CgroupError};
use crate::listen::{self, ListenError};
use crate::log;
use crate::runtime::zygote;
use crate::sandbox::sysctl;
use crate::sys;

/// Level of the agent's log, on the kernel command line: `bulkhead.log=debug`. The dot makes the kernel keep it to itself.
const LOG_PARAMETER: &str = "bulkhead.log=";

/// Runs as PID 1. Returns only with an error, and the guest ends then.
pub fn init() -> Result<Infallible, BootError> {
    let kernel_boot = sys::since_boot();
    leave_rootfs().map_err(BootError::Root)?;
    mount_file_systems()?;
    lock_root().map_err(BootError::Root)?;
    raise_limits();
    cgroup::prepare_hierarchy()?;
    let zygote = zygote::start().map_err(BootError::Zygote)?;
    start_log(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default());
    // By default the kernel refuses what is more at once than the memory that there is, which grows here when it is used.
    sysctl::follow("vm.overcommit_memory", "1");
    listen::serve_vsock(zygote, kernel_boot).map_err(Into::into)
}

/// Puts a mount with a parent in place of the initramfs' root.
///
/// pivot_root(2) refuses to move the rootfs mount, and containers are entered by pivot_root. So the root is bound to a
/// directory of itself, moved over the old root, and made this process's root.
fn leave_rootfs() -> io::Result<()> {
    const NEW_ROOT: &str = "/.root";
    make_dir(NEW_ROOT)?;
    mount_bind("/", NEW_ROOT)?;
    std::env::set_current_dir(NEW_ROOT)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Makes the root read-only: all that it holds is the agent's program, which a container must not be able to change by way
/// of /proc/self/exe (CVE-2019-5736 was that). What the agent writes is below /run.
fn lock_root() -> io::Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    mount_remount("/", flags, c"").map_err(Into::into)
}

/// One mount of the guest.
struct FileSystem {
    kind: &'static str,
    target: &'static str,
    flags: MountFlags,
    data: Option<&'static std::ffi::CStr>,
    /// Without an optional one the guest does less, but works.
    optional: bool,
}

const fn required(kind: &'static str, target: &'static str, flags: MountFlags) -> FileSystem {
    FileSystem { kind, target, flags, data: None, optional: false }
}

fn file_systems() -> [FileSystem; 9] {
    let safe = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);
    [
        required("proc", "/proc", safe),
        required("sysfs", "/sys", safe),
        required("devtmpfs", "/dev", MountFlags::NOSUID),
        FileSystem {
            data: Some(c"ptmxmode=0666,mode=0620,gid=5"),
            ..required("devpts", "/dev/pts", MountFlags::NOSUID.union(MountFlags::NOEXEC))
        },
        FileSystem { optional: true, ..required("mqueue", "/dev/mqueue", safe) },
        required("tmpfs", "/dev/shm", MountFlags::NOSUID.union(MountFlags::NODEV)),
        FileSystem {
            data: Some(c"mode=0755"),
            ..required("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV))
        },
        required("tmpfs", "/tmp", MountFlags::NOSUID.union(MountFlags::NODEV)),
        required("cgroup2", cgroup::ROOT, safe),
    ]
}

fn mount_file_systems() -> Result<(), BootError> {
    for fs in file_systems() {
        let mounted = make_dir(fs.target).and_then(|()| match mount(fs.kind, fs.target, fs.kind, fs.flags, fs.data) {
            // The kernel, or entry.rs, was here first.
            Err(Errno::BUSY) => Ok(()),
            other => other.map_err(Into::into),
        });
        match mounted {
            Err(source) if !fs.optional => return Err(BootError::Mount { kind: fs.kind, target: fs.target, source }),
            _ => {}
        }
    }
    Ok(())
}

fn make_dir(path: &str) -> io::Result<()> {
    match mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Most descriptors of a process in a container whose spec does not say: what containerd's service file gives on a host.
const MAX_OPEN_FILES: u64 = 1 << 20;

/// Most signals queued for a user, timers included (timer_create(2) takes one): the kernel's own follows from its memory, and
/// a small guest would have hundreds where a node has this and more.
const MAX_PENDING_SIGNALS: u64 = 1 << 15;

/// Resource limits are inherited, and the kernel's for init are small. Core dumps are as large as they are, as by containerd's
/// service file; the kernel's own core_pattern puts them where the process works, in the container.
fn raise_limits() {
    let limit = |count| Rlimit { current: count, maximum: count };
    let _ = setrlimit(Resource::Nofile, limit(Some(MAX_OPEN_FILES)));
    let _ = setrlimit(Resource::Nproc, limit(None));
    let _ = setrlimit(Resource::Core, limit(None));
    let _ = setrlimit(Resource::Sigpending, limit(Some(MAX_PENDING_SIGNALS)));
}

/// Starts logging to the console, warnings and worse unless the kernel command line says otherwise.
fn start_log(cmdline: &str) {
    let level = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix(LOG_PARAMETER))
        .and_then(|level| level.parse().ok())
        .unwrap_or(tracing::Level::WARN);
    log::to_stderr(level);
}

/// The guest cannot come up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The root mount.
    #[error("cannot make a root mount that containers can be moved out of; the agent must be init of an initramfs")]
    Root(#[source] io::Error),
    /// A file system of the kernel's.
    #[error("cannot mount {kind} at {target}; is it built into the guest kernel?")]
    Mount { kind: &'static str, target: &'static str, source: io::Error },
    /// The cgroup hierarchy.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Helpers.
    #[error("cannot fork the process that makes helpers")]
    Zygote(#[source] io::Error),
    /// The ports.
    #[error(transparent)]
    Listen(#[from] ListenError),
}
