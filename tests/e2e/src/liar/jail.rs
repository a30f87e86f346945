//! The part of a VMM's jail that a shim relies on: a mount namespace whose root is the pod's share.
#![allow(unsafe_code)] // reason: unshare(2)

use std::os::fd::OwnedFd;

use anyhow::Result;
use rustix::fs::CWD;
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Locks the process into the share; to be called while it has one thread.
pub(super) fn enter(share: &OwnedFd) -> Result<()> {
    fchdir(share)?;
    // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) NEWNS changes nothing.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    let tree = open_tree(CWD, ".", OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    move_mount(&tree, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    fchdir(&tree)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    Ok(())
}
