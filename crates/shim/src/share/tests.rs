//! The share's mounts, each test in a mount namespace of its own, which takes root.

mod fuse;
mod stage;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use super::directories::outermost;
use super::*;
use bulkhead_protocol::guest::SHARED_VOLUMES;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount};
use stage::{Pod, mounts_of_the_node, tmpfs};
pub use stage::{in_mount_namespace, jail_of};

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
fn container_appears_for_the_vmm_alone_and_leaves_nothing() {
    in_mount_namespace(|dir| {
        // overlayfs takes no overlay as its upper directory, and / may be one.
        tmpfs(dir);
        let before = mounts_of_the_node();
        let pod = Pod::new(dir);
        std::fs::create_dir(dir.join("vol")).unwrap();
        std::fs::write(dir.join("vol/data"), "v").unwrap();
        pod.share.add_rootfs("c", &[overlay(dir)], Path::new("/nonexistent")).unwrap();
        let shown = pod.show("c", volume(&dir.join("vol")));
        let read_only = pod.show("c", Volume { access: Access::ReadOnly, ..volume(&dir.join("vol/data")) });
        assert_eq!(pod.read("c/rootfs/file").unwrap(), "lower");
        assert_eq!(pod.read(shown.join("data")).unwrap(), "v");
        assert!(!pod.can_write(&read_only), "read-only on the host side");
        assert_eq!((pod.mounts(), mounts_of_the_node()), (3, before));
        let at = pod.run.share().join("c");
        assert_eq!(std::fs::read_dir(at.join("rootfs")).unwrap().count(), 0, "nothing is there for the node");
        pod.share.remove_container("c").unwrap();
        assert!(!at.exists());
        assert_eq!(pod.mounts(), 0);
        let run = pod.run.clone();
        pod.end();
        assert!(!run.path().exists());
        assert_eq!(std::fs::read_to_string(dir.join("vol/data")).unwrap(), "v", "the volume itself is untouched");
        Share::destroy(&run).unwrap();
    });
}

#[test]
fn nothing_is_mounted_where_no_vmm_is_locked_in() {
    in_mount_namespace(|dir| {
        let pod = Pod::new(dir);
        std::fs::create_dir(dir.join("vol")).unwrap();
        let before = mounts_of_the_node();
        // The namespace of a process that is in no jail: this one.
        let node =
            rustix::fs::open("/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        for vmm in [None, Some(node)] {
            let share = Share::of(&pod.run);
            vmm.into_iter().for_each(|vmm| share.is_jail_of(vmm));
            let added = share.add_volumes("c", vec![volume(&dir.join("vol"))]);
            assert!(matches!(added, Err(ShareError::Attach { .. })), "{added:?}");
            share.remove_container("c").unwrap();
        }
        assert_eq!(mounts_of_the_node(), before);
        pod.end();
    });
}

#[test]
fn directory_below_a_volume_is_the_nodes_to_unmount_and_remove() {
    in_mount_namespace(|dir| {
        tmpfs(&dir.join("vol/inner/deep"));
        let pod = Pod::new(dir);
        let shown = pod.show("c", volume(&dir.join("vol")));
        let file = shown.join("inner/deep/file");
        let open = pod.inside(|| File::create(Path::new("/").join(&file)).unwrap());
        unmount(dir.join("vol/inner/deep"), UnmountFlags::empty()).unwrap();
        std::fs::remove_dir(dir.join("vol/inner/deep")).unwrap();
        assert_eq!(pod.read(&file), None, "it went with its place");
        drop(open);
        pod.end();
    });
}

#[test]
fn root_file_system_is_mounted_by_the_call_that_older_kernels_have() {
    in_mount_namespace(|dir| {
        tmpfs(dir);
        let pod = Pod::new(dir);
        let before = mounts_of_the_node();
        let mut mount = overlay(dir);
        // An escaped separator, which only one option of all layers has.
        std::fs::rename(dir.join("lower"), dir.join("lo:er")).unwrap();
        mount.options[0] = format!("lowerdir={}/lo\\:er", dir.display());
        pod.share.add_rootfs("c", &[mount], Path::new("/nonexistent")).unwrap();
        assert_eq!(pod.read("c/rootfs/file").unwrap(), "lower");
        assert!(pod.can_write("c/rootfs/new") && dir.join("upper/new").exists());
        assert_eq!((pod.mounts(), mounts_of_the_node()), (1, before));
        pod.end();
    });
}

#[test]
fn unmounting_a_volume_leaves_the_hosts_mounts() {
    in_mount_namespace(|dir| {
        tmpfs(dir);
        mount_change(dir, MountPropagationFlags::SHARED).unwrap();
        tmpfs(&dir.join("vol/inner"));
        std::fs::write(dir.join("vol/inner/kept"), "").unwrap();
        let pod = Pod::new(dir);
        let shown = pod.show("c", volume(&dir.join("vol")));
        assert!(pod.read(shown.join("inner/kept")).is_some());
        pod.share.remove_container("c").unwrap();
        assert!(dir.join("vol/inner/kept").exists());
        pod.end();
    });
}

#[test]
fn root_file_system_for_a_user_namespace_keeps_the_ids_on_disk() {
    in_mount_namespace(|dir| {
        tmpfs(dir);
        let pod = Pod::new(dir);
        let mut mount = overlay(dir);
        std::os::unix::fs::chown(dir.join("upper"), Some(65536), Some(65536)).unwrap();
        mount.options.extend(["uidmap=0:65536:65536".to_owned(), "gidmap=0:65536:65536".to_owned()]);
        pod.share.add_rootfs("c", &[mount], Path::new("/nonexistent")).unwrap();
        let root = pod.inside(|| std::fs::metadata("/c/rootfs").unwrap());
        assert_eq!((root.uid(), root.gid()), (0, 0));
        pod.end();
    });
}

#[test]
fn unsupported_rootfs_and_volumes_are_named() {
    in_mount_namespace(|dir| {
        let pod = Pod::new(dir);
        let share = &pod.share;
        let block = Mount { type_: "ext4".into(), source: "/dev/vda".into(), ..Mount::default() };
        assert!(matches!(share.add_rootfs("c", &[block], dir), Err(ShareError::RootfsType(t)) if t == "ext4"));
        let socket = dir.join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let refused = |source: &Path| pod.try_show("c", volume(source)).unwrap_err();
        assert!(matches!(refused(&socket), ShareError::Socket(_)));
        assert!(matches!(refused(Path::new("/dev/null")), ShareError::Device(_)));
        assert!(matches!(refused(&dir.join("none")), ShareError::Volume { .. }));
        share.remove_container("c").unwrap();
        pod.end();
    });
}

#[test]
fn hostile_11_read_only_volume_is_read_only_with_what_is_mounted_below() {
    in_mount_namespace(|dir| {
        tmpfs(&dir.join("vol/inner"));
        let pod = Pod::new(dir);
        let shown = [Access::ReadWrite, Access::ReadOnly]
            .map(|access| pod.show("c", Volume { access, ..volume(&dir.join("vol")) }));
        let write = |at: &str| shown.each_ref().map(|shown| pod.can_write(shown.join(at)));
        assert_eq!(write("file"), [true, false]);
        assert_eq!(write("inner/file"), [true, false], "what is mounted below as well");
        assert!(std::fs::write(dir.join("vol/inner/file"), "").is_ok(), "the host's own mount stays as it is");
        pod.share.remove_container("c").unwrap();
        assert_eq!(write("file"), [false, false]);
        pod.end();
    });
}

#[test]
fn volumes_are_nothing_but_data_to_the_host() {
    in_mount_namespace(|dir| {
        tmpfs(dir);
        std::fs::create_dir(dir.join("vol")).unwrap();
        let pod = Pod::new(dir);
        pod.share.add_rootfs("c", &[overlay(dir)], Path::new("/nonexistent")).unwrap();
        let shown = pod.show("c", volume(&dir.join("vol")));
        for at in [PathBuf::from("c/rootfs"), shown] {
            let flags = pod.inside(|| rustix::fs::statvfs(Path::new("/").join(&at)).unwrap().f_flag);
            let wanted = rustix::fs::StatVfsMountFlags::NOSUID
                | rustix::fs::StatVfsMountFlags::NODEV
                | rustix::fs::StatVfsMountFlags::NOEXEC;
            assert!(flags.contains(wanted), "{at:?}: {flags:?}");
        }
        pod.end();
    });
}

#[test]
fn mount_of_the_host_reaches_the_jail_only_where_a_volume_follows() {
    in_mount_namespace(|dir| {
        tmpfs(dir);
        mount_change(dir, MountPropagationFlags::SHARED).unwrap();
        std::fs::create_dir_all(dir.join("vol/late")).unwrap();
        let pod = Pod::new(dir);
        let shown =
            [false, true].map(|follows_host| pod.show("c", Volume { follows_host, ..volume(&dir.join("vol")) }));
        tmpfs(&dir.join("vol/late"));
        for (shown, file) in shown.iter().zip(["from-0", "from-1"]) {
            assert!(pod.can_write(shown.join("late").join(file)));
        }
        assert!(!dir.join("vol/late/from-0").exists(), "the volume that does not follow has what is below the mount");
        assert!(dir.join("vol/late/from-1").exists());
        pod.share.remove_container("c").unwrap();
        assert!(dir.join("vol/late/from-1").exists(), "the host's mount stays");
        pod.end();
    });
}

/// What follows the host does so soon, on a thread of its own.
fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(std::time::Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn hostile_11_mount_that_the_host_makes_later_in_a_read_only_volume_comes_read_only() {
    in_mount_namespace(|dir| {
        tmpfs(dir);
        mount_change(dir, MountPropagationFlags::SHARED).unwrap();
        tmpfs(&dir.join("vol/private"));
        mount_change(dir.join("vol/private"), MountPropagationFlags::PRIVATE).unwrap();
        let pod = Pod::new(dir);
        let follows = Volume { follows_host: true, access: Access::ReadOnly, ..volume(&dir.join("vol")) };
        let shown = pod.show("c", follows);
        for late in ["vol/private/late", "vol/late", "vol/late/deep", "vol/last"] {
            tmpfs(&dir.join(late));
            std::fs::write(dir.join(late).join("file"), "").unwrap();
        }
        until("the last one comes", || pod.read(shown.join("last/file")).is_some());
        for at in ["late", "late/deep"] {
            assert!(pod.read(shown.join(at).join("file")).is_some(), "{at}");
            assert!(!pod.can_write(shown.join(at).join("new")), "{at}");
        }
        assert_eq!(pod.mounts(), 5, "what is mounted on a private mount does not come");
        // Held open by the guest: the host does not have to care.
        let held = Path::new("/").join(&shown).join("late/deep/file");
        let open = pod.inside(|| File::open(held).unwrap());
        for late in ["vol/late/deep", "vol/late"] {
            unmount(dir.join(late), UnmountFlags::empty()).unwrap();
        }
        until("they go", || pod.mounts() == 3);
        drop(open);
        tmpfs(&dir.join("vol/end"));
        until("the next one comes", || pod.mounts() == 4);
        pod.share.remove_container("c").unwrap();
        assert_eq!(pod.mounts(), 0);
        tmpfs(&dir.join("vol/after"));
        pod.end();
    });
}

#[test]
fn volume_of_two_containers_is_one_mount_until_both_have_gone() {
    in_mount_namespace(|dir| {
        std::fs::create_dir(dir.join("vol")).unwrap();
        std::fs::create_dir(dir.join("other")).unwrap();
        let pod = Pod::new(dir);
        let one = pod.show("one", volume(&dir.join("vol")));
        // As the kubelet gives a subPath: by another mount of the same directory.
        std::fs::create_dir(dir.join("again")).unwrap();
        mount_bind(dir.join("vol"), dir.join("again")).unwrap();
        assert_eq!(pod.show("two", volume(&dir.join("again"))), one);
        assert_ne!(pod.show("three", volume(&dir.join("other"))), one);
        pod.share.remove_container("one").unwrap();
        assert!(pod.can_write(one.join("x")) && dir.join("vol/x").exists(), "the other one has it");
        pod.share.remove_container("two").unwrap();
        assert!(!pod.run.share().join(&one).exists());
        assert_ne!(pod.show("two", volume(&dir.join("vol"))), one, "the guest may still know the old number");
        pod.share.remove_container("two").unwrap();
        pod.share.remove_container("three").unwrap();
        assert_eq!(std::fs::read_dir(pod.run.share().join(SHARED_VOLUMES)).unwrap().count(), 0);
        assert_eq!(pod.mounts(), 0);
        pod.end();
    });
}

/// ConfigMaps and the like, from which the guest makes a copy for each container, are volumes like all others here.
#[test]
fn volume_that_is_copied_is_shown_once_too() {
    in_mount_namespace(|dir| {
        std::fs::create_dir(dir.join("map")).unwrap();
        std::fs::write(dir.join("map/key"), "value").unwrap();
        let pod = Pod::new(dir);
        let copied = || Volume { copied: true, access: Access::ReadOnly, ..volume(&dir.join("map")) };
        let one = pod.show("one", copied());
        assert_eq!(pod.show("two", copied()), one);
        assert!(pod.read(one.join("key")).is_some() && !pod.can_write(one.join("key")));
        for container in ["one", "two"] {
            let own = pod.run.share().join(container);
            assert!(!own.exists(), "nothing of a volume is below a container's own name: {}", own.display());
            assert_eq!(pod.mounts(), 1);
            pod.share.remove_container(container).unwrap();
        }
        assert_eq!(pod.mounts(), 0);
        pod.end();
    });
}

#[test]
fn reader_has_the_writers_mount_if_the_pod_may_write_at_all() {
    in_mount_namespace(|dir| {
        let read_only = |source: &Path| Volume { access: Access::ReadOnly, ..volume(source) };
        let pod = Pod::new(dir);
        for name in ["vol", "fixed"] {
            std::fs::create_dir(dir.join(name)).unwrap();
        }
        let early = pod.show("early", read_only(&dir.join("vol")));
        assert!(!pod.can_write(early.join("x")), "nobody may write yet");
        let writer = pod.show("writer", volume(&dir.join("vol")));
        assert_ne!(writer, early);
        assert!(pod.can_write(writer.join("x")) && !pod.can_write(early.join("x")));
        assert_eq!(pod.show("late", read_only(&dir.join("vol"))), writer);

        let scratch = dir.join("pods/u/volumes/kubernetes.io~empty-dir/v");
        std::fs::create_dir_all(&scratch).unwrap();
        let early = pod.show("scratch-early", Volume { scratch: true, ..read_only(&scratch) });
        let writer = pod.show("scratch-writer", Volume { scratch: true, ..volume(&scratch) });
        assert_eq!(writer, early, "the pod's own directory");
        let link = dir.join("pods/u/volumes/kubernetes.io~empty-dir/link");
        std::os::unix::fs::symlink(dir.join("fixed"), &link).unwrap();
        let linked = pod.show("linked", Volume { scratch: true, ..read_only(&link) });
        assert!(!pod.can_write(linked.join("x")), "a link with the name of one");

        // One container with both: whatever their order.
        let wanted = vec![read_only(&dir.join("fixed")), volume(&dir.join("fixed"))];
        let given = pod.share.add_volumes("both", wanted.clone()).unwrap();
        assert!(wanted.iter().all(|wanted| given.iter().any(|given| given.host == *wanted)));
        assert_eq!((given.len(), given[0].number), (2, given[1].number));
        pod.end();
    });
}

#[test]
fn volumes_that_may_differ_are_not_one() {
    in_mount_namespace(|dir| {
        let pod = Pod::new(dir);
        for name in ["frozen", "plain"] {
            std::fs::create_dir_all(dir.join(name)).unwrap();
        }
        tmpfs(&dir.join("vol/inner"));
        let with_mount_below = || volume(&dir.join("vol"));
        assert_ne!(pod.show("a", with_mount_below()), pod.show("b", with_mount_below()), "mounts below");
        let follows = || Volume { follows_host: true, ..volume(&dir.join("plain")) };
        assert_ne!(pod.show("c", follows()), pod.show("d", follows()));
        let plain = pod.show("e", volume(&dir.join("plain")));
        // The same directory by a mount that the host has made read-only.
        mount_bind(dir.join("plain"), dir.join("frozen")).unwrap();
        rustix::mount::mount_remount(dir.join("frozen"), MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
        let frozen = pod.show("f", volume(&dir.join("frozen")));
        assert_ne!(frozen, plain);
        assert!(!pod.can_write(frozen.join("x")));
        pod.end();
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
fn mounts_that_another_version_has_made_on_the_node_go() {
    in_mount_namespace(|dir| {
        let Pod { run, share, .. } = Pod::new(dir);
        let count = |path: &Path| mountinfo::mounts_below(path).unwrap().len();
        let at = run.share().join("c");
        // The second `a` hides what is below the first one, and has something of its own at the same place.
        ["a", "a/b", "a/b/c", "a", "a/b", "a/b", "d/e"].into_iter().for_each(|place| tmpfs(&at.join(place)));
        mount_bind(at.join("a/b"), at.join("a")).unwrap();
        assert_eq!(count(&at), 8);
        share.remove_container("c").unwrap();
        assert!(!at.exists());
        ["a", "a/b", "a", "a/b"].into_iter().for_each(|place| tmpfs(&at.join(place)));
        Share::destroy(&run).unwrap();
        assert_eq!(count(&run.share()), 0);
    });
}

#[test]
fn volume_whose_server_is_silent_is_removed_without_asking_it() {
    for whole_pod in [false, true] {
        in_mount_namespace(move |dir| {
            let pod = Pod::new(dir);
            std::fs::create_dir(dir.join("vol")).unwrap();
            let server = fuse::mount(&dir.join("vol"));
            mount("tmpfs", dir.join("vol/inner"), "tmpfs", MountFlags::empty(), None).unwrap();
            pod.show("c", volume(&dir.join("vol")));
            assert_eq!(pod.mounts(), 2);
            server.fall_silent();
            if !whole_pod {
                pod.share.remove_container("c").unwrap();
                assert_eq!(pod.mounts(), 0);
            }
            pod.end();
            assert_eq!(server.unanswered(), 0);
            assert!(std::fs::metadata(dir.join("vol/inner")).is_err() && server.unanswered() > 0, "it would be seen");
        });
    }
}

#[test]
fn silent_volume_is_not_asked_for_what_it_hides() {
    in_mount_namespace(|dir| {
        let Pod { run, share, .. } = Pod::new(dir);
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

/// As of a pod of CRI-O's that has one.
#[test]
fn owners_of_a_volume_are_mapped_by_a_user_namespace_where_its_file_system_can() {
    use std::process::{Command, Stdio};
    in_mount_namespace(|dir| {
        rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), None).unwrap();
        let mut keeper = Command::new("unshare");
        let keeper = keeper.args(["--user", "sh", "-c", "echo; exec cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut keeper = keeper.spawn().unwrap();
        std::io::Read::read_exact(keeper.stdout.as_mut().unwrap(), &mut [0]).unwrap();
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{}/{map}", keeper.id()), "0 100000 65536\n").unwrap();
        }
        let pod = Pod::new(dir);
        std::fs::create_dir(dir.join("vol")).unwrap();
        std::fs::write(dir.join("vol/data"), "v").unwrap();
        let namespace = PathBuf::from(format!("/proc/{}/ns/user", keeper.id()));
        let mapped = |source: &Path| Volume { mapped_by: Some(namespace.clone()), ..volume(source) };
        let shown = pod.show("c", mapped(&dir.join("vol")));
        let owner = |path: &Path| std::fs::metadata(path).unwrap().uid();
        assert_eq!(pod.inside(|| owner(&Path::new("/").join(&shown).join("data"))), 100_000);
        assert_eq!(owner(&dir.join("vol/data")), 0, "the volume itself is as it was");
        let refused = pod.try_show("c", mapped(Path::new("/proc/sys")));
        assert!(matches!(refused, Err(ShareError::Unmappable(_))), "{refused:?}");
        pod.share.remove_container("c").unwrap();
        pod.end();
        keeper.kill().unwrap();
        keeper.wait().unwrap();
    });
}
