//! What a guest may not ask of the host's file system, whatever virtiofsd would do.
//!
//! virtiofsd relies on being locked into its share: it passes names to the kernel as they come. A name such as
//! `../../etc/x` or `/etc/x` must not depend on that lock alone, so every name is checked here, behind the parser, where
//! the guest cannot change it any more. Device nodes and the host's security labels are refused too.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, futimens};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, InHeader, SetattrIn};
use virtiofsd::oslib::ReadvFlags;

use super::locks::{Locks, OpenFiles};
use super::pages::Pages;
use super::private::{FOR_EVER, Private};

/// A file system whose guest is not trusted.
pub struct Guard<F, Reply> {
    inner: Arc<F>,
    pages: Pages,
    private: Private,
    locks: Arc<Locks<Reply>>,
}

/// The open files of a file system, for what it does not do itself.
pub struct Opened<F>(pub Arc<F>);

impl<F: FileSystem> OpenFiles for Opened<F> {
    fn with(&self, node: u64, handle: u64, act: &mut dyn FnMut(&File) -> io::Result<()>) -> io::Result<()> {
        // virtiofsd shows an open file to who reads from it, and to nobody else. This reads nothing.
        struct Reader<'a>(&'a mut dyn FnMut(&File) -> io::Result<()>);
        impl ZeroCopyWriter for Reader<'_> {
            fn read_from_file_at(&mut self, f: &File, _: usize, _: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
                (self.0)(f).map(|()| 0)
            }
        }
        let nobody = Context::from(InHeader::default());
        self.0.read(nobody, node.into(), handle.into(), Reader(act), 0, 0, None, 0).map(drop)
    }
}

impl<F: FileSystem, Reply> Guard<F, Reply> {
    /// Guards a file system, and tells the guest's locks what becomes of its open files. Root file systems of containers are
    /// the guest's alone, or not.
    pub fn new(inner: Arc<F>, locks: Arc<Locks<Reply>>, private_roots: bool) -> Self {
        Self { inner, pages: Pages::default(), private: Private::new(private_roots), locks }
    }

    fn forgotten(&self, ctx: Context, inode: u64, count: u64) {
        self.pages.forget(inode);
        if let Some(handle) = self.private.forget(inode, count) {
            self.close(ctx, inode, handle);
        }
    }

    /// An entry that the guest is told of.
    fn entered(&self, parent: u64, n: &CStr, mut entry: Entry) -> Entry {
        self.private.entered(parent, n, &mut entry);
        entry
    }

    /// Attributes that the guest is told, and how long they are true.
    fn lasting(&self, inode: u64, (attr, timeout): (Attr, Duration)) -> (Attr, Duration) {
        (attr, if self.private.has(inode) { FOR_EVER } else { timeout })
    }

    /// The handle of an open file: the guest's, or for a private file one of ours.
    fn handle(&self, ctx: Context, inode: u64, handle: F::Handle, to_write: bool) -> io::Result<F::Handle> {
        let handle: u64 = handle.into();
        if handle != NO_HANDLE || !self.private.has(inode) {
            return Ok(handle.into());
        }
        if let Some(handle) = self.private.handle(inode, to_write) {
            return Ok(handle.into());
        }
        // The guest's kernel has looked at who may do what. A file that is not regular must not make the server wait.
        let flags = libc::O_NONBLOCK | if to_write { libc::O_RDWR } else { libc::O_RDONLY };
        let (handle, _) = self.inner.open(ctx, inode.into(), false, flags.cast_unsigned())?;
        let handle: u64 = handle.ok_or_else(bad_handle)?.into();
        self.opened(ctx, inode, handle, to_write);
        Ok(handle.into())
    }

    fn opened(&self, ctx: Context, inode: u64, handle: u64, may_write: bool) {
        for (inode, handle) in self.private.opened(inode, handle, may_write).into_iter().flatten() {
            self.close(ctx, inode, handle);
        }
    }

    fn with_file(&self, inode: u64, handle: u64, act: &mut dyn FnMut(&File) -> io::Result<()>) -> io::Result<()> {
        Opened(Arc::clone(&self.inner)).with(inode, handle, act)
    }

    /// Whether an open file is in a file system that learns nothing from a close(2). A server elsewhere may write by then only, and
    /// say what has failed.
    fn is_local(&self, inode: u64, handle: u64) -> bool {
        let mut is_local = false;
        let look = &mut |file: &File| {
            is_local = LOCAL.contains(&rustix::fs::fstatfs(file)?.f_type);
            Ok(())
        };
        self.with_file(inode, handle, look).is_ok() && is_local
    }

    fn close(&self, ctx: Context, inode: u64, handle: u64) {
        let _ = self.inner.release(ctx, inode.into(), 0, handle.into(), false, false, None);
    }

    /// Sets the modification time that came with pages from the guest's cache, in nanoseconds since the epoch.
    fn modified(&self, inode: u64, handle: F::Handle, time: u64) {
        let time = time.cast_signed();
        let mtime = Timespec { tv_sec: time.div_euclid(NANOS), tv_nsec: time.rem_euclid(NANOS) };
        let times = Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: mtime };
        let set = &mut |file: &File| Ok(futimens(file, &times)?);
        // The pages are written. A time that cannot be had is a later one.
        let _ = self.with_file(inode, handle.into(), set);
    }

    /// What the guest may leave out for a file that it has opened with these flags.
    fn shortcuts(&self, ctx: Context, inode: u64, handle: Option<u64>, flags: u32) -> OpenOptions {
        let mut options = OpenOptions::empty();
        // Nothing was written, or the host has nothing to do: so there is nothing to flush when it is closed.
        let needs_no_flush =
            flags & ACCESS_MODE == READ_ONLY || handle.is_some_and(|handle| self.is_local(inode, handle));
        options.set(OpenOptions::NOFLUSH, needs_no_flush);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if let Ok((attr, _)) = self.inner.getattr(ctx, inode.into(), None) {
            let changed = Duration::from_secs(attr.ctime).saturating_add(Duration::from_nanos(attr.ctimensec.into()));
            options.set(OpenOptions::KEEP_CACHE, self.pages.may_keep(inode, changed, now));
        }
        options
    }
}

/// Magic numbers of file systems that do nothing when a file is closed, statfs(2): ext4, XFS, Btrfs, tmpfs.
const LOCAL: [libc::c_long; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];

/// Nanoseconds of a second.
const NANOS: i64 = 1_000_000_000;

/// What a guest says that has not opened a private file.
const NO_HANDLE: u64 = 0;

fn bad_handle() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

/// O_ACCMODE and O_RDONLY, open(2).
const ACCESS_MODE: u32 = 3;
const READ_ONLY: u32 = 0;
const READ_WRITE: u32 = 2;

/// A name is one component of a path, and not a step up.
fn name(name: &CStr) -> io::Result<()> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(())
}

/// No devices: a node in a volume would be one for the host as well. The device 0:0 is none, it is how overlayfs writes
/// that a file of a lower layer is gone.
fn node(mode: u32, device: u32) -> io::Result<()> {
    match mode & libc::S_IFMT {
        libc::S_IFCHR if device == 0 => Ok(()),
        libc::S_IFCHR | libc::S_IFBLK => Err(io::Error::from_raw_os_error(libc::EPERM)),
        _ => Ok(()),
    }
}

/// Labels of the host's security modules are the host's; file capabilities belong to the file.
fn label(name: &CStr) -> io::Result<()> {
    let bytes = name.to_bytes();
    if bytes.starts_with(b"security.") && bytes != b"security.capability" {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    Ok(())
}

/// Offsets are signed in the host's kernel. virtiofsd converts them with a panic, which would be the VMM's end.
fn range(offset: u64, size: u32) -> io::Result<()> {
    match offset.checked_add(size.into()).map(i64::try_from) {
        Some(Ok(_)) => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

/// Where a guest goes on to read a directory. Some file systems have cookies beyond what lseek(2) takes, and for those
/// virtiofsd reads the directory from its start, in pieces of what the guest asks for: an entry at a time, if it asks for
/// little. Linux asks for a page at least.
fn cookie(offset: u64, size: u32) -> io::Result<()> {
    const PAGE: u32 = 4096;
    if size < PAGE && i64::try_from(offset).is_err() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(())
}

/// Methods that pass their arguments on, after the checks named behind the signature.
macro_rules! pass {
    ($(fn $method:ident $(<$generic:ident: $bound:ident>)? (&self $(, $arg:ident: $type:ty)* $(,)?) $(-> $ret:ty)?
        $(where $($check:ident($($value:expr),+)),+)?;)*) => {
        $(fn $method $(<$generic: $bound>)? (&self $(, $arg: $type)*) $(-> $ret)? {
            $($($check($($value),+)?;)+)?
            self.inner.$method($($arg),*)
        })*
    };
}

impl<F: FileSystem, Reply> FileSystem for Guard<F, Reply> {
    type Inode = F::Inode;
    type Handle = F::Handle;
    type DirIter = F::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // Without it inode numbers of different volumes would collide, and virtiofsd writes a complaint to our stderr
        // each time that it is asked.
        if !capable.contains(FsOptions::SUBMOUNTS) {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        self.pages.clear();
        self.private.clear();
        self.locks.clear();
        let locks = FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS;
        Ok(self.inner.init(capable)? | (capable & locks))
    }

    fn destroy(&self) {
        self.locks.clear();
        self.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: F::Inode, n: &CStr) -> io::Result<Entry> {
        name(n)?;
        let parent: u64 = parent.into();
        match self.inner.lookup(ctx, parent.into(), n) {
            // A name that is not there stays so until the guest makes it.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && self.private.has(parent) => Ok(Entry {
                inode: 0,
                generation: 0,
                attr: Attr::default(),
                attr_timeout: Duration::ZERO,
                entry_timeout: FOR_EVER,
            }),
            entry => Ok(self.entered(parent, n, entry?)),
        }
    }

    fn forget(&self, ctx: Context, inode: F::Inode, count: u64) {
        let inode: u64 = inode.into();
        self.forgotten(ctx, inode, count);
        self.inner.forget(ctx, inode.into(), count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(F::Inode, u64)>) {
        let forgotten = requests.into_iter().map(|(inode, count)| (inode.into(), count));
        let requests = forgotten.inspect(|(inode, count): &(u64, u64)| self.forgotten(ctx, *inode, *count));
        self.inner.batch_forget(ctx, requests.map(|(inode, count)| (inode.into(), count)).collect());
    }

    fn open(
        &self,
        ctx: Context,
        inode: F::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<F::Handle>, OpenOptions)> {
        let inode: u64 = inode.into();
        if self.private.has(inode) {
            // Overlayfs copies a file of an image now, and not any more when its name is gone.
            self.handle(ctx, inode, NO_HANDLE.into(), flags & ACCESS_MODE != READ_ONLY)?;
            return Ok((None, OpenOptions::KEEP_CACHE));
        }
        let (handle, options) = self.inner.open(ctx, inode.into(), kill_priv, flags)?;
        let handle: Option<u64> = handle.map(F::Handle::into);
        let shortcuts = self.shortcuts(ctx, inode, handle, flags);
        Ok((handle.map(F::Handle::from), options | shortcuts))
    }

    fn flush(&self, ctx: Context, inode: F::Inode, handle: F::Handle, owner: u64) -> io::Result<()> {
        let node: u64 = inode.into();
        let flushed = self.inner.flush(ctx, node.into(), handle, owner);
        // The file is closed whether all is written or not.
        self.locks.closed_by(node, owner);
        flushed
    }

    fn release(
        &self,
        ctx: Context,
        inode: F::Inode,
        flags: u32,
        handle: F::Handle,
        flush: bool,
        flock_release: bool,
        owner: Option<u64>,
    ) -> io::Result<()> {
        let (node, open): (u64, u64) = (inode.into(), handle.into());
        self.inner.release(ctx, node.into(), flags, open.into(), flush, flock_release, owner)?;
        self.locks.closed(node, open);
        Ok(())
    }

    fn releasedir(&self, ctx: Context, inode: F::Inode, flags: u32, handle: F::Handle) -> io::Result<()> {
        let (node, open): (u64, u64) = (inode.into(), handle.into());
        self.inner.releasedir(ctx, node.into(), flags, open.into())?;
        self.locks.closed(node, open);
        Ok(())
    }

    fn getattr(&self, ctx: Context, inode: F::Inode, handle: Option<F::Handle>) -> io::Result<(Attr, Duration)> {
        let inode: u64 = inode.into();
        Ok(self.lasting(inode, self.inner.getattr(ctx, inode.into(), handle)?))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: F::Inode,
        attr: SetattrIn,
        handle: Option<F::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let inode: u64 = inode.into();
        let given = handle.map_or(NO_HANDLE, F::Handle::into);
        // A private file that is cut off is written, so what is open to be read is not to be used any more.
        let handle = if valid.contains(SetattrValid::SIZE) && self.private.has(inode) {
            Some(self.handle(ctx, inode, given.into(), true)?)
        } else {
            Some(given).filter(|given| *given != NO_HANDLE).map(F::Handle::from)
        };
        let set = self.inner.setattr(ctx, inode.into(), attr, handle, valid)?;
        Ok(self.lasting(inode, set))
    }

    fn symlink(
        &self,
        ctx: Context,
        link: &CStr,
        parent: F::Inode,
        n: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        name(n)?;
        let parent: u64 = parent.into();
        Ok(self.entered(parent, n, self.inner.symlink(ctx, link, parent.into(), n, extensions)?))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: F::Inode,
        n: &CStr,
        mode: u32,
        device: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        name(n)?;
        node(mode, device)?;
        let parent: u64 = parent.into();
        Ok(self.entered(parent, n, self.inner.mknod(ctx, parent.into(), n, mode, device, umask, extensions)?))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: F::Inode,
        n: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        name(n)?;
        let parent: u64 = parent.into();
        Ok(self.entered(parent, n, self.inner.mkdir(ctx, parent.into(), n, mode, umask, extensions)?))
    }

    fn link(&self, ctx: Context, inode: F::Inode, to: F::Inode, new: &CStr) -> io::Result<Entry> {
        name(new)?;
        let to: u64 = to.into();
        Ok(self.entered(to, new, self.inner.link(ctx, inode, to.into(), new)?))
    }

    fn create(
        &self,
        ctx: Context,
        parent: F::Inode,
        n: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)> {
        name(n)?;
        let parent: u64 = parent.into();
        let is_private = self.private.has(parent);
        // The guest's kernel reads what it writes a part of.
        let flags = if is_private { flags & !ACCESS_MODE | READ_WRITE } else { flags };
        let (entry, handle, options) =
            self.inner.create(ctx, parent.into(), n, mode, kill_priv, flags, umask, extensions)?;
        let entry = self.entered(parent, n, entry);
        let Some(handle) = handle.map(F::Handle::into) else { return Ok((entry, None, options)) };
        if is_private {
            self.opened(ctx, entry.inode, handle, true);
            return Ok((entry, None, options | OpenOptions::KEEP_CACHE));
        }
        let shortcut = if self.is_local(entry.inode, handle) { OpenOptions::NOFLUSH } else { OpenOptions::empty() };
        Ok((entry, Some(handle.into()), options | shortcut))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        w: W,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        range(offset, size)?;
        let inode: u64 = inode.into();
        let handle = self.handle(ctx, inode, handle, false)?;
        self.inner.read(ctx, inode.into(), handle, w, size, offset, owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        r: R,
        size: u32,
        offset: u64,
        owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        range(offset, size)?;
        let inode: u64 = inode.into();
        let handle: u64 = self.handle(ctx, inode, handle, true)?.into();
        let written =
            self.inner.write(ctx, inode.into(), handle.into(), r, size, offset, owner, delayed, kill_priv, flags)?;
        // Pages from the cache have no lock owner. In its place a private file's have their time.
        if let Some(time) = owner.filter(|_| delayed && self.private.has(inode)) {
            self.modified(inode, handle.into(), time);
        }
        Ok(written)
    }

    fn fsync(&self, ctx: Context, inode: F::Inode, datasync: bool, handle: F::Handle) -> io::Result<()> {
        let inode: u64 = inode.into();
        let handle = self.handle(ctx, inode, handle, false)?;
        self.inner.fsync(ctx, inode.into(), datasync, handle)
    }

    fn fsyncdir(&self, ctx: Context, inode: F::Inode, datasync: bool, handle: F::Handle) -> io::Result<()> {
        let inode: u64 = inode.into();
        let handle = self.handle(ctx, inode, handle, false)?;
        self.inner.fsyncdir(ctx, inode.into(), datasync, handle)
    }

    fn fallocate(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let inode: u64 = inode.into();
        let handle = self.handle(ctx, inode, handle, true)?;
        self.inner.fallocate(ctx, inode.into(), handle, mode, offset, length)
    }

    fn lseek(&self, ctx: Context, inode: F::Inode, handle: F::Handle, offset: u64, whence: u32) -> io::Result<u64> {
        let inode: u64 = inode.into();
        let handle = self.handle(ctx, inode, handle, false)?;
        self.inner.lseek(ctx, inode.into(), handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        inode: F::Inode,
        handle: F::Handle,
        offset: u64,
        to: F::Inode,
        to_handle: F::Handle,
        to_offset: u64,
        len: u64,
        flags: u64,
    ) -> io::Result<usize> {
        let (inode, to): (u64, u64) = (inode.into(), to.into());
        // In this order: the second may take the place of the first, if they are the same file.
        let to_handle: u64 = self.handle(ctx, to, to_handle, true)?.into();
        let handle = self.handle(ctx, inode, handle, false)?;
        self.inner.copyfilerange(ctx, inode.into(), handle, offset, to.into(), to_handle.into(), to_offset, len, flags)
    }

    pass! {
        fn readlink(&self, ctx: Context, inode: F::Inode) -> io::Result<Vec<u8>>;
        fn unlink(&self, ctx: Context, parent: F::Inode, n: &CStr) -> io::Result<()> where name(n);
        fn rmdir(&self, ctx: Context, parent: F::Inode, n: &CStr) -> io::Result<()> where name(n);
        fn rename(&self, ctx: Context, parent: F::Inode, n: &CStr, to: F::Inode, new: &CStr, flags: u32)
            -> io::Result<()> where name(n), name(new);
        fn statfs(&self, ctx: Context, inode: F::Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(&self, ctx: Context, inode: F::Inode, n: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags)
            -> io::Result<()> where label(n);
        fn getxattr(&self, ctx: Context, inode: F::Inode, n: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(&self, ctx: Context, inode: F::Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(&self, ctx: Context, inode: F::Inode, n: &CStr) -> io::Result<()> where label(n);
        fn opendir(&self, ctx: Context, inode: F::Inode, flags: u32) -> io::Result<(Option<F::Handle>, OpenOptions)>;
        fn readdir(&self, ctx: Context, inode: F::Inode, handle: F::Handle, size: u32, offset: u64)
            -> io::Result<F::DirIter> where cookie(offset, size);
        fn access(&self, ctx: Context, inode: F::Inode, mask: u32) -> io::Result<()>;
        fn syncfs(&self, ctx: Context, inode: F::Inode) -> io::Result<()>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whiteouts_and_file_capabilities_are_allowed() {
        assert!(node(libc::S_IFCHR | 0o600, 0).is_ok());
        assert!(node(libc::S_IFIFO | 0o600, 0).is_ok());
        assert!(label(c"security.capability").is_ok());
        assert!(label(c"user.security.x").is_ok());
    }

    #[test]
    fn hostile_11_offsets_that_the_host_has_not_are_refused() {
        let most = i64::MAX.unsigned_abs();
        assert!(range(0, u32::MAX).is_ok() && range(most, 0).is_ok() && range(most - 1, 1).is_ok());
        for (offset, size) in [(most, 1), (most + 1, 0), (u64::MAX, 0), (u64::MAX, u32::MAX)] {
            assert_eq!(range(offset, size).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
    }

    #[test]
    fn hostile_11_directory_offsets_that_are_searched_for_come_with_a_page() {
        let most = i64::MAX.unsigned_abs();
        assert!(cookie(0, 1).is_ok() && cookie(most, 1).is_ok());
        assert!(cookie(most + 1, 4096).is_ok() && cookie(u64::MAX, u32::MAX).is_ok());
        for (offset, size) in [(most + 1, 4095), (u64::MAX, 0)] {
            assert_eq!(cookie(offset, size).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
    }

    #[test]
    fn hostile_11_devices_and_labels_of_the_host_are_not() {
        assert!(node(libc::S_IFCHR | 0o600, 0x103).is_err());
        assert!(node(libc::S_IFBLK | 0o600, 0).is_err());
        assert!(label(c"security.selinux").is_err());
    }
}
