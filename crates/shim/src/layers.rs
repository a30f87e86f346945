//! Root file systems that containerd describes by the layers of an image, which the guest mounts itself (containerd:
//! plugins/snapshots/erofs, core/mount/manager). What else it describes is mounted on the host (`share::rootfs`).
//!
//! | containerd | what the mounts of a container are |
//! | --- | --- |
//! | 2.1 | one overlay, whose lower directories are mounted on the node; the image of each is beside it (`layer.erofs`) |
//! | 2.2 and later | an `erofs` for each layer, and a `format/mkdir/overlay` that names them by their place in the list |
//! | the same, with a size for what containers write | before those an `ext4` in a file, which has upper and work directory |
//!
//! With 2.2 that is so because `-info` says that this shim takes such mounts ([`ALLOWED`]); containerd's mount manager leaves them alone
//! then. It still makes the file of an `ext4` (`mkfs/`).

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use bulkhead_protocol::guest::UPPER_NAMES;
use containerd_shim_protos::types::mount::Mount;

/// The types that are left to this shim, for the annotation `containerd.io/runtime-allow-mounts`.
pub const ALLOWED: &str = "erofs,format/*,mkdir/*";

/// EROFS_SUPER_MAGIC_V1 of linux/magic.h.
const EROFS: u64 = 0xe0f5_e1e2;

/// The name of a layer's image beside the directory that containerd 2.1 mounts it on.
const IMAGE: &str = "layer.erofs";

/// A root file system of layers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Layered {
    /// The topmost first. Each is a file system in an image, and after it the images that this keeps what is in files in.
    pub layers: Vec<Vec<PathBuf>>,
    /// Where the container writes; nowhere if it cannot.
    pub top: Option<Top>,
    /// What it writes need not be durable.
    pub volatile: bool,
}

/// Where a container writes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Top {
    /// In `fs` and `work` of this directory.
    Directory {
        /// The snapshot's.
        dir: PathBuf,
        /// The id that a user namespace's root would have on the host.
        mapped_root: Option<u32>,
    },
    /// In a file system (ext4) in this file.
    Disk(PathBuf),
}

/// Takes a description apart; `None` if it is none of layers. `is_image_mounted_on` says of a directory whether an EROFS is mounted
/// there.
pub fn parse(mounts: &[Mount], is_image_mounted_on: impl Fn(&Path) -> bool) -> Result<Option<Layered>, LayersError> {
    let Some((last, before)) = mounts.split_last() else { return Ok(None) };
    if !mounts.iter().any(|mount| kind(&mount.type_) == "erofs") {
        return Ok(if before.is_empty() { mounted(last, is_image_mounted_on) } else { None });
    }
    let parts = before.iter().map(Part::of).collect::<Result<Vec<_>, _>>()?;
    let of = |layers, top, volatile| Ok(Some(Layered { layers, top, volatile }));
    match kind(&last.type_) {
        "erofs" if before.is_empty() => of(vec![image(last)?], None, false),
        "bind" | "rbind" => of(named(&last.source, &parts)?, None, false),
        "overlay" => {
            let overlay = Overlay::of(&last.options)?;
            let layers = named(overlay.lower.ok_or(LayersError::Shape)?, &parts)?;
            of(layers, overlay.top(&parts)?, overlay.volatile)
        }
        _ => Err(LayersError::Shape),
    }
}

/// The type without what containerd's mount manager would do before it mounts (`format/`, `mkdir/`).
fn kind(of: &str) -> &str {
    let mut kind = of;
    while let Some(rest) = kind.strip_prefix("format/").or_else(|| kind.strip_prefix("mkdir/")) {
        kind = rest;
    }
    kind
}

/// What the last mount may name.
enum Part {
    Layer(Vec<PathBuf>),
    Disk(PathBuf),
}

impl Part {
    fn of(mount: &Mount) -> Result<Self, LayersError> {
        match kind(&mount.type_) {
            "erofs" => Ok(Self::Layer(image(mount)?)),
            "ext4" => {
                let known = |option: &&String| ["rw", "loop"].contains(&option.as_str());
                match mount.options.iter().find(|option| !known(option)) {
                    Some(option) => Err(LayersError::Option(option.clone())),
                    None => Ok(Self::Disk(path(&mount.source)?)),
                }
            }
            _ => Err(LayersError::Shape),
        }
    }
}

/// The images of one layer.
fn image(mount: &Mount) -> Result<Vec<PathBuf>, LayersError> {
    let mut images = vec![path(&mount.source)?];
    for option in &mount.options {
        match option.split_once('=') {
            Some(("device", device)) => images.push(path(device)?),
            Some(("X-containerd.dmverity", _)) => return Err(LayersError::Verity),
            None if ["ro", "loop"].contains(&option.as_str()) => {}
            _ => return Err(LayersError::Option(option.clone())),
        }
    }
    Ok(images)
}

fn path(text: &str) -> Result<PathBuf, LayersError> {
    if text.starts_with('/') { Ok(text.into()) } else { Err(LayersError::Path(text.into())) }
}

/// The layers that a template of the mount manager's names: `{{ mount 0 }}`, or `{{ overlay 0 3 }}` for a range in either
/// direction.
fn named(template: &str, parts: &[Part]) -> Result<Vec<Vec<PathBuf>>, LayersError> {
    let unknown = || LayersError::Template(template.into());
    let layer = |number: usize| match parts.get(number) {
        Some(Part::Layer(images)) => Ok(images.clone()),
        _ => Err(unknown()),
    };
    let (words, rest) = words(template).ok_or_else(unknown)?;
    let number = |word: &str| word.parse::<usize>().map_err(|_| unknown());
    match (words.as_slice(), rest) {
        (["mount", one], "") => Ok(vec![layer(number(one)?)?]),
        (["overlay", first, last], "") => match (number(first)?, number(last)?) {
            (first, last) if first <= last => (first..=last).map(layer).collect(),
            (first, last) => (last..=first).rev().map(layer).collect(),
        },
        _ => Err(unknown()),
    }
}

/// The words of a template at the beginning of a text, and what comes after it.
fn words(text: &str) -> Option<(Vec<&str>, &str)> {
    let (inside, rest) = text.strip_prefix("{{")?.split_once("}}")?;
    Some((inside.split_ascii_whitespace().collect(), rest))
}

/// Options of an overlay.
#[derive(Default)]
struct Overlay<'a> {
    lower: Option<&'a str>,
    upper: Option<&'a str>,
    work: Option<&'a str>,
    /// Directories that the mount manager would make.
    made: Vec<&'a str>,
    mapped_root: Option<u32>,
    volatile: bool,
}

impl<'a> Overlay<'a> {
    fn of(options: &'a [String]) -> Result<Self, LayersError> {
        let mut overlay = Self::default();
        for option in options {
            match option.split_once('=') {
                Some(("lowerdir", lower)) => overlay.lower = Some(lower),
                Some(("upperdir", upper)) => overlay.upper = Some(upper),
                Some(("workdir", work)) => overlay.work = Some(work),
                Some(("X-containerd.mkdir.path", made)) => overlay.made.push(made),
                // See `share::rootfs`: a guest maps no ids.
                Some(("uidmap", map)) => overlay.mapped_root = map.split(':').nth(1).and_then(|id| id.parse().ok()),
                Some(("gidmap", _)) => {}
                // What the guest's overlay has or has not in any case.
                Some(("index" | "metacopy" | "redirect_dir" | "nfs_export", "off")) => {}
                None if ["ro", "rw", "userxattr"].contains(&option.as_str()) => {}
                None if option == "volatile" => overlay.volatile = true,
                _ => return Err(LayersError::Option(option.clone())),
            }
        }
        Ok(overlay)
    }

    fn top(&self, parts: &[Part]) -> Result<Option<Top>, LayersError> {
        let (upper, work) = match (self.upper, self.work) {
            (None, None) => return Ok(None),
            (Some(upper), Some(work)) => (upper, work),
            _ => return Err(LayersError::Shape),
        };
        if let (Some((words, "/upper")), Some((others, "/work"))) = (words(upper), words(work)) {
            let ["mount", number] = words.as_slice() else { return Err(LayersError::Template(upper.into())) };
            let part = number.parse().ok().and_then(|number: usize| parts.get(number)).filter(|_| words == others);
            // The guest makes both directories, with the mode that these say.
            let known = |made: &&str| [format!("{upper}:0755"), format!("{work}:0755")].contains(&(*made).to_owned());
            return match part {
                Some(Part::Disk(file)) if self.made.iter().all(known) => Ok(Some(Top::Disk(file.clone()))),
                _ => Err(LayersError::Template(upper.into())),
            };
        }
        let (upper, work) = (path(upper)?, path(work)?);
        let names = [&upper, &work].map(|path| path.file_name());
        match (upper.parent(), work.parent()) {
            (Some(dir), Some(other)) if dir == other && names == UPPER_NAMES.map(|name| Some(OsStr::new(name))) => {
                Ok(Some(Top::Directory { dir: dir.into(), mapped_root: self.mapped_root }))
            }
            _ => Err(LayersError::Upper(upper)),
        }
    }
}

/// An overlay over directories on which containerd 2.1 has mounted images. Whatever is different from what that does is an overlay
/// for the host.
fn mounted(mount: &Mount, is_image_mounted_on: impl Fn(&Path) -> bool) -> Option<Layered> {
    if mount.type_ != "overlay" {
        return None;
    }
    let overlay = Overlay::of(&mount.options).ok()?;
    let image = |lower: &str| {
        let image = Path::new(lower).parent()?.join(IMAGE);
        (lower.starts_with('/') && is_image_mounted_on(Path::new(lower))).then_some(vec![image])
    };
    let layers = overlay.lower?.split(':').map(image).collect::<Option<Vec<_>>>()?;
    Some(Layered { layers, top: overlay.top(&[]).ok()?, volatile: overlay.volatile })
}

/// Whether an EROFS is mounted on a directory, whose image is beside it. May wait for the host.
pub fn is_image_mounted_on(dir: &Path) -> bool {
    let is_erofs =
        rustix::fs::statfs(dir).is_ok_and(|found| u64::try_from(found.f_type).is_ok_and(|kind| kind == EROFS));
    is_erofs && dir.parent().is_some_and(|parent| parent.join(IMAGE).is_file())
}

/// Layers that the guest cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// Not what any snapshotter is known to describe.
    #[error("the mounts of the container's root file system are put together in a way that this runtime does not know")]
    Shape,
    /// An option.
    #[error(
        "option {0:?} of a root file system's mount is not known to this runtime; leave it out of the snapshotter's configuration"
    )]
    Option(String),
    /// Integrity.
    #[error(
        "a root file system of image layers with dm-verity is not supported: set dmverity_mode = \"off\" for containerd's erofs snapshotter, or use fs-verity (enable_fsverity)"
    )]
    Verity,
    /// A template.
    #[error("{0:?} names no mount of the container's root file system")]
    Template(String),
    /// Not from the root.
    #[error("{0:?}, in a mount of the container's root file system, is no absolute path")]
    Path(String),
    /// Upper and work directory.
    #[error(
        "the upper directory {0} of the container's root file system is none of containerd's erofs snapshotter: `fs`, with `work` beside it"
    )]
    Upper(PathBuf),
}

#[cfg(test)]
mod tests {
    use super::*;

    const SNAPSHOTS: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.erofs/snapshots";

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        let options = options.iter().map(|option| option.replace('~', SNAPSHOTS)).collect();
        Mount { type_: kind.into(), source: source.replace('~', SNAPSHOTS), options, ..Mount::default() }
    }

    fn layer(number: u32) -> Mount {
        mount("erofs", &format!("~/{number}/layer.erofs"), &["ro", "loop"])
    }

    fn image(number: u32) -> Vec<PathBuf> {
        vec![format!("{SNAPSHOTS}/{number}/layer.erofs").into()]
    }

    fn directory(number: u32) -> Option<Top> {
        Some(Top::Directory { dir: format!("{SNAPSHOTS}/{number}").into(), mapped_root: None })
    }

    fn parsed(mounts: &[Mount]) -> Result<Option<Layered>, LayersError> {
        parse(mounts, |_| false)
    }

    const UPPER: [&str; 2] = ["workdir=~/9/work", "upperdir=~/9/fs"];

    #[test]
    fn container_of_several_layers() {
        let overlay = [&UPPER[..], &["lowerdir={{ overlay 0 2 }}"]].concat();
        let mounts = [layer(3), layer(2), layer(1), mount("format/mkdir/overlay", "overlay", &overlay)];
        let expected = Layered { layers: vec![image(3), image(2), image(1)], top: directory(9), volatile: false };
        assert_eq!(parsed(&mounts).unwrap(), Some(expected.clone()));
        let backwards = [&UPPER[..], &["lowerdir={{overlay 2 0}}", "index=off", "volatile"]].concat();
        let mounts = [layer(1), layer(2), layer(3), mount("format/overlay", "overlay", &backwards)];
        assert_eq!(parsed(&mounts).unwrap(), Some(Layered { volatile: true, ..expected }));
    }

    #[test]
    fn container_of_one_layer_and_views() {
        let overlay =
            [&UPPER[..], &["lowerdir={{ mount 0 }}", "uidmap=0:65536:65536", "gidmap=0:65536:65536"]].concat();
        let one = parsed(&[layer(1), mount("format/mkdir/overlay", "overlay", &overlay)]).unwrap().unwrap();
        let dir = format!("{SNAPSHOTS}/9").into();
        assert_eq!(one.top, Some(Top::Directory { dir, mapped_root: Some(65536) }));
        assert_eq!(one.layers, [image(1)]);
        let view = Layered { layers: vec![image(1)], top: None, volatile: false };
        assert_eq!(parsed(&[layer(1)]).unwrap(), Some(view.clone()));
        let bound = mount("format/bind", "{{ mount 0 }}", &["ro", "rbind"]);
        assert_eq!(parsed(&[layer(1), bound]).unwrap(), Some(view));
        let several = [layer(2), layer(1), mount("format/mkdir/overlay", "overlay", &["lowerdir={{ overlay 0 1 }}"])];
        assert_eq!(parsed(&several).unwrap().unwrap().top, None);
    }

    #[test]
    fn merged_layers_are_one_file_system_in_several_images() {
        let merged =
            mount("erofs", "~/2/fsmeta.erofs", &["ro", "loop", "device=~/1/layer.erofs", "device=~/2/layer.erofs"]);
        let overlay = [&UPPER[..], &["lowerdir={{ overlay 0 1 }}"]].concat();
        let mounts = [layer(3), merged, mount("format/mkdir/overlay", "overlay", &overlay)];
        let merged = vec![format!("{SNAPSHOTS}/2/fsmeta.erofs").into(), image(1).remove(0), image(2).remove(0)];
        assert_eq!(parsed(&mounts).unwrap().unwrap().layers, [image(3), merged]);
    }

    #[test]
    fn what_is_written_may_be_on_a_disk() {
        let disk = mount("ext4", "~/9/rwlayer.img", &["rw", "loop"]);
        let overlay = [
            "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
            "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
            "workdir={{ mount 0 }}/work",
            "upperdir={{ mount 0 }}/upper",
            "lowerdir={{ overlay 1 2 }}",
        ];
        let mounts = [disk, layer(2), layer(1), mount("format/mkdir/overlay", "overlay", &overlay)];
        let found = parsed(&mounts).unwrap().unwrap();
        assert_eq!(found.layers, [image(2), image(1)]);
        assert_eq!(found.top, Some(Top::Disk(format!("{SNAPSHOTS}/9/rwlayer.img").into())));
    }

    #[test]
    fn overlay_over_mounted_images_is_one_of_layers_if_all_are() {
        let overlay = |lower: &str| mount("overlay", "overlay", &[UPPER[0], UPPER[1], lower]);
        let mounts = [overlay("lowerdir=~/2/fs:~/1/fs")];
        let found = parse(&mounts, |_| true).unwrap().unwrap();
        assert_eq!(found, Layered { layers: vec![image(2), image(1)], top: directory(9), volatile: false });
        assert_eq!(parse(&mounts, |dir| dir.ends_with("2/fs")).unwrap(), None);
        assert_eq!(parsed(&mounts).unwrap(), None);
        for other in [overlay("lowerdir=relative/fs"), overlay("other=~/1/fs"), mount("bind", "~/1/fs", &["rbind"])] {
            assert_eq!(parse(&[other], |_| true).unwrap(), None);
        }
        assert_eq!(parse(&[], |_| true).unwrap(), None);
    }

    #[test]
    fn hostile_24_layers_that_are_put_together_in_another_way_are_refused() {
        let overlay = |options: &[&str]| mount("format/mkdir/overlay", "overlay", options);
        let lower = "lowerdir={{ mount 0 }}";
        for mounts in [
            vec![layer(1), layer(2)],
            vec![mount("bind", "/", &["rbind"]), layer(1)],
            vec![layer(1), mount("bind", "/", &["rbind"])],
            vec![layer(1), mount("ext4", "/dev/sda", &["rw"])],
            vec![mount("bind", "/", &[]), layer(1), overlay(&[lower])],
            vec![mount("erofs", "layer.erofs", &[])],
            vec![mount("erofs", "~/1/layer.erofs", &["device=layer.erofs"])],
            vec![mount("erofs", "~/1/layer.erofs", &["fsoffset=4096"])],
            vec![mount("erofs", "~/1/layer.erofs", &["ro", "X-containerd.dmverity=~/1/.dmverity"])],
            vec![layer(1), overlay(&[])],
            vec![layer(1), overlay(&["lowerdir=/etc"])],
            vec![layer(1), overlay(&["lowerdir={{ mount 0 }}:/etc"])],
            vec![layer(1), overlay(&["lowerdir={{ mount 1 }}"])],
            vec![layer(1), overlay(&["lowerdir={{ mount -1 }}"])],
            vec![layer(1), overlay(&["lowerdir={{ source 0 }}"])],
            vec![layer(1), overlay(&["lowerdir={{ overlay 0 18446744073709551615 }}"])],
            vec![layer(1), overlay(&["lowerdir={{ mount 0"])],
            vec![layer(1), overlay(&[lower, "upperdir=~/9/fs"])],
            vec![layer(1), overlay(&[lower, "upperdir=~/9/fs", "workdir=~/8/work"])],
            vec![layer(1), overlay(&[lower, "upperdir=/etc", "workdir=/work"])],
            vec![layer(1), overlay(&[lower, "upperdir=fs", "workdir=work"])],
            vec![layer(1), overlay(&[lower, "upperdir={{ mount 0 }}/upper", "workdir={{ mount 0 }}/work"])],
            vec![layer(1), overlay(&[lower, "redirect_dir=on"])],
            vec![
                mount("ext4", "~/9/rw", &["rw", "journal_path=/dev/sda"]),
                layer(1),
                overlay(&["lowerdir={{ mount 1 }}"]),
            ],
        ] {
            assert!(parsed(&mounts).is_err(), "{mounts:?}");
        }
    }
}
