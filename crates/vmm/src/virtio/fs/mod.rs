//! virtio-fs (section 5.11): the pod's share, served by virtiofsd's `PassthroughFs` in a thread of this process
//! (ARCHITECTURE.md, D5).
//!
//! The thread is its own because host file systems block, and because virtiofsd changes the credentials, the working
//! directory and the umask of the thread that serves a request. What it opens is found from the descriptor of the share:
//! the thread makes that its working directory and the export root is `.`, which needs no path and no /proc, and is the
//! root directory itself once the process is locked into the share.
//!
//! Inodes are held by descriptor, never by file handle: opening by handle needs CAP_DAC_READ_SEARCH, with which a guest
//! that took over the VMM could open any file of a host file system; and overlayfs, where most files are, has no handles
//! by default. The price: a host mount in the share stays busy as long as the guest knows an inode of it, its root at least.
//! So it is unmounted on the host with MNT_DETACH, and lives on until the guest forgets: the agent unmounts its own end
//! (every mount of the share is one in the guest too, FUSE_SUBMOUNTS) and looks at the directory once more, a second later
//! or more, when the kernel finds that it has changed.

mod guard;
mod locks;
mod memory;
mod pages;
mod private;
mod windows;
mod worker;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use bulkhead_protocol::vmspec::{IdMap, IdMaps};
use rustix::process::{Resource, Rlimit, fchdir, getrlimit, setrlimit};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode};

use self::locks::Watches;
use self::pages::CACHE_TIMEOUT;
use self::worker::{Messages, Queues};
use crate::guest_log;
use crate::jail::{self, Kind};

use super::serving::{Orders, Serving};
use super::{ActivateError, Activation, VirtioDevice, read_config};

/// hiprio (FORGET, INTERRUPT) and one request queue. A request takes one slot with an indirect table; 1024 lets a guest
/// without one have some requests of the largest size in flight.
const QUEUE_SIZES: [u16; 2] = [128, 1024];

/// Longest tag, struct virtio_fs_config.
const TAG_LEN: usize = 36;

/// Most descriptors that the guest can make the server hold, for inodes that it knows and files that it has open. Each
/// pins an inode and a dentry in the host's kernel, some 2 KiB that are charged to the pod; the largest images have about
/// that many files.
const MAX_GUEST_FDS: u64 = 256 * 1024;

/// Descriptors that are not the guest's: devices, streams, locks, and those that a request needs for itself.
const RESERVED_FDS: u64 = 2048;

/// `trusted.*` takes a capability on the host that nobody here has, over the host as a whole. A guest keeps its own, which
/// overlayfs needs where it writes, under a name that it cannot use otherwise.
const ATTRIBUTES: &str = ":prefix:all:trusted.:user.bulkhead.: :bad:client:user.bulkhead.:: :ok:all:::";

/// The device. Its thread lives as long as it does: one that a vCPU's thread started would be confined as that is. A request
/// may be in a file system of the host that hangs (a dead NFS server, say), and nobody but the thread waits for that.
pub struct Fs {
    /// struct virtio_fs_config: tag, number of request queues.
    config: [u8; TAG_LEN + 4],
    guest_fds: u64,
    serving: Serving<Share>,
}

/// What the thread serves in an activation.
struct Share {
    queues: Queues,
    guest_fds: u64,
}

impl Fs {
    /// A device that exports the directory `root` under `tag`, the owners of its files by these ids. With `private_roots`, root
    /// file systems of containers are changed by the guest alone. Raises the process's soft limit of open files.
    pub fn new(tag: &str, root: OwnedFd, ids: &IdMaps, private_roots: bool) -> Result<Self, FsError> {
        let bytes = tag.as_bytes();
        if bytes.is_empty() || bytes.len() > TAG_LEN || bytes.contains(&0) {
            return Err(FsError::Tag(tag.into()));
        }
        let stat = rustix::fs::fstat(&root).map_err(|error| FsError::Root(error.into()))?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(FsError::Root(io::ErrorKind::NotADirectory.into()));
        }
        let mut config = [0; TAG_LEN + 4];
        let fields = bytes.iter().chain(std::iter::repeat_n(&0, TAG_LEN - bytes.len())).chain(&[1, 0, 0, 0]);
        config.iter_mut().zip(fields).for_each(|(to, from)| *to = *from);
        let (guest_fds, ids) = (guest_fd_limit()?, ids.clone());
        let (serving, orders) = Serving::new();
        let watches = Arc::new(Watches::start(locks::WATCHES, &root).map_err(FsError::Thread)?);
        thread::Builder::new()
            .name(Kind::FileServer.name().into())
            .spawn(move || serve(&root, &ids, private_roots, orders, &watches))
            .map_err(FsError::Thread)?;
        Ok(Self { config, guest_fds, serving })
    }
}

/// The thread: one order after the other, to the end of the device.
fn serve(root: &OwnedFd, ids: &IdMaps, private_roots: bool, orders: Orders<Share>, watches: &Arc<Watches>) {
    let own = worker::own_file_system_attributes();
    jail::confine_thread(Kind::FileServer);
    for mut order in orders {
        if order.stop.is_requested() {
            continue;
        }
        let entered = own.as_ref().map_err(|error| (*error).into()).and_then(|()| Ok(fchdir(root)?));
        let Share { queues, guest_fds } = &mut order.work;
        let config = server_config(*guest_fds, ids);
        let server = entered.and_then(|()| Messages::new(&queues.memory, config, private_roots, Arc::clone(watches)));
        match server {
            // The driver is told before the server is taken apart, which may take long.
            Ok(server) => {
                if let Err(error) = worker::serve(&server, queues, &order.stop) {
                    order.fail(|| guest_log!("fs: {error}"));
                }
            }
            Err(error) => order.fail(|| guest_log!("fs: cannot start the file server: {error}")),
        }
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // Not VIRTIO_FS_F_NOTIFICATION: the server never speaks first.
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let queues = Queues::take(&mut activation)?;
        self.serving.start(Share { queues, guest_fds: self.guest_fds }, activation.interrupt)
    }

    fn reset(&mut self) {
        self.serving.stop();
    }

    fn is_stopped(&self) -> bool {
        self.serving.is_stopped()
    }
}

/// The server without its thread: it serves when it is told to, in the thread that has made it, whose working directory
/// becomes the share.
#[cfg(feature = "testing")]
pub struct Inline {
    server: Messages,
    queues: Queues,
    stop: super::stop::Stop,
}

#[cfg(feature = "testing")]
impl Inline {
    /// A server of `root` that lets the guest hold so many descriptors.
    pub fn new(root: &OwnedFd, guest_fds: u64, mut activation: Activation) -> Result<Self, ActivateError> {
        let host = |action| move |source| ActivateError::Host { action, source };
        worker::own_file_system_attributes()
            .and_then(|()| fchdir(root))
            .map_err(|error| host("enter the share")(error.into()))?;
        let watches = Arc::new(Watches::start(0, root).map_err(host("watch locks"))?);
        let queues = Queues::take(&mut activation)?;
        let config = server_config(guest_fds, &IdMaps::default());
        let server = Messages::new(&queues.memory, config, true, watches).map_err(host("start the file server"))?;
        Ok(Self { server, queues, stop: super::stop::Stop::new().map_err(host("make an event"))? })
    }

    /// Serves what is in the queues now.
    pub fn serve(&mut self) -> Result<(), super::ring::RingError> {
        worker::serve_once(&self.server, &mut self.queues, &self.stop)
    }
}

/// A map in virtiofsd's form.
fn translated(ids: &[IdMap]) -> Option<Vec<virtiofsd::soft_idmap::cmdline::IdMap>> {
    let both = |map: &IdMap| virtiofsd::soft_idmap::cmdline::IdMap::Bidirectional {
        guest: map.guest,
        host: map.host,
        count: map.count,
    };
    (!ids.is_empty()).then(|| ids.iter().map(both).collect())
}

fn server_config(guest_fd_limit: u64, ids: &IdMaps) -> Config {
    Config {
        root_dir: ".".into(),
        entry_timeout: CACHE_TIMEOUT,
        attr_timeout: CACHE_TIMEOUT,
        // Close-to-open, refined by `pages`; and a file that is open reads fresh a second after it changed on the host.
        cache_policy: CachePolicy::Auto,
        writeback: false,
        allow_direct_io: false,
        readdirplus: true,
        announce_submounts: true,
        inode_file_handles: InodeFileHandlesMode::Never,
        xattr: true,
        xattrmap: XattrMap::try_from(ATTRIBUTES).ok(),
        posix_acl: NegotiationMode::Auto,
        killpriv_v2: true,
        security_label: NegotiationMode::Never,
        guest_fd_limit,
        uid_map: translated(&ids.uids),
        gid_map: translated(&ids.gids),
        // Without a jail virtiofsd opens it by itself.
        proc_sfd_rawfd: jail::entered().and_then(|jail| jail.descriptors().ok()).map(File::from),
        ..Config::default()
    }
}

fn guest_fd_limit() -> Result<u64, FsError> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = maximum.unwrap_or(u64::MAX).min(MAX_GUEST_FDS + RESERVED_FDS);
    let limit = match current {
        Some(current) if current < wanted => {
            setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })
                .map_err(|error| FsError::Limit(error.into()))?;
            wanted
        }
        current => current.unwrap_or(u64::MAX),
    };
    // A low hard limit is shared half and half.
    Ok(limit.saturating_sub(RESERVED_FDS.min(limit / 2)).min(MAX_GUEST_FDS))
}

/// A device that cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// Empty, too long, or with a zero byte.
    #[error("virtiofs tag {0:?} is not 1 to {TAG_LEN} bytes without a zero byte")]
    Tag(String),
    /// Not a directory.
    #[error("the virtiofs device's descriptor is no directory that can be exported")]
    Root(#[source] io::Error),
    /// No thread.
    #[error("cannot start the file server's threads")]
    Thread(#[source] io::Error),
    /// setrlimit(2).
    #[error("cannot raise the soft limit of open files to the hard limit")]
    Limit(#[source] io::Error),
}
