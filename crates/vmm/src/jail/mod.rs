//! The jail: what a shim's VMM gives up before its guest runs (ARCHITECTURE.md, D1).
//!
//! [`enter`] is called once, before there is a second thread and before a byte of the guest's is looked at. From then on the
//! process has namespaces of its own (mount, network, IPC, UTS and cgroup; the shim has given it a pid namespace), its root is
//! the pod's share, which holds no device, no program and no /proc, and no privilege can come back. What is left is a matter
//! of the thread: each calls [`confine_thread`] first of all, which takes its capabilities away but for those that the file
//! server needs, and leaves it the system calls that its kind makes ([`seccomp`]).
//!
//! The order matters: the share is entered by its descriptor before the mount namespace is unshared, because the kernel
//! carries a process's working directory over into the new namespace, and no descriptor. One that stayed would lead out of the
//! jail (`openat(fd, "..")`), so the share's is closed and opened anew from inside, and what virtiofsd needs of /proc is a
//! mount of the directory of our own descriptors and nothing above it.
#![allow(unsafe_code)] // reason: unshare(2), mallopt(3); what `seccomp` needs it for is said there

mod landlock;
pub mod seccomp;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use bulkhead_protocol::node::FILE_SERVER_CAPABILITIES;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, mount_remount,
    move_mount, open_tree, unmount,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, fchdir, pivot_root, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use seccomp::Filters;
pub use seccomp::{FilterError, Kind};

/// What the file server's thread keeps, and no other.
const FILE_SERVER: CapabilitySet = CapabilitySet::from_bits_retain(FILE_SERVER_CAPABILITIES);

/// CAP_LAST_CAP of this kernel is not known without /proc; numbers beyond it are refused, which ends the search.
const MOST_CAPABILITIES: u32 = 63;

/// The jail that this process is in, if it is in one.
static JAIL: OnceLock<Jail> = OnceLock::new();

/// What a jailed process still needs of the outside.
pub struct Jail {
    /// The directory of our own descriptors, in which virtiofsd opens what it holds by descriptor anew.
    descriptors: OwnedFd,
    filters: Filters,
}

/// The jail that this process is in.
pub fn entered() -> Option<&'static Jail> {
    JAIL.get()
}

impl Jail {
    /// A copy of the descriptor of `/proc/self/fd`, without the rest of /proc.
    pub fn descriptors(&self) -> io::Result<OwnedFd> {
        self.descriptors.try_clone()
    }
}

/// Locks the process into `share`, or into an empty root if there is none. Returns the share as it is seen from inside.
///
/// Must be called before any other thread is started: namespaces and capabilities are a thread's.
pub fn enter(share: Option<OwnedFd>) -> Result<Option<OwnedFd>, JailError> {
    one_arena();
    let filters = Filters::compile()?;
    leave_memory_out_of_core_dumps();
    let descriptors =
        open_tree(CWD, c"/proc/self/fd", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
            .map_err(step("clone the mount of /proc/self/fd"))?;
    let shared = share.is_some();
    change_root(share)?;
    let inside =
        shared.then(|| rustix::fs::open(c"/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()));
    let inside = inside.transpose().map_err(step("open the share from inside"))?;
    limit_resources()?;
    drop_privileges()?;
    if !landlock::restrict(inside.as_ref())? {
        crate::vmm_log!(
            "the node's kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, lsm=landlock): the VMM's jail goes without it"
        );
    }
    seccomp::report_violations().map_err(JailError::Handler)?;
    if JAIL.set(Jail { descriptors, filters }).is_err() {
        return Err(JailError::Twice);
    }
    Ok(inside)
}

/// Leaves the calling thread what its kind needs. A thread that cannot be confined must not see the guest, so the process
/// ends. Does nothing outside of a jail.
pub fn confine_thread(kind: Kind) {
    let Some(jail) = entered() else { return };
    let kept = if kind == Kind::FileServer { FILE_SERVER } else { CapabilitySet::empty() };
    let confined = keep_capabilities(kept).map_err(JailError::from).and_then(|()| Ok(jail.filters.install(kind)?));
    if let Err(error) = confined {
        crate::vmm_log!("{}: {}", kind.name(), bulkhead_protocol::error::chain(&error));
        std::process::abort();
    }
}

/// One heap for all threads: less memory, and malloc(3) makes no system calls for more of them.
fn one_arena() {
    // SAFETY: mallopt takes two integers.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

fn change_root(share: Option<OwnedFd>) -> Result<(), JailError> {
    if let Some(share) = &share {
        fchdir(share).map_err(step("enter the share"))?;
    }
    let namespaces = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) these flags change nothing.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }.map_err(step("unshare the namespaces"))?;
    // What the shim mounts in the share later arrives here; nothing goes the other way.
    mount_change(c"/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(step("make the mounts those of the host's slaves"))?;
    if share.is_some() {
        // The share becomes a mount of its own, whatever directory it is.
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = open_tree(CWD, c".", flags).map_err(step("clone the mount of the share"))?;
        move_mount(&tree, c"", CWD, c".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(step("mount the share"))?;
        fchdir(&tree).map_err(step("enter the share's mount"))?;
    } else {
        mount(c"none", c"/proc", c"tmpfs", MountFlags::RDONLY, Some(c"size=4k"))
            .map_err(step("mount an empty root"))?;
        rustix::process::chdir(c"/proc").map_err(step("enter the empty root"))?;
    }
    // Both on one place: the old root lies on the new one and is taken off (pivot_root(2), notes).
    pivot_root(c".", c".").map_err(step("make the share the root"))?;
    unmount(c".", UnmountFlags::DETACH).map_err(step("unmount the host's root"))?;
    rustix::process::chdir(c"/").map_err(step("enter the new root"))?;
    harden_root().map_err(step("take devices and programs out of the root"))
}

/// No device, no set-user-id, no program; and nothing to write but in what is mounted below. The directories between belong to
/// the shim: a link that a guest planted there would be one for the shim's next mount.
fn harden_root() -> Result<(), Errno> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_remount(c"/", flags, c"")
}

/// No kind of mapping is in a core dump of the process from here on (core(5)), however it comes to be written, see
/// [`limit_resources`]. The guest's memory is marked besides (`memory::create_memory`).
fn leave_memory_out_of_core_dumps() {
    match std::fs::write("/proc/self/coredump_filter", "0") {
        Ok(()) => {}
        // A kernel without CONFIG_ELF_CORE writes none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        // A /proc that is read-only. It is one lock of several, and no reason to refuse the pod.
        Err(error) => crate::vmm_log!("cannot leave memory out of core dumps: /proc/self/coredump_filter: {error}"),
    }
}

/// The guest's memory is in this process: no core file and no crash handler of the host's gets it.
///
/// Making the process undumpable is not enough: whenever the file server takes on an owner's ids, the kernel resets the
/// attribute to fs.suid_dumpable (kernel/cred.c), which is 2 on hosts with a crash handler. So the limit must hold by itself.
/// It is 1 byte: less than the page that every core file has, and the only value at which the kernel does not start a handler
/// that is a pipe. With 0 it would start it (fs/coredump.c).
fn limit_resources() -> Result<(), JailError> {
    for (resource, most) in [(Resource::Core, 1), (Resource::Memlock, 0), (Resource::Msgqueue, 0)] {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
            .map_err(step("lower the resource limits"))?;
    }
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("refuse core dumps"))
}

fn drop_privileges() -> Result<(), JailError> {
    for number in 0..=MOST_CAPABILITIES {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if FILE_SERVER.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::INVAL) => break,
            Err(error) => return Err(step("shrink the bounding set")(error)),
        }
    }
    rustix::thread::clear_ambient_capability_set().map_err(step("clear the ambient capabilities"))?;
    keep_capabilities(FILE_SERVER).map_err(step("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(step("set no_new_privs"))
}

/// Drops the calling thread's capabilities but for these.
fn keep_capabilities(kept: CapabilitySet) -> Result<(), Errno> {
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)
}

fn step(what: &'static str) -> impl Fn(Errno) -> JailError {
    move |error| JailError::Step { what, source: error.into() }
}

/// The process cannot be jailed.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A system call.
    #[error("cannot set up the VMM's jail ({what}); the VMM needs root, Linux 5.12 or later, and /proc")]
    Step {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A thread's capabilities.
    #[error("cannot drop the thread's capabilities")]
    Capabilities(#[from] Errno),
    /// Landlock.
    #[error("Landlock refuses the VMM's rules")]
    Landlock(#[from] ::landlock::RulesetError),
    /// The filters.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// sigaction(2).
    #[error("cannot handle violations of the system call filters")]
    Handler(#[source] io::Error),
    /// A second call.
    #[error("the process is in a jail already")]
    Twice,
}
