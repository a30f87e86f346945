//! The process that forks placeholders. It is a copy of the daemon and never executes another program, so that a placeholder
//! costs a fork of little memory; and it has one thread, so that it may change namespaces that a process with several may not.
//!
//! It allocates nothing and calls no library that might: a test forks it from a process with threads.
#![allow(unsafe_code)] // reason: fork(2), clone(2), prctl(2) and close_range(2)

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendFlags, recvmsg, sendmsg,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

/// Longest command line that is shown, in bytes; the rest is cut off.
pub const MAX_TITLE: usize = 4096;

/// Requests, by their first byte. Each comes with a descriptor: the network namespace to enter.
pub const ENTER: u8 = 1;
/// The same, and placeholders have a user namespace.
pub const ENTER_WITH_USERS: u8 = 2;
/// The reading end of a pipe whose other end keeps the placeholder; the command line follows.
pub const HOLD: u8 = 3;

/// Its own command line.
const NAME: &[u8] = b"containerd-shim-bulkhead-v2\0keeper\0";

/// Forks the keeper, which serves a socket to its end.
pub fn fork(socket: OwnedFd) -> std::io::Result<()> {
    // SAFETY: the child calls what is async-signal-safe alone, and ends without returning.
    match unsafe { libc::fork() } {
        0 => {
            serve(socket);
            // SAFETY: ends this process.
            unsafe { libc::_exit(0) }
        }
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Answers requests until nobody can ask any more.
fn serve(socket: OwnedFd) {
    close_all_but(socket.as_raw_fd());
    // SAFETY: as a disposition this asks the kernel to reap children by itself.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    let mut request = [0; 1 + MAX_TITLE];
    let title = request.as_ptr().wrapping_add(1).addr();
    // The command line is in the request: each placeholder has a copy of this process's memory, and it is this one's again then.
    set_memory_map(libc::PR_SET_MM_ARG_START, title);
    let mut users = 0;
    loop {
        for (to, from) in request.iter_mut().skip(1).zip(NAME) {
            *to = *from;
        }
        set_memory_map(libc::PR_SET_MM_ARG_END, title.wrapping_add(NAME.len()));
        let Some((length, fd)) = receive(&socket, &mut request) else { return };
        let answer = match (request.first(), fd) {
            (Some(&kind @ (ENTER | ENTER_WITH_USERS)), Some(netns)) => {
                users = if kind == ENTER { 0 } else { libc::CLONE_NEWUSER };
                enter(&netns).map(|()| 0)
            }
            (Some(&HOLD), Some(alive)) => {
                set_memory_map(libc::PR_SET_MM_ARG_END, title.wrapping_add(length.saturating_sub(1)));
                placeholder(&socket, &alive, users)
            }
            _ => Err(Errno::INVAL),
        };
        let answer = answer.unwrap_or_else(|error| error.raw_os_error().saturating_neg()).to_ne_bytes();
        let mut none = SendAncillaryBuffer::default();
        if sendmsg(&socket, &[IoSlice::new(&answer)], &mut none, SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}

/// The next request's length and descriptor.
fn receive(socket: &OwnedFd, request: &mut [u8]) -> Option<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(request)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Ok(received) if received.bytes > 0 => break received,
            _ => return None,
        }
    };
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            fd = fds.next();
        }
    }
    Some((received.bytes, fd))
}

/// Leaves the node's namespaces, those of users and processes aside, which each placeholder leaves for itself.
fn enter(netns: &OwnedFd) -> Result<(), Errno> {
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
    let flags = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNS | UnshareFlags::NEWCGROUP;
    // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) these flags change nothing.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    leave_files()
}

/// Has an empty file system for the root and nothing else mounted: a mount of the node's here would keep it from being removed
/// there, and what somebody mounts here must not be mounted there.
fn leave_files() -> Result<(), Errno> {
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // What a hook makes here is of no use and must not take the node's memory.
    fsconfig_set_string(context.as_fd(), c"size", c"64k")?;
    fsconfig_set_string(context.as_fd(), c"nr_inodes", c"64")?;
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let empty = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    move_mount(empty.as_fd(), c"", rustix::fs::CWD, c"/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    // By its descriptor, as "/" still leads to what is below it; then the two change places, and the old root is on top
    // (pivot_root(2)).
    rustix::process::fchdir(&empty)?;
    rustix::process::pivot_root(c".", c".")?;
    unmount(c".", UnmountFlags::DETACH)?;
    rustix::process::chdir(c"/")
}

/// Forks a placeholder and answers its pid.
fn placeholder(socket: &OwnedFd, alive: &OwnedFd, users: libc::c_int) -> Result<i32, Errno> {
    let flags = libc::c_long::from(libc::CLONE_NEWPID | users | libc::SIGCHLD);
    // SAFETY: without a stack of its own and without shared memory this is a fork. The child makes system calls alone, and ends
    // without returning.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize) } {
        0 => {
            let _ = rustix::thread::set_name(c"bulkhead-task");
            // SAFETY: the socket is the parent's; here nobody uses it any more.
            unsafe { libc::close(socket.as_raw_fd()) };
            while rustix::io::read(alive, &mut [0_u8; 1]) == Err(Errno::INTR) {}
            // SAFETY: ends this process.
            unsafe { libc::_exit(0) }
        }
        pid if pid > 0 => i32::try_from(pid).map_err(|_| Errno::OVERFLOW),
        _ => Err(Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))),
    }
}

/// Sets a field of what the kernel knows of the process's memory (PR_SET_MM of prctl(2)). Without the capability for it the
/// command line stays the daemon's.
fn set_memory_map(field: libc::c_int, address: usize) {
    // SAFETY: /proc shows what is there; nothing else in the process depends on it.
    unsafe { libc::prctl(libc::PR_SET_MM, field, address, 0_usize, 0_usize) };
}

/// Closes what the daemon has open, its standard streams included.
fn close_all_but(kept: RawFd) {
    let Ok(kept) = libc::c_uint::try_from(kept) else { return };
    for (first, last) in [(0, kept.checked_sub(1)), (kept.saturating_add(1), Some(libc::c_uint::MAX))] {
        if let Some(last) = last {
            // SAFETY: descriptors of the daemon's that nothing in this copy of it uses.
            unsafe { libc::close_range(first, last, 0) };
        }
    }
}
