//! The share's mounts, each test in a mount namespace of its own, which takes root.

mod fuse;

use super::*;
use rustix::mount::MountFlags;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;

/// Runs `body` in a thread with a private mount namespace. unshare(2) of the file system attributes is per thread.
pub fn in_mount_namespace(body: impl FnOnce(&Path) + Send + 'static) {
    assert!(rustix::process::geteuid().is_root(), "the share's mounts are tested as root");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_path_buf();
    std::thread::spawn(move || {
        // SAFETY: of the flags only FILES can break other threads' descriptors, and it is not given.
        #[allow(unsafe_code)]
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        body(&path);
    })
    .join()
    .unwrap();
}

fn volume(source: &Path) -> Volume {
    Volume {
        source: source.to_path_buf(),
        recursive: true,
        access: Access::ReadWrite,
        follows_host: false,
        copied: false,
        scratch: false,
        mapped_by: None,
    }
}

fn overlay(dir: &Path) -> Mount {
    let made = ["lower", "upper", "work"].map(|name| dir.join(name));
    made.iter().for_each(|path| std::fs::create_dir(path).unwrap());
    std::fs::write(made[0].join("file"), "lower").unwrap();
    let [lower, upper, work] = made.map(|path| path.display().to_string());
    Mount {
        type_: "overlay".into(),
        source: "overlay".into(),
        options: vec![format!("lowerdir={lower}"), format!("upperdir={upper}"), format!("workdir={work}")],
        ..Mount::default()
    }
}

#[test]
fn container_appears_and_leaves_nothing() {
    in_mount_namespace(|dir| {
        // overlayfs takes no overlay as its upper directory, and / may be one.
        rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), None).unwrap();
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        std::fs::create_dir(dir.join("vol")).unwrap();
        std::fs::write(dir.join("vol/data"), "v").unwrap();
        share.add_rootfs("c", &[overlay(dir)], Path::new("/nonexistent")).unwrap();
        share.add_volume("c", 0, &volume(&dir.join("vol"))).unwrap();
        share.add_volume("c", 1, &Volume { access: Access::ReadOnly, ..volume(&dir.join("vol/data")) }).unwrap();
        let at = run.share().join("c");
        assert_eq!(std::fs::read_to_string(at.join("rootfs/file")).unwrap(), "lower");
        assert_eq!(std::fs::read_to_string(at.join("mounts/0/data")).unwrap(), "v");
        assert!(std::fs::write(at.join("mounts/1"), "x").is_err(), "read-only on the host side");
        share.remove_container("c").unwrap();
        assert!(!at.exists());
        Share::destroy(&run).unwrap();
        assert!(!run.path().exists());
        assert_eq!(std::fs::read_to_string(dir.join("vol/data")).unwrap(), "v", "the volume itself is untouched");
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn unmounting_a_volume_leaves_the_hosts_mounts() {
    in_mount_namespace(|dir| {
        rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(dir, MountPropagationFlags::SHARED).unwrap();
        std::fs::create_dir_all(dir.join("vol/inner")).unwrap();
        rustix::mount::mount("tmpfs", dir.join("vol/inner"), "tmpfs", MountFlags::empty(), None).unwrap();
        std::fs::write(dir.join("vol/inner/kept"), "").unwrap();
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        share.add_volume("c", 0, &volume(&dir.join("vol"))).unwrap();
        assert!(run.share().join("c/mounts/0/inner/kept").exists());
        share.remove_container("c").unwrap();
        assert!(dir.join("vol/inner/kept").exists());
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn root_file_system_for_a_user_namespace_keeps_the_ids_on_disk() {
    in_mount_namespace(|dir| {
        rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), None).unwrap();
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        let mut mount = overlay(dir);
        std::os::unix::fs::chown(dir.join("upper"), Some(65536), Some(65536)).unwrap();
        mount.options.extend(["uidmap=0:65536:65536".to_owned(), "gidmap=0:65536:65536".to_owned()]);
        share.add_rootfs("c", &[mount], Path::new("/nonexistent")).unwrap();
        let root = std::fs::metadata(run.share().join("c/rootfs")).unwrap();
        assert_eq!((root.uid(), root.gid()), (0, 0));
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn read_only_reaches_what_is_mounted_below() {
    in_mount_namespace(|dir| {
        std::fs::create_dir_all(dir.join("vol/inner")).unwrap();
        rustix::mount::mount("tmpfs", dir.join("vol/inner"), "tmpfs", MountFlags::empty(), None).unwrap();
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        share.add_volume("c", 0, &Volume { access: Access::ReadOnly, ..volume(&dir.join("vol")) }).unwrap();
        let at = run.share().join("c/mounts/0");
        assert!(std::fs::write(at.join("file"), "").is_err());
        assert!(std::fs::write(at.join("inner/file"), "").is_err());
        assert!(std::fs::write(dir.join("vol/inner/file"), "").is_ok(), "the host's own mount stays as it is");
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn unsupported_rootfs_and_volumes_are_named() {
    in_mount_namespace(|dir| {
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        let block = Mount { type_: "ext4".into(), source: "/dev/vda".into(), ..Mount::default() };
        assert!(matches!(share.add_rootfs("c", &[block], dir), Err(ShareError::RootfsType(t)) if t == "ext4"));
        let socket = dir.join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        assert!(matches!(share.add_volume("c", 0, &volume(&socket)), Err(ShareError::Socket(_))));
        assert!(matches!(share.add_volume("c", 1, &volume(Path::new("/dev/null"))), Err(ShareError::Device(_))));
        assert!(matches!(share.add_volume("c", 2, &volume(&dir.join("none"))), Err(ShareError::Volume { .. })));
        share.remove_container("c").unwrap();
        Share::destroy(&run).unwrap();
    });
}

/// A thread in a mount namespace of its own that gets what is mounted in the share, as the VMM's jail does; answers for the
/// paths that it is asked about, until the asker is gone.
fn jail<T: Send + 'static>(
    answer: impl Fn(&Path) -> T + Send + 'static,
) -> (std::sync::mpsc::Sender<PathBuf>, std::sync::mpsc::Receiver<T>) {
    let (ask, asked) = std::sync::mpsc::channel::<PathBuf>();
    let (tell, told) = std::sync::mpsc::channel();
    let (begin, begun) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // SAFETY: of the flags only FILES can break other threads' descriptors, and it is not given.
        #[allow(unsafe_code)]
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.unwrap();
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
        begin.send(()).unwrap();
        asked.iter().for_each(|path| tell.send(answer(&path)).unwrap());
    });
    begun.recv().unwrap();
    (ask, told)
}

#[test]
fn hostile_11_read_only_volume_is_read_only_in_the_jail_too() {
    in_mount_namespace(|dir| {
        std::fs::create_dir_all(dir.join("vol/inner")).unwrap();
        rustix::mount::mount("tmpfs", dir.join("vol/inner"), "tmpfs", MountFlags::empty(), None).unwrap();
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        let (ask, told) = jail(|path| std::fs::write(path, ""));
        let write = |at: &str| {
            ask.send(run.share().join("c/mounts").join(at)).unwrap();
            told.recv().unwrap().is_ok()
        };
        for (index, access) in [Access::ReadWrite, Access::ReadOnly].into_iter().enumerate() {
            share.add_volume("c", index, &Volume { access, ..volume(&dir.join("vol")) }).unwrap();
        }
        assert_eq!(["0/file", "1/file"].map(write), [true, false]);
        assert_eq!(["0/inner/file", "1/inner/file"].map(write), [true, false], "what is mounted below as well");
        share.remove_container("c").unwrap();
        assert!(!write("0/file"), "unmounted there too");
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn volumes_are_nothing_but_data_to_the_host() {
    in_mount_namespace(|dir| {
        rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), None).unwrap();
        std::fs::create_dir(dir.join("vol")).unwrap();
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        share.add_rootfs("c", &[overlay(dir)], Path::new("/nonexistent")).unwrap();
        share.add_volume("c", 0, &volume(&dir.join("vol"))).unwrap();
        for at in ["c/rootfs", "c/mounts/0"] {
            let flags = rustix::fs::statvfs(run.share().join(at)).unwrap().f_flag;
            let wanted = rustix::fs::StatVfsMountFlags::NOSUID
                | rustix::fs::StatVfsMountFlags::NODEV
                | rustix::fs::StatVfsMountFlags::NOEXEC;
            assert!(flags.contains(wanted), "{at}: {flags:?}");
        }
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn mount_of_the_host_reaches_the_jail_only_where_a_volume_follows() {
    in_mount_namespace(|dir| {
        rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(dir, MountPropagationFlags::SHARED).unwrap();
        std::fs::create_dir_all(dir.join("vol/late")).unwrap();
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        let (ask, told) = jail(|path| std::fs::write(path, ""));
        for (index, follows_host) in [(0, false), (1, true)] {
            share.add_volume("c", index, &Volume { follows_host, ..volume(&dir.join("vol")) }).unwrap();
        }
        rustix::mount::mount("tmpfs", dir.join("vol/late"), "tmpfs", MountFlags::empty(), None).unwrap();
        for at in ["0/late/from-0", "1/late/from-1"] {
            ask.send(run.share().join("c/mounts").join(at)).unwrap();
            told.recv().unwrap().unwrap();
        }
        assert!(!dir.join("vol/late/from-0").exists(), "the volume that does not follow has what is below the mount");
        assert!(dir.join("vol/late/from-1").exists());
        share.remove_container("c").unwrap();
        assert!(dir.join("vol/late/from-1").exists(), "the host's mount stays");
        Share::destroy(&run).unwrap();
    });
}

/// What a container's volume is in the share.
fn shown(run: &RunDir, container: &str, index: usize) -> PathBuf {
    run.share().join(container).join("mounts").join(index.to_string()).canonicalize().unwrap()
}

/// Shows the directory `vol` to a container, and answers what it is in the share.
fn show(share: &Share, run: &RunDir, container: &str, volume: Volume) -> PathBuf {
    share.add_volumes(container, &[volume]).unwrap();
    shown(run, container, 0)
}

#[test]
fn volume_of_two_containers_is_one_mount_until_both_have_gone() {
    in_mount_namespace(|dir| {
        std::fs::create_dir(dir.join("vol")).unwrap();
        std::fs::create_dir(dir.join("other")).unwrap();
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        let one = show(&share, &run, "one", volume(&dir.join("vol")));
        // As the kubelet gives a subPath: by another mount of the same directory.
        std::fs::create_dir(dir.join("again")).unwrap();
        mount_bind(dir.join("vol"), dir.join("again")).unwrap();
        assert_eq!(show(&share, &run, "two", volume(&dir.join("again"))), one);
        assert_ne!(show(&share, &run, "three", volume(&dir.join("other"))), one);
        share.remove_container("one").unwrap();
        assert!(one.is_dir(), "the other one has it");
        share.remove_container("two").unwrap();
        assert!(!one.exists());
        assert_ne!(show(&share, &run, "two", volume(&dir.join("vol"))), one, "the guest may still know the old number");
        share.remove_container("two").unwrap();
        share.remove_container("three").unwrap();
        assert_eq!(std::fs::read_dir(run.share().join(SHARED_VOLUMES)).unwrap().count(), 0);
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn reader_has_the_writers_mount_if_the_pod_may_write_at_all() {
    in_mount_namespace(|dir| {
        let read_only = |source: &Path| Volume { access: Access::ReadOnly, ..volume(source) };
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        for name in ["vol", "fixed"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        let early = show(&share, &run, "early", read_only(&dir.join("vol")));
        assert!(std::fs::write(early.join("x"), "").is_err(), "nobody may write yet");
        let writer = show(&share, &run, "writer", volume(&dir.join("vol")));
        assert_ne!(writer, early);
        std::fs::write(writer.join("x"), "").unwrap();
        assert!(std::fs::write(early.join("x"), "").is_err());
        assert_eq!(show(&share, &run, "late", read_only(&dir.join("vol"))), writer);

        let scratch = dir.join("pods/u/volumes/kubernetes.io~empty-dir/v");
        std::fs::create_dir_all(&scratch).unwrap();
        let early = show(&share, &run, "scratch-early", Volume { scratch: true, ..read_only(&scratch) });
        let writer = show(&share, &run, "scratch-writer", Volume { scratch: true, ..volume(&scratch) });
        assert_eq!(writer, early, "the pod's own directory");
        let link = dir.join("pods/u/volumes/kubernetes.io~empty-dir/link");
        std::os::unix::fs::symlink(dir.join("fixed"), &link).unwrap();
        let linked = show(&share, &run, "linked", Volume { scratch: true, ..read_only(&link) });
        assert!(std::fs::write(linked.join("x"), "").is_err(), "a link with the name of one");

        // One container with both: whatever their order.
        share.add_volumes("both", &[read_only(&dir.join("fixed")), volume(&dir.join("fixed"))]).unwrap();
        assert_eq!(shown(&run, "both", 0), shown(&run, "both", 1));
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn volumes_that_may_differ_are_not_one() {
    in_mount_namespace(|dir| {
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        for name in ["vol/inner", "frozen", "plain"] {
            std::fs::create_dir_all(dir.join(name)).unwrap();
        }
        rustix::mount::mount("tmpfs", dir.join("vol/inner"), "tmpfs", MountFlags::empty(), None).unwrap();
        let with_mount_below = || volume(&dir.join("vol"));
        assert_ne!(
            show(&share, &run, "a", with_mount_below()),
            show(&share, &run, "b", with_mount_below()),
            "mounts below"
        );
        let follows = || Volume { follows_host: true, ..volume(&dir.join("plain")) };
        assert_ne!(show(&share, &run, "c", follows()), show(&share, &run, "d", follows()));
        let plain = show(&share, &run, "e", volume(&dir.join("plain")));
        // The same directory by a mount that the host has made read-only.
        mount_bind(dir.join("plain"), dir.join("frozen")).unwrap();
        rustix::mount::mount_remount(dir.join("frozen"), MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
        let frozen = show(&share, &run, "f", volume(&dir.join("frozen")));
        assert_ne!(frozen, plain);
        assert!(std::fs::write(frozen.join("x"), "").is_err());
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn hostile_19_device_that_was_opened_for_reading_cannot_be_opened_again_for_writing() {
    in_mount_namespace(|_| {
        let file = open_device(Path::new("/dev"), Path::new("null"), OFlags::RDONLY).unwrap();
        let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        for write in [true, false] {
            let error = std::fs::OpenOptions::new().read(!write).write(write).open(&again).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
        }
        assert_eq!(rustix::io::read(&file, &mut [0; 1]), Ok(0), "what is open stays open");
        assert!(std::fs::write("/dev/null", "x").is_ok(), "the host's own node stays as it is");
        assert!(open_device(Path::new("/dev"), Path::new("fd/0"), OFlags::RDONLY).is_err(), "a link");
    });
}

#[test]
fn outermost_mounts_are_told_by_whole_names_and_stay_as_often_as_they_are() {
    let sorted = |mounts: &[&str]| outermost(mounts.iter().map(PathBuf::from).collect());
    let mounts = ["/s/a/x", "/s/a-b/y", "/s/a", "/s/a-b", "/s/b/c/d", "/s/a", "/s/a/x/z", "/s/b/c/e"];
    assert_eq!(sorted(&mounts), ["/s/a", "/s/a", "/s/a-b", "/s/b/c/d", "/s/b/c/e"].map(PathBuf::from));
    assert_eq!(sorted(&["/s/a/x", "/s", "/s/a"]), [PathBuf::from("/s")]);
}

#[test]
fn nested_and_stacked_mounts_go_and_from_the_jail_as_well() {
    in_mount_namespace(|dir| {
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        let (ask, told) = jail(|path| mountinfo::mounts_below(path).unwrap().len());
        let count = |path: &Path| {
            ask.send(path.to_path_buf()).unwrap();
            (mountinfo::mounts_below(path).unwrap().len(), told.recv().unwrap())
        };
        let at = run.share().join("c");
        let tmpfs = |place: &str| {
            std::fs::create_dir_all(at.join(place)).unwrap();
            rustix::mount::mount("tmpfs", at.join(place), "tmpfs", MountFlags::empty(), None).unwrap();
        };
        // The second `a` hides what is below the first one, and has something of its own at the same place.
        ["a", "a/b", "a/b/c", "a", "a/b", "a/b", "d/e"].into_iter().for_each(tmpfs);
        mount_bind(at.join("a/b"), at.join("a")).unwrap();
        assert_eq!(count(&at), (8, 8));
        // By itself: a directory that is removed loses its mounts in every namespace.
        detach_mounts(&at).unwrap();
        assert_eq!(count(&run.share()), (1, 1));
        share.remove_container("c").unwrap();
        assert!(!at.exists());
        ["a", "a/b", "a", "a/b"].into_iter().for_each(tmpfs);
        Share::destroy(&run).unwrap();
        assert_eq!(count(&run.share()), (0, 0));
    });
}

#[test]
fn volume_whose_server_is_silent_is_removed_without_asking_it() {
    for whole_pod in [false, true] {
        in_mount_namespace(move |dir| {
            let run = RunDir::new(&dir.join("run"), "ns", "pod");
            let share = Share::create(&run).unwrap();
            std::fs::create_dir(dir.join("vol")).unwrap();
            let server = fuse::mount(&dir.join("vol"));
            rustix::mount::mount("tmpfs", dir.join("vol/inner"), "tmpfs", MountFlags::empty(), None).unwrap();
            share.add_volume("c", 0, &volume(&dir.join("vol"))).unwrap();
            assert_eq!(mountinfo::mounts_below(&run.share()).unwrap().len(), 3);
            server.fall_silent();
            if !whole_pod {
                share.remove_container("c").unwrap();
                assert_eq!(mountinfo::mounts_below(&run.share()).unwrap().len(), 1);
            }
            Share::destroy(&run).unwrap();
            assert_eq!(server.unanswered(), 0);
            assert_eq!(mountinfo::mounts_below(&run.share()).unwrap().len(), 0);
            assert!(std::fs::metadata(dir.join("vol/inner")).is_err() && server.unanswered() > 0, "it would be seen");
        });
    }
}

#[test]
fn silent_volume_is_not_asked_for_what_it_hides() {
    in_mount_namespace(|dir| {
        let run = RunDir::new(&dir.join("run"), "ns", "pod");
        let share = Share::create(&run).unwrap();
        let (fuse, place) = (dir.join("fuse"), run.share().join("c/v"));
        std::fs::create_dir(&fuse).unwrap();
        let server = fuse::mount(&fuse);
        for place in [place.clone(), place.join("inner")] {
            std::fs::create_dir_all(&place).unwrap();
            rustix::mount::mount("tmpfs", &place, "tmpfs", MountFlags::empty(), None).unwrap();
        }
        // The oldest mount, and on top.
        rustix::mount::mount_move(&fuse, &place).unwrap();
        server.fall_silent();
        share.remove_container("c").unwrap();
        assert_eq!(server.unanswered(), 0);
        Share::destroy(&run).unwrap();
    });
}
