//! Versions of a volume, laid out as the kubelet does.

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
        let mut names: Vec<_> = names(&self.target()).unwrap().into_iter().collect();
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
