//! Mounts of a container's root file system as containerd describes them (containerd: core/mount/mount_linux.go).

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use containerd_shim_protos::types::mount::Mount;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, mount,
};

use super::ShareError;
use super::jail;
use super::tree::{ONLY_DATA, Propagation, Tree};

/// mount(2) copies one page of options, the terminating zero included.
const MAX_DATA: usize = 4095;

/// Makes the mount of one entry, detached. `spare` is a directory of the pod's that it may be mounted on for a moment, where
/// nobody sees it.
pub fn make(entry: &Mount, spare: &Path) -> Result<Tree, ShareError> {
    let options = Options::parse(&entry.options);
    if let Some(upper) = options.data.iter().find_map(|option| option.strip_prefix("upperdir=")) {
        own_upper_directory(Path::new(upper), options.mapped_root)?;
    }
    let failed = |source| ShareError::Rootfs { path: entry.source.clone().into(), source };
    match entry.type_.as_str() {
        "overlay" => match layers(&options) {
            Ok(tree) => Ok(tree),
            Err(_) if options.data_len() <= MAX_DATA => by_mount(entry, &options, spare).map_err(failed),
            Err(error) => Err(ShareError::TooManyLayers(error.into())),
        },
        "bind" | "rbind" | "" if options.bind || entry.type_ == "bind" || entry.type_ == "rbind" => {
            bind(entry, &options).map_err(|error| failed(error.into()))
        }
        other => Err(ShareError::RootfsType(other.to_owned())),
    }
}

/// Gives an upper directory, which becomes the container's root directory, back to root: for a container with a user namespace
/// containerd has made it the mapped root's.
pub fn own_upper_directory(upper: &Path, mapped_root: Option<u32>) -> Result<(), ShareError> {
    let Some(mapped) = mapped_root else { return Ok(()) };
    let own = || {
        if std::fs::metadata(upper)?.uid() == mapped {
            std::os::unix::fs::chown(upper, Some(0), Some(0))?;
        }
        Ok(())
    };
    own().map_err(|source| ShareError::Rootfs { path: upper.into(), source })
}

fn bind(entry: &Mount, options: &Options<'_>) -> Result<Tree, Errno> {
    let recursive = options.recursive || entry.type_ == "rbind";
    let tree = Tree::copy(Path::new(&entry.source), recursive, Propagation::Private)?;
    if options.flags.contains(MountFlags::RDONLY) {
        tree.make_read_only()?;
    }
    Ok(tree)
}

/// Overlay without a place to mount it on, and of as many layers as there are: each is an option of its own (Linux 6.8, overlayfs
/// `lowerdir+`).
fn layers(options: &Options<'_>) -> Result<Tree, Errno> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for option in &options.data {
        match option.split_once('=') {
            // As one option it has escapes and separators of other kinds.
            Some(("lowerdir", layers)) if layers.contains('\\') || layers.contains("::") => return Err(Errno::INVAL),
            Some(("lowerdir", layers)) => {
                for layer in layers.split(':') {
                    fsconfig_set_string(&context, "lowerdir+", layer)?;
                }
            }
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, *option)?,
        }
    }
    fsconfig_create(&context)?;
    let mut attributes = ONLY_DATA;
    for (flag, attribute) in [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
    ] {
        if options.flags.contains(flag) {
            attributes |= attribute;
        }
    }
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map(Tree::from)
}

/// Overlay by the call that every kernel has. It mounts on a directory; in a namespace that is thrown away the node has none of
/// it.
fn by_mount(entry: &Mount, options: &Options<'_>, spare: &Path) -> std::io::Result<Tree> {
    let flags = options.flags | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    jail::apart(|| {
        mount(entry.source.as_str(), spare, "overlay", flags, Some(options.data().as_c_str()))?;
        Tree::copy(spare, false, Propagation::Private)
    })
}

/// fstab(5) style options, sorted into what mount(2) wants.
struct Options<'a> {
    flags: MountFlags,
    bind: bool,
    recursive: bool,
    /// The id that a user namespace's root would have on the host.
    mapped_root: Option<u32>,
    data: Vec<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(options: &'a [String]) -> Self {
        let mut parsed =
            Self { flags: MountFlags::empty(), bind: false, recursive: false, mapped_root: None, data: Vec::new() };
        for option in options {
            match option.as_str() {
                "ro" => parsed.flags |= MountFlags::RDONLY,
                "nosuid" => parsed.flags |= MountFlags::NOSUID,
                "nodev" => parsed.flags |= MountFlags::NODEV,
                "noexec" => parsed.flags |= MountFlags::NOEXEC,
                "noatime" => parsed.flags |= MountFlags::NOATIME,
                "relatime" => parsed.flags |= MountFlags::RELATIME,
                "bind" => parsed.bind = true,
                "rbind" => (parsed.bind, parsed.recursive) = (true, true),
                "rw" | "defaults" | "suid" | "dev" | "exec" | "atime" => {}
                // Instructions to containerd to map the layers' ids, which a guest does not need (spec/users.rs).
                map if map.starts_with("gidmap=") => {}
                data => match data.strip_prefix("uidmap=") {
                    Some(map) => parsed.mapped_root = map.split(':').nth(1).and_then(|id| id.parse().ok()),
                    None => parsed.data.push(data),
                },
            }
        }
        parsed
    }

    fn data_len(&self) -> usize {
        self.data.iter().map(|option| option.len() + 1).sum()
    }

    fn data(&self) -> std::ffi::CString {
        // A path with a zero byte cannot come out of a protobuf string that containerd mounted before.
        std::ffi::CString::new(self.data.join(",")).unwrap_or_default()
    }
}
