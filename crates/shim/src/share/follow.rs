//! Read-only volumes that get what the host mounts in them later (HostToContainer).
//!
//! The kernel would carry such a mount over with the host's flags, writable. So it is not left to the kernel: a thread waits for
//! changes of the node's mount table (proc_pid_mountinfo(5), poll(2)), and each mount that a slave of the volume would have got
//! is copied, made read-only and then attached; one that the host takes off is taken off.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::thread::Builder;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use rustix::pipe::{PipeFlags, pipe_with};

use super::jail::Jail;
use super::mountinfo::{MountPoint, points_below};
use super::tree::Tree;

/// Enough for system calls, paths, and a mount table on the heap.
const STACK: usize = 128 << 10;

/// The node's mounts below a directory, looked at before it is copied, so that nothing is missed.
#[derive(Debug)]
pub struct Watch {
    source: PathBuf,
    table: File,
    known: Vec<MountPoint>,
}

/// Has the thread go on until this is dropped.
#[derive(Debug)]
pub struct Following {
    _stop: OwnedFd,
}

impl Watch {
    /// Looks at a directory, whose path has no links.
    pub fn begin(source: &Path) -> std::io::Result<Self> {
        let mut table = File::open("/proc/thread-self/mountinfo")?;
        let known = look(&mut table, source)?;
        Ok(Self { source: source.to_path_buf(), table, known })
    }

    /// Follows the host from then on in the read-only copy that is at `target` for the VMM.
    pub fn follow(self, jail: Jail, target: PathBuf) -> std::io::Result<Following> {
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC)?;
        let Self { source, mut table, mut known } = self;
        let work = move || {
            while changed(&table, &stopped) {
                let Ok(now) = look(&mut table, &source) else { return };
                update(&jail, &source, &target, &known, &now);
                known = now;
            }
        };
        Builder::new().name("bulkhead-follow".to_owned()).stack_size(STACK).spawn(work)?;
        Ok(Following { _stop: stop })
    }
}

fn look(table: &mut File, source: &Path) -> std::io::Result<Vec<MountPoint>> {
    let mut text = Vec::new();
    table.seek(SeekFrom::Start(0))?;
    table.read_to_end(&mut text)?;
    Ok(points_below(&text, source))
}

/// Waits for a change; `false` if the volume is gone.
fn changed(table: &File, stopped: &OwnedFd) -> bool {
    loop {
        let mut polled = [PollFd::new(table, PollFlags::PRI), PollFd::new(stopped, PollFlags::IN)];
        match poll(&mut polled, None) {
            Err(Errno::INTR) => {}
            Ok(_) => return polled[1].revents().is_empty(),
            Err(_) => return false,
        }
    }
}

/// Repeats in the copy what the host has done, for mounts that propagate to a slave.
fn update(jail: &Jail, source: &Path, target: &Path, known: &[MountPoint], now: &[MountPoint]) {
    let ids = |points: &[MountPoint]| points.iter().map(|point| point.id).collect::<std::collections::BTreeSet<_>>();
    let (before, after) = (ids(known), ids(now));
    // What is mounted on another goes before that.
    let gone = known.iter().rev().filter(|point| point.propagates && !after.contains(&point.id));
    let come = now.iter().filter(|point| point.propagates && !before.contains(&point.id));
    for (point, is_there) in gone.map(|point| (point, false)).chain(come.map(|point| (point, true))) {
        let Ok(below) = point.path.strip_prefix(source) else { continue };
        let done = if is_there { attach(jail, &point.path, target, below) } else { detach(jail, target, below) };
        if let Err(error) = done {
            tracing::warn!(%error, mount = %point.path.display(), is_there, "a mount that came or went on the node cannot be followed in a read-only volume of the pod");
        }
    }
}

fn attach(jail: &Jail, source: &Path, target: &Path, below: &Path) -> std::io::Result<()> {
    let tree = Tree::copy_mount(source)?;
    tree.make_read_only()?;
    jail.enter(|| {
        let place = inside(target, below)?;
        let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&tree, "", &place, "", empty)
    })
}

fn detach(jail: &Jail, target: &Path, below: &Path) -> std::io::Result<()> {
    let (parent, name) = match (below.parent(), below.file_name()) {
        (Some(parent), Some(name)) => (parent, Path::new(name)),
        // On the volume itself.
        _ => (below, target),
    };
    jail.enter(|| {
        let unmounted = inside(target, parent).and_then(|parent| {
            rustix::process::fchdir(parent)?;
            unmount(name, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        });
        match unmounted {
            // Its place has been removed, or it was never there.
            Err(Errno::INVAL | Errno::NOENT) => Ok(()),
            done => done,
        }
    })
}

/// A directory or file of the volume. Whoever writes in it on the host could put a link on the way.
fn inside(target: &Path, below: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let volume = rustix::fs::openat(CWD, target, flags | OFlags::NOFOLLOW, Mode::empty())?;
    if below.components().next().is_none() {
        return Ok(volume);
    }
    // Only names: it comes from a mount table.
    if below.components().any(|part| !matches!(part, Component::Normal(_))) {
        return Err(Errno::INVAL);
    }
    rustix::fs::openat2(&volume, below, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}
