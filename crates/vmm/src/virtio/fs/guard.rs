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

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, InHeader, SetattrIn};
use virtiofsd::oslib::ReadvFlags;

use super::locks::{Locks, OpenFiles};
use super::pages::Pages;
use super::roots::Roots;
use super::windows::{self, Windows};

/// A file system whose guest is not trusted.
pub struct Guard<F, Reply> {
    inner: Arc<F>,
    pages: Pages,
    roots: Roots,
    windows: Windows,
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
    /// Guards a file system, and tells the guest's locks what becomes of its open files.
    pub fn new(inner: Arc<F>, locks: Arc<Locks<Reply>>) -> Self {
        Self { inner, pages: Pages::default(), roots: Roots::default(), windows: Windows::default(), locks }
    }

    fn forgotten(&self, inode: u64, count: u64) {
        self.pages.forget(inode);
        self.roots.forget(inode);
        self.windows.forget(inode, count);
    }

    /// What the guest may leave out for a file that it opens with these flags.
    fn shortcuts(&self, ctx: Context, inode: u64, flags: u32) -> OpenOptions {
        let mut options = OpenOptions::empty();
        if flags & ACCESS_MODE == READ_ONLY {
            // Nothing was written, so there is nothing to flush when it is closed.
            options |= OpenOptions::NOFLUSH;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if let Ok((attr, _)) = self.inner.getattr(ctx, inode.into(), None) {
            let changed = Duration::from_secs(attr.ctime).saturating_add(Duration::from_nanos(attr.ctimensec.into()));
            options.set(OpenOptions::KEEP_CACHE, self.pages.may_keep(inode, changed, now));
        }
        options
    }
}

/// O_ACCMODE and O_RDONLY, open(2).
const ACCESS_MODE: u32 = 3;
const READ_ONLY: u32 = 0;

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

/// Methods that pass their arguments on, after the checks named behind the signature. Those that end in `of` change or list these
/// inodes, which must be no windows.
macro_rules! pass {
    ($(fn $method:ident $(<$generic:ident: $bound:ident>)? (&self $(, $arg:ident: $type:ty)* $(,)?) $(-> $ret:ty)?
        $(where $($check:ident($($value:expr),+)),+)? $(; of $($inode:ident),+)?;)*) => {
        $(fn $method $(<$generic: $bound>)? (&self $(, $arg: $type)*) $(-> $ret)? {
            $($($check($($value),+)?;)+)?
            $($(
                let $inode: u64 = $inode.into();
                self.windows.may_use($inode)?;
                let $inode = F::Inode::from($inode);
            )+)?
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
        self.roots.clear();
        self.windows.clear();
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
        self.windows.may_find(parent, n)?;
        let look_up = || self.inner.lookup(ctx, parent.into(), n);
        let mut entry = if windows::is_name(n) {
            self.windows.look_up(|| look_up().map(|entry| (entry.inode, entry)))?
        } else {
            look_up()?
        };
        self.roots.looked_up(parent, n, entry.inode, &mut entry.attr);
        Ok(entry)
    }

    fn forget(&self, ctx: Context, inode: F::Inode, count: u64) {
        let inode: u64 = inode.into();
        self.inner.forget(ctx, inode.into(), count);
        self.forgotten(inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(F::Inode, u64)>) {
        let requests: Vec<(u64, u64)> = requests.into_iter().map(|(inode, count)| (inode.into(), count)).collect();
        self.inner.batch_forget(ctx, requests.iter().map(|(inode, count)| ((*inode).into(), *count)).collect());
        requests.into_iter().for_each(|(inode, count)| self.forgotten(inode, count));
    }

    fn open(
        &self,
        ctx: Context,
        inode: F::Inode,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<F::Handle>, OpenOptions)> {
        let inode: u64 = inode.into();
        let shortcuts = self.shortcuts(ctx, inode, flags);
        let (handle, options) = self.inner.open(ctx, inode.into(), kill_priv, flags)?;
        Ok((handle, options | shortcuts))
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

    pass! {
        fn getattr(&self, ctx: Context, inode: F::Inode, handle: Option<F::Handle>) -> io::Result<(Attr, Duration)>;
        fn setattr(&self, ctx: Context, inode: F::Inode, attr: SetattrIn, handle: Option<F::Handle>,
            valid: SetattrValid) -> io::Result<(Attr, Duration)>; of inode;
        fn readlink(&self, ctx: Context, inode: F::Inode) -> io::Result<Vec<u8>>;
        fn symlink(&self, ctx: Context, link: &CStr, parent: F::Inode, n: &CStr, extensions: Extensions)
            -> io::Result<Entry> where name(n); of parent;
        fn mknod(&self, ctx: Context, parent: F::Inode, n: &CStr, mode: u32, device: u32, umask: u32,
            extensions: Extensions) -> io::Result<Entry> where name(n), node(mode, device); of parent;
        fn mkdir(&self, ctx: Context, parent: F::Inode, n: &CStr, mode: u32, umask: u32, extensions: Extensions)
            -> io::Result<Entry> where name(n); of parent;
        fn unlink(&self, ctx: Context, parent: F::Inode, n: &CStr) -> io::Result<()> where name(n); of parent;
        fn rmdir(&self, ctx: Context, parent: F::Inode, n: &CStr) -> io::Result<()> where name(n); of parent;
        fn rename(&self, ctx: Context, parent: F::Inode, n: &CStr, to: F::Inode, new: &CStr, flags: u32)
            -> io::Result<()> where name(n), name(new); of parent, to;
        fn link(&self, ctx: Context, inode: F::Inode, to: F::Inode, new: &CStr) -> io::Result<Entry> where name(new); of to;
        fn create(&self, ctx: Context, parent: F::Inode, n: &CStr, mode: u32, kill_priv: bool, flags: u32, umask: u32,
            extensions: Extensions) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)> where name(n); of parent;
        fn read<W: ZeroCopyWriter>(&self, ctx: Context, inode: F::Inode, handle: F::Handle, w: W, size: u32,
            offset: u64, owner: Option<u64>, flags: u32) -> io::Result<usize> where range(offset, size);
        fn write<R: ZeroCopyReader>(&self, ctx: Context, inode: F::Inode, handle: F::Handle, r: R, size: u32,
            offset: u64, owner: Option<u64>, delayed: bool, kill_priv: bool, flags: u32) -> io::Result<usize>
            where range(offset, size);
        fn fsync(&self, ctx: Context, inode: F::Inode, datasync: bool, handle: F::Handle) -> io::Result<()>;
        fn fallocate(&self, ctx: Context, inode: F::Inode, handle: F::Handle, mode: u32, offset: u64, length: u64)
            -> io::Result<()>;
        fn statfs(&self, ctx: Context, inode: F::Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(&self, ctx: Context, inode: F::Inode, n: &CStr, value: &[u8], flags: u32, extra: SetxattrFlags)
            -> io::Result<()> where label(n); of inode;
        fn getxattr(&self, ctx: Context, inode: F::Inode, n: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(&self, ctx: Context, inode: F::Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(&self, ctx: Context, inode: F::Inode, n: &CStr) -> io::Result<()> where label(n); of inode;
        fn opendir(&self, ctx: Context, inode: F::Inode, flags: u32) -> io::Result<(Option<F::Handle>, OpenOptions)>; of inode;
        fn readdir(&self, ctx: Context, inode: F::Inode, handle: F::Handle, size: u32, offset: u64)
            -> io::Result<F::DirIter> where cookie(offset, size); of inode;
        fn fsyncdir(&self, ctx: Context, inode: F::Inode, datasync: bool, handle: F::Handle) -> io::Result<()>;
        fn access(&self, ctx: Context, inode: F::Inode, mask: u32) -> io::Result<()>;
        fn lseek(&self, ctx: Context, inode: F::Inode, handle: F::Handle, offset: u64, whence: u32)
            -> io::Result<u64>;
        fn copyfilerange(&self, ctx: Context, inode: F::Inode, handle: F::Handle, offset: u64, to: F::Inode,
            to_handle: F::Handle, to_offset: u64, len: u64, flags: u64) -> io::Result<usize>;
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
