//! FUSE's messages about locks (`struct fuse_lk_in` and others, include/uapi/linux/fuse.h).

use std::io;

use virtiofsd::fuse::{FileLock, LK_FLOCK, LkIn};

/// What a lock does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum How {
    /// Others may read too.
    Read,
    /// Nobody else may.
    Write,
    /// It is none any more.
    Unlock,
}

impl How {
    /// The number that it has in fcntl(2), which is the one of the message.
    pub fn number(self) -> u32 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Unlock => 2,
        }
    }

    fn parse(number: u32) -> io::Result<Self> {
        let known = [Self::Read, Self::Write, Self::Unlock].into_iter().find(|how| how.number() == number);
        known.ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Whether two owners cannot have these at once.
    pub fn excludes(self, other: Self) -> bool {
        self == Self::Write || other == Self::Write
    }
}

/// Bytes of a file, both ends included.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Span {
    /// The first.
    pub start: u64,
    /// The last.
    pub end: u64,
}

impl Span {
    /// The last byte that a file can have, OFFSET_MAX; a lock up to it goes on to the end of the file.
    pub const LAST: u64 = i64::MAX.cast_unsigned();

    /// Whether they have bytes in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }
}

/// What a guest asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wish {
    /// The file.
    pub node: u64,
    /// The open file through which it is asked.
    pub handle: u64,
    /// Who asks: a process for its POSIX locks, an open file for its own.
    pub owner: u64,
    /// flock(2): the whole file.
    pub whole: bool,
    /// Which lock.
    pub how: How,
    /// Of what.
    pub span: Span,
    /// The process, in the guest.
    pub pid: u32,
}

impl Wish {
    /// From a message; the error is what the guest is told.
    pub fn parse(node: u64, message: &LkIn) -> io::Result<Self> {
        let FileLock { start, end, type_, pid } = message.lk;
        if start > end || end > Span::LAST {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let whole = message.lk_flags & LK_FLOCK != 0;
        let span = if whole { Span { start: 0, end: Span::LAST } } else { Span { start, end } };
        Ok(Self { node, handle: message.fh, owner: message.owner, whole, how: How::parse(type_)?, span, pid })
    }

    /// Whether waiting for one is waiting for the other.
    pub fn is_like(&self, other: &Self) -> bool {
        let key = |wish: &Self| (wish.node, wish.whole, wish.how.number(), wish.span.start, wish.span.end);
        key(self) == key(other)
    }
}
