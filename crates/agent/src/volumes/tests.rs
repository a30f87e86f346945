//! Versions of a volume, laid out as the kubelet does.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};

/// A volume on the "host" and the place of its copy.
struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("source")).unwrap();
        std::fs::create_dir(dir.path().join("target")).unwrap();
        Self { dir }
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("target")
    }

    fn version(&self, name: &str, files: &[(&str, &str)]) -> &Self {
        for (path, content) in files {
            let path = self.source().join(name).join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        self
    }

    fn switch(&self, name: &str) -> io::Result<()> {
        switch(&self.source(), &self.target(), OsStr::new(name))
    }

    fn read(&self, path: &str) -> io::Result<String> {
        std::fs::read_to_string(self.target().join(path))
    }

    fn names(&self) -> Vec<OsString> {
        let entries = std::fs::read_dir(self.target()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }
}

#[test]
fn versions_follow_each_other() {
    let volume = Fixture::new();
    volume.version("..1", &[("a", "one"), ("dir/b", "deep")]).switch("..1").unwrap();
    assert_eq!(volume.names(), ["..1", "..data", "a", "dir"]);
    assert_eq!((volume.read("a").unwrap(), volume.read("dir/b").unwrap()), ("one".into(), "deep".into()));
    volume.version("..2", &[("a", "two"), ("c", "new")]).switch("..2").unwrap();
    assert_eq!(volume.names(), ["..2", "..data", "a", "c"]);
    assert_eq!((volume.read("a").unwrap(), volume.read("c").unwrap()), ("two".into(), "new".into()));
}

/// Mounts of other volumes need them, and the kubelet's are not the only ones that may be there.
#[test]
fn what_lies_beside_the_versions_is_there_and_stays() {
    let volume = Fixture::new();
    let source = volume.source();
    volume.version("..1", &[("a", "one")]).version("..0", &[("old", "x")]);
    symlink("..1", source.join("..data")).unwrap();
    symlink("..data/a", source.join("a")).unwrap();
    std::fs::create_dir_all(source.join("more/deep")).unwrap();
    std::fs::set_permissions(source.join("more"), std::fs::Permissions::from_mode(0o2750)).unwrap();
    std::fs::write(source.join("place"), "of a file").unwrap();
    let target = volume.target().join("copy");
    make_and_switch(&source, &target, OsStr::new("..1")).unwrap();
    let names = || {
        let mut names: Vec<_> = std::fs::read_dir(&target).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["..1", "..data", "a", "more", "place"]);
    assert_eq!(target.join("more").metadata().unwrap().mode() & 0o7777, 0o2750);
    assert!(target.join("more/deep").is_dir());
    volume.version("..2", &[("b", "two")]);
    switch(&source, &target, OsStr::new("..2")).unwrap();
    assert_eq!(names(), ["..2", "..data", "b", "more", "place"]);
}

#[test]
fn mode_and_owner_are_kept() {
    let volume = Fixture::new();
    volume.version("..1", &[("run", "#!")]);
    let file = volume.source().join("..1/run");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o4750)).unwrap();
    volume.switch("..1").unwrap();
    let (was, is) = (file.metadata().unwrap(), volume.target().join("run").metadata().unwrap());
    assert_eq!((was.mode(), was.uid(), was.gid()), (is.mode(), is.uid(), is.gid()));
}

#[test]
fn version_that_is_gone_leaves_the_current_one() {
    let volume = Fixture::new();
    volume.version("..1", &[("a", "one")]).switch("..1").unwrap();
    assert_eq!(volume.switch("..2").unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(volume.names(), ["..1", "..data", "a"]);
    assert_eq!(volume.read("a").unwrap(), "one");
}

#[test]
fn watch_sees_what_the_kubelet_does() {
    let volume = Fixture::new();
    volume.version("..1", &[("a", "one")]).switch("..1").unwrap();
    let watch = inotify::init(CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&watch, volume.target(), WatchFlags::CREATE | WatchFlags::MOVED_TO).unwrap();
    volume.version("..2", &[("a", "two")]).switch("..2").unwrap();
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(&watch, &mut buffer);
    let mut seen = Vec::new();
    while let Ok(event) = reader.next() {
        let name = event.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        seen.push((event.events() & (ReadFlags::CREATE | ReadFlags::MOVED_TO), name));
    }
    assert!(seen.contains(&(ReadFlags::CREATE, "..2".into())), "{seen:?}");
    assert!(seen.contains(&(ReadFlags::MOVED_TO, "..data".into())), "{seen:?}");
}

#[test]
fn only_names_are_versions() {
    for (text, fit) in
        [("..2024_01_01", true), ("a/b", false), ("..", false), ("/", false), ("..data", false), ("", false)]
    {
        let volume = CopiedVolume { version: text.into(), ..CopiedVolume::default() };
        assert_eq!(version(&volume).is_ok(), fit, "{text:?}");
    }
}

#[test]
fn what_is_too_deep_is_refused() {
    let volume = Fixture::new();
    let deep = "d/".repeat(MAX_DEPTH + 1) + "f";
    volume.version("..1", &[(deep.as_str(), "x")]);
    assert!(volume.switch("..1").is_err());
    assert!(volume.names().is_empty());
}

#[test]
fn links_of_a_volume_are_copied_as_links() {
    let volume = Fixture::new();
    volume.version("..1", &[("a", "one")]);
    symlink("/etc/passwd", volume.source().join("..1/absolute")).unwrap();
    symlink("nowhere", volume.source().join("..1/dangling")).unwrap();
    volume.switch("..1").unwrap();
    let link = |name: &str| std::fs::read_link(volume.target().join("..1").join(name)).unwrap();
    assert_eq!((link("absolute"), link("dangling")), ("/etc/passwd".into(), "nowhere".into()));
    assert_eq!(volume.names(), ["..1", "..data", "a", "absolute", "dangling"]);
}

#[test]
fn volume_itself_is_no_link() {
    let volume = Fixture::new();
    volume.version("..1", &[("a", "one")]);
    let link = volume.dir.path().join("link");
    symlink("source", &link).unwrap();
    let made = volume.dir.path().join("made");
    let refused = make_and_switch(&link, &made, OsStr::new("..1")).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::NotADirectory);
    assert_eq!(std::fs::read_dir(&made).unwrap().count(), 0);
    make_and_switch(&volume.source(), &volume.dir.path().join("other"), OsStr::new("..1")).unwrap();
}

/// What a container would reach by links in its copy, and how it was.
struct Victim {
    dir: PathBuf,
    before: BTreeMap<PathBuf, (u32, String)>,
}

impl Victim {
    /// Beside the volume's copy. It has names of the volume's, and other modes.
    fn new(volume: &Fixture) -> Self {
        let dir = volume.dir.path().join("victim");
        std::fs::create_dir_all(dir.join("dir")).unwrap();
        for name in ["file", "a", "dir/b"] {
            std::fs::write(dir.join(name), "the guest's").unwrap();
            std::fs::set_permissions(dir.join(name), std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        let before = tree(&dir);
        assert_eq!(before.len(), 5);
        Self { dir, before }
    }

    fn assert_untouched(&self, what: &str) {
        assert_eq!(tree(&self.dir), self.before, "{what}");
    }
}

/// Modes and contents of a tree.
fn tree(dir: &Path) -> BTreeMap<PathBuf, (u32, String)> {
    let Ok(found) = dir.symlink_metadata() else { return BTreeMap::new() };
    let below = found.is_dir().then(|| std::fs::read_dir(dir).unwrap());
    let below: Vec<_> = below.into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    let content = std::fs::read_to_string(dir).unwrap_or_default();
    let mut tree: BTreeMap<_, _> = below.iter().flat_map(|path| tree(path)).collect();
    tree.insert(dir.into(), (found.mode(), content));
    tree
}

/// A copy at its first version, with the second one beside it on the host.
fn before_an_update() -> (Fixture, Victim) {
    let volume = Fixture::new();
    volume.version("..1", &[("a", "one"), ("dir/b", "deep")]).switch("..1").unwrap();
    volume.version("..2", &[("a", "two"), ("dir/b", "deeper")]);
    let victim = Victim::new(&volume);
    (volume, victim)
}

#[test]
fn hostile_22_links_in_a_copy_lead_an_update_nowhere() {
    let links = [DATA_LINK, NEXT_DATA, "..data_tmp/x"];
    let places = ["..2", "..1", "a", "dir", "..1/a", "..1/dir", "..1/new", "..2/a", "..2/dir"];
    for place in places.into_iter().chain(links) {
        for (to, absolute) in [("", true), ("", false), ("file", true), ("dir", false)] {
            let (volume, victim) = before_an_update();
            let path = volume.target().join(place);
            let up = "../".repeat(Path::new(place).components().count());
            let to = if absolute { victim.dir.join(to) } else { Path::new(&up).join("victim").join(to) };
            if path.is_dir() && !path.is_symlink() {
                std::fs::remove_dir_all(&path).unwrap();
            } else {
                let _ = std::fs::remove_file(&path);
            }
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(&to, &path).unwrap();
            let what = format!("{place} -> {to:?}");
            volume.switch("..2").expect(&what);
            victim.assert_untouched(&what);
            assert_eq!(std::fs::read_link(volume.target().join(DATA_LINK)).unwrap(), Path::new("..2"), "{what}");
            assert_eq!(tree(&volume.target().join("..2")).len(), 4, "{what}");
            assert_eq!(volume.read("..data/a").unwrap() + &volume.read("..data/dir/b").unwrap(), "twodeeper", "{what}");
        }
    }
}

/// Links that come between the steps of a copy.
#[test]
fn hostile_22_names_that_are_taken_are_not_written_through() {
    let (volume, victim) = before_an_update();
    let from = open_dir(CWD, volume.source().join("..2").as_os_str()).unwrap();
    let like = fstat(&from).unwrap();
    for (number, (name, to)) in [("a", "file"), ("a", "nonesuch"), ("dir", "dir"), ("dir", "")].into_iter().enumerate()
    {
        let place = volume.target().join(format!("copy{number}"));
        let copy = make_dir(CWD, place.as_os_str(), &like).unwrap();
        symlink(victim.dir.join(to), place.join(name)).unwrap();
        let error = copy_dir(&from, &copy, MAX_DEPTH).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{name} -> {to}");
        assert_eq!(make_dir(&copy, OsStr::new(name), &like).unwrap_err(), Errno::EXIST, "{name} -> {to}");
        assert!(open_dir(&copy, OsStr::new(name)).is_err(), "{name} -> {to}");
        victim.assert_untouched(name);
        // The directory's path is of no importance any more.
        std::fs::rename(&place, volume.target().join("moved")).unwrap();
        symlink(&victim.dir, &place).unwrap();
        remove(&copy, OsStr::new(name), MAX_DEPTH).unwrap();
        let _ = remove(&copy, OsStr::new("a"), MAX_DEPTH);
        let _ = remove(&copy, OsStr::new("dir"), MAX_DEPTH);
        copy_dir(&from, &copy, MAX_DEPTH).unwrap();
        victim.assert_untouched(name);
        std::fs::remove_dir_all(volume.target().join("moved")).unwrap();
    }
}

#[test]
fn hostile_22_directory_in_the_links_place_is_refused() {
    let (volume, victim) = before_an_update();
    std::fs::remove_file(volume.target().join(DATA_LINK)).unwrap();
    std::fs::create_dir(volume.target().join(DATA_LINK)).unwrap();
    symlink(&victim.dir, volume.target().join("..data/link")).unwrap();
    for _ in 0..2 {
        assert_eq!(volume.switch("..2").unwrap_err().kind(), io::ErrorKind::IsADirectory);
        victim.assert_untouched(DATA_LINK);
    }
}

#[test]
fn hostile_22_tree_deeper_than_a_copy_is_not_walked() {
    let (volume, _) = before_an_update();
    std::fs::create_dir_all(volume.target().join("..2").join("d/".repeat(MAX_DEPTH + 1))).unwrap();
    assert_eq!(volume.switch("..2").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(volume.read("a").unwrap(), "one");
}

/// Puts a link where the agent has made something, or is about to.
fn plant(dir: &OwnedFd, name: &str, to: &Path) -> usize {
    let _ = renameat(dir, name, dir, "..stash");
    let planted = symlinkat(to, dir, name).is_ok();
    let _ = remove(dir, OsStr::new("..stash"), MAX_DEPTH);
    planted.into()
}

/// A program that is as fast as the agent.
#[test]
fn hostile_22_links_planted_during_an_update_lead_nowhere() {
    const ROUNDS: usize = 150;
    let (volume, victim) = before_an_update();
    let keys: Vec<String> = (0..20).map(|number| format!("a{number}")).collect();
    let files: Vec<_> = keys.iter().map(|key| (key.as_str(), "x")).collect();
    volume.version("..2", &files).version("..3", &files).version("..3", &[("dir/b", "x")]);
    let (ended, planted) = (AtomicBool::new(false), AtomicUsize::new(0));
    let refused = std::thread::scope(|scope| {
        scope.spawn(|| {
            let target = open_dir(CWD, volume.target().as_os_str()).unwrap();
            while !ended.load(Ordering::Relaxed) {
                let mut count = 0;
                for version in ["..2", "..3"] {
                    if let Ok(dir) = open_dir(&target, OsStr::new(version)) {
                        count += plant(&dir, "a7", &victim.dir.join("a")) + plant(&dir, "dir", &victim.dir);
                    }
                    count += plant(&target, version, &victim.dir);
                }
                count += plant(&target, NEXT_DATA, &victim.dir) + plant(&target, DATA_LINK, Path::new("../victim"));
                planted.fetch_add(count, Ordering::Relaxed);
            }
        });
        let (mut rounds, mut refused) = (0, 0);
        // A busy machine may let the other one wait.
        while rounds < ROUNDS || refused == 0 && rounds < 100 * ROUNDS {
            refused += usize::from(volume.switch(["..2", "..3"][rounds % 2]).is_err());
            rounds += 1;
        }
        ended.store(true, Ordering::Relaxed);
        println!("{refused} of {rounds} updates refused, {planted:?} links planted");
        refused
    });
    assert!(refused > 0 && planted.into_inner() > 0, "no link was in an update's way");
    victim.assert_untouched("a race");
    // Left alone, it goes on.
    let _ = std::fs::remove_file(volume.target().join(DATA_LINK));
    for version in ["..2", "..3"] {
        volume.switch(version).unwrap();
        assert_eq!(volume.read("..data/a7").unwrap(), "x");
    }
}
