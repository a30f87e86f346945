//! Locks of the host's kernel: on open file descriptions, fcntl_locking(2) and flock(2).
#![allow(unsafe_code)] // reason: fcntl(2) with struct flock

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{FlockOperation, Mode, OFlags, fcntl_getfl, flock, openat};

use super::request::{How, Span, Wish};

/// Opens a file once more, since locks belong to an open file. `descriptors` is the directory `/proc/self/fd`.
///
/// As it is open; but one that is open for writing alone is opened for reading too, so that its owner can have locks of
/// either kind. Never the other way round: on an overlay that would copy the whole file up.
pub fn reopen(descriptors: impl AsFd, file: &File) -> io::Result<File> {
    let name = file.as_raw_fd().to_string();
    let open = |access| {
        let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        openat(&descriptors, name.as_str(), flags, Mode::empty())
    };
    let opened = match fcntl_getfl(file)? & OFlags::ACCMODE {
        OFlags::RDONLY => open(OFlags::RDONLY),
        access => open(OFlags::RDWR).or_else(|_| open(access)),
    };
    Ok(File::from(opened?))
}

/// Whether a file is open for writing, so that it can have write locks.
pub fn is_writable(file: &File) -> bool {
    fcntl_getfl(file).is_ok_and(|flags| flags & OFlags::ACCMODE != OFlags::RDONLY)
}

/// Locks or unlocks a span of bytes, at once or not at all.
pub fn set(file: &File, how: How, span: Span) -> io::Result<()> {
    fcntl(file, libc::F_OFD_SETLK, how, span).map(drop)
}

/// The first lock that would be in the way.
pub fn conflict(file: &File, how: How, span: Span) -> io::Result<Option<(How, Span)>> {
    let found = fcntl(file, libc::F_OFD_GETLK, how, span)?;
    let start = u64::try_from(found.l_start).unwrap_or(0);
    let end = match u64::try_from(found.l_len) {
        Ok(len) if len > 0 => start.saturating_add(len - 1).min(Span::LAST),
        _ => Span::LAST,
    };
    let how = match libc::c_int::from(found.l_type) {
        libc::F_RDLCK => How::Read,
        libc::F_WRLCK => How::Write,
        _ => return Ok(None),
    };
    Ok(Some((how, Span { start, end })))
}

/// Locks or unlocks a file as a whole, at once or not at all. The file has lost the lock that it had if that is to become
/// another and cannot.
pub fn set_whole(file: &File, how: How) -> io::Result<()> {
    let operation = match how {
        How::Read => FlockOperation::NonBlockingLockShared,
        How::Write => FlockOperation::NonBlockingLockExclusive,
        How::Unlock => FlockOperation::NonBlockingUnlock,
    };
    Ok(flock(file, operation)?)
}

/// Waits until the file has the lock. A signal ends it.
pub fn wait(file: &File, wish: &Wish) -> io::Result<()> {
    if !wish.whole {
        return fcntl(file, libc::F_OFD_SETLKW, wish.how, wish.span).map(drop);
    }
    let operation = if wish.how == How::Read { FlockOperation::LockShared } else { FlockOperation::LockExclusive };
    Ok(flock(file, operation)?)
}

fn fcntl(file: &File, command: libc::c_int, how: How, span: Span) -> io::Result<libc::flock> {
    let offset = |at: u64| libc::off_t::try_from(at).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let kind = match how {
        How::Read => libc::F_RDLCK,
        How::Write => libc::F_WRLCK,
        How::Unlock => libc::F_UNLCK,
    };
    let mut lock = libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: offset(span.start)?,
        // 0 is to the end of the file, however long it becomes.
        l_len: if span.end >= Span::LAST { 0 } else { offset(span.end - span.start + 1)? },
        l_pid: 0,
    };
    // SAFETY: the kernel reads and writes one `struct flock`, and keeps no reference.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        0 => Ok(lock),
        _ => Err(io::Error::last_os_error()),
    }
}
