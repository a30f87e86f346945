//! Volumes: what a container can do to files of the node, and what the node has of it afterwards.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Result, ensure};
use bulkhead_cli::cri::v1;

use crate::compat::Area::Volumes;
use crate::compat::stage::{Place, ending};
use crate::compat::{Act, Group, Probe, act, shell};

/// A pod with volumes on a disk.
pub fn group() -> Group {
    Group::new("volumes").on_disk().probes([root(), bind(), memory(), read_only(), device()]).acts(acts())
}

fn root() -> Probe {
    Probe::new("root-files")
        .case(Volumes, "root file system", "mkdir /work; probe files /work | grep -vE '^(mknod|open of the device|user xattr|large user|trusted|O_TMPFILE|rename with whiteout|lease|immutable|security.cap|ACL|mode with)'")
        .case(Volumes, "root file system's extended attributes and ACLs", "probe files /work | grep -E '^(user xattr|large user|ACL|mode with)'")
        .case(Volumes, "names of the image that nobody has looked at", "probe unseen /unseen; ls -l /unseen /unseen/sticky | awk '!/^total/ { print $1, $3, $5, $NF }'")
        .case(Volumes, "root file system's less common features", "probe files /work | grep -E '^(O_TMPFILE|rename with whiteout|lease|immutable)'")
        .differs("virtio-fs has no files without a name (O_TMPFILE) and no file flags")
        .case(Volumes, "files of the image", "ls -ln /etc /bin | awk '{ print $1, $2, $3, $4, $5, $NF }' | head -100; find / -xdev 2>/dev/null | grep -v '^/work' | sort | head -500 | md5sum")
        .case(Volumes, "change of the image's files", "echo more >> /etc/passwd && tail -1 /etc/passwd; rm /etc/group && ls /etc; mv /home /home2 && ls -d /home2/app; chmod 700 /root && stat -c %a /root; rm -r /var && ls -d /var; mkdir /var && ls /var; ln /etc/passwd /etc/passwd2 && stat -c %h /etc/passwd")
}

fn bind() -> Probe {
    Probe::new("bind")
        .config(|config, place| config.mounts = vec![place.mount("bind", "/data"), place.mount("bind/below", "/below")])
        .case(Volumes, "volume on the node's disk", "probe files /data | grep -vE '^(mknod|open of the device|user xattr|large user|trusted|O_TMPFILE|rename with whiteout|lease|immutable|security.cap|ACL|mode with)'")
        .case(Volumes, "volume's extended attributes and ACLs", "probe files /data | grep -E '^(user xattr|large user|ACL|mode with)'")
        .case(Volumes, "volume's security.capability", "probe files /data | grep -E '^(security.cap)'")
        .case(Volumes, "volume's less common features", "probe files /data | grep -E '^(O_TMPFILE|rename with whiteout|lease|immutable|trusted)'")
        .differs("virtio-fs has no files without a name (O_TMPFILE), no file flags, and no leases: the guest would not learn that a file is opened elsewhere")
        .case(Volumes, "device nodes on a volume", "probe files /data | grep -E '^(mknod|open of the device)'")
        .differs("a volume is a share of the host, on which a guest may not make device nodes; in a tmpfs it may")
        .case(Volumes, "mount of a volume", "awk '$5 == \"/data\" { print $5, $6 }' /proc/self/mountinfo | sed 's/nodev,//'; df /data | tail -1 | awk '{ print NF, $NF }'; stat -c '%a %u %g %F' /data")
        .case(Volumes, "sub-directory as a volume of its own", "echo x > /data/below/file; cat /below/file; mv /data/below/file /data/file && ls /below; stat -c '%h %s' /data/file")
        .case(Volumes, "names", "cd /data; touch 'sp ace' 'new\nline' gr\u{fc}n '-dash' '*' $(printf '\\377bytes'); ls | grep -vE '^[a-z0-9]+$' | od -c | head -20")
        .case(Volumes, "owners and modes", "cd /data; touch o; chown 1000:2000 o; chmod 4751 o; stat -c '%a %u %g' o; chown 0 o; stat -c '%a %u' o; mkdir s; chmod 1777 s; mkdir g; chgrp 2000 g; chmod 2775 g; touch g/f; mkdir g/d; stat -c '%a %u %g %n' s g g/f g/d")
        .case(Volumes, "times of reads", "cd /data; echo read > t; touch -d '2020-01-01 00:00:00' t; cat t; stat -c '%x' t | cut -c1-4; echo x > t; stat -c '%y' t | cut -c1-4 | grep -c 2020")
        .case(Volumes, "time of a read of nothing", "cd /data; touch -d '2020-01-01 00:00:00' empty; cat empty; stat -c '%x' empty | cut -c1-4")
        .differs("the guest knows that an empty file is empty and does not read it from the host, so the time of access does not change")
}

fn memory() -> Probe {
    Probe::new("memory-volume")
        .config(|config, place| {
            let directory = place.directory("memory");
            let at = directory.to_string_lossy().into_owned();
            // Unmounted at the group's end; a failure shows in the case.
            let _ = crate::node_command("mount", &["-t", "tmpfs", "-o", "size=8m", "compat", &at]);
            config.mounts = vec![place.mount("memory", "/memory")];
        })
        .case(Volumes, "memory volume", "df -k /memory | tail -1 | awk '{ print $2 }'; head -c 9000000 /dev/zero > /memory/f; stat -c %s /memory/f; rm /memory/f; probe files /memory | grep -vE '^(mknod|open of the device|user xattr|large user|trusted|O_TMPFILE|rename with whiteout|lease|immutable|security.cap|ACL|mode with|statfs|file beyond)'")
}

fn read_only() -> Probe {
    Probe::new("read-only")
        .config(|config, place| {
            let file = place.path("single");
            let _ = std::fs::write(&file, "single\n");
            let mut directory = place.mount("read-only", "/ro");
            directory.readonly = true;
            let mut single = place.mount("single", "/etc/single");
            single.readonly = true;
            config.mounts = vec![directory, single, place.mount("single", "/etc/written")];
        })
        .case(Volumes, "read-only volume", "touch /ro/x; mkdir /ro/y; chmod 700 /ro; echo x > /etc/single; cat /etc/single; mount -o remount,rw /ro; rm /etc/single")
        .case(Volumes, "file as a volume", "echo more >> /etc/written; cat /etc/single; rm /etc/written; mv /etc/single /tmp/; stat -c '%F %s' /etc/written")
}

/// The usual way around a random that blocks.
fn device() -> Probe {
    Probe::new("device-on-device")
        .config(|config, place| {
            config.mounts = vec![v1::Mount { host_path: "/dev/urandom".into(), ..place.mount("", "/dev/random") }];
        })
        .case(Volumes, "urandom in the place of random", "stat -c '%F %t:%T %a %u:%g' /dev/random; head -c 4 /dev/random | wc -c; echo x > /dev/random && echo written")
}

/// What a copy keeps.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kept {
    /// busybox's tools: times of files only, in whole seconds, and no extended attributes.
    Coarse,
    /// All that there is.
    All,
}

/// Every entry below a directory in one line each, sorted.
fn listing(root: &Path, kept: Kept) -> Result<String> {
    let mut paths = Vec::new();
    collect(root, &mut paths)?;
    paths.sort();
    let mut text = String::new();
    for path in paths {
        let data = path.symlink_metadata()?;
        let content = if data.is_file() {
            std::fs::read(&path)?
        } else if data.is_symlink() {
            std::fs::read_link(&path)?.into_os_string().into_encoded_bytes()
        } else {
            Vec::new()
        };
        let size = if data.is_dir() { 0 } else { data.size() };
        let (time, attributes) = match kept {
            Kept::Coarse => ((if data.is_file() { data.mtime() } else { 0 }, 0), Vec::new()),
            Kept::All => ((data.mtime(), data.mtime_nsec()), attributes(&path)),
        };
        let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
        writeln!(
            text,
            "{name} {:o} {}:{} size {size} links {} time {}.{:09} content {:x} {attributes:?}",
            data.mode(),
            data.uid(),
            data.gid(),
            if data.is_dir() { 0 } else { data.nlink() },
            time.0,
            time.1,
            hash(&content),
        )?;
    }
    Ok(text)
}

fn attributes(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0; 4096];
    let length = rustix::fs::llistxattr(path, names.as_mut_slice()).unwrap_or(0);
    names.truncate(length);
    let value = |name: &str| {
        let mut value = vec![0; 4096];
        let length = rustix::fs::lgetxattr(path, name, value.as_mut_slice()).unwrap_or(0);
        value.truncate(length);
        value
    };
    let names = String::from_utf8_lossy(&names).into_owned();
    let mut all: Vec<_> = names.split_terminator('\0').map(|name| (name.to_owned(), value(name))).collect();
    all.sort();
    all
}

fn hash(content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

fn collect(directory: &Path, paths: &mut Vec<std::path::PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.symlink_metadata()?.is_dir() {
            collect(&path, paths)?;
        }
        paths.push(path);
    }
    Ok(())
}

/// A tree with one of everything, and many small files.
const TREE: &str = "mkdir -p tree/deep/er tree/many; cd tree
    i=0; while [ $i -lt 1300 ]; do echo $i > many/$i; i=$((i+1)); done
    head -c 33554432 /dev/urandom > large
    echo target > file; ln -s file link; ln -s /nowhere/at/all dangling; ln file hard; mkfifo fifo
    truncate -s 10000000 sparse; echo end >> sparse
    chmod 4755 file; chmod 1777 deep; chmod 000 deep/er; chown 1000:2000 link many/7 many; touch 'sp ace'
    touch -h -d '2001-02-03 04:05:06.123456789' link file many/7; touch -d '1999-01-01 00:00:00' deep many";

/// Both ends of the copies.
fn tree(place: &Place) -> Result<()> {
    let at = place.root().to_string_lossy().into_owned();
    crate::node_command("/bin/sh", &["-ec", &format!("cd {at}; {TREE}")])?;
    for (name, value) in [("file", "of a file"), ("many/7", "of one of many"), ("deep", "of a directory")] {
        let path = place.path("tree").join(name);
        rustix::fs::setxattr(path, "user.origin", value.as_bytes(), rustix::fs::XattrFlags::CREATE)?;
    }
    Ok(())
}

fn acts() -> Vec<Act> {
    let mut acts = copies();
    acts.extend(shared());
    acts.extend(super::files::acts());
    acts.extend(super::posix::acts());
    acts
}

fn copies() -> Vec<Act> {
    vec![
        act!(Volumes, "file tree copied by a container", |stage| {
            tree(&stage.place)?;
            let mut config = shell(
                "copy",
                "cp -a /volume/tree /volume/copy && gnu-cp -a /volume/tree /volume/exact && cd /volume/tree && tar c . | (mkdir /volume/unpacked; cd /volume/unpacked; tar x) && cmp /volume/tree/large /volume/copy/large && echo same",
            );
            config.mounts = vec![stage.place.mount("", "/volume")];
            let id = stage.run(config).await?;
            let status = stage.wait_exit(&id, 5 * crate::PATIENCE).await?;
            let mut said = ending(&status) + &stage.tagged_log(&id).await?;
            let listed = |kept| listing(&stage.place.path("tree"), kept);
            let (coarse, all) = (listed(Kept::Coarse)?, listed(Kept::All)?);
            ensure!(all.contains("user.origin"), "the original has no attributes");
            for (copy, kept) in [("copy", Kept::Coarse), ("unpacked", Kept::Coarse), ("exact", Kept::All)] {
                let original = if kept == Kept::All { &all } else { &coarse };
                let copied = listing(&stage.place.path(copy), kept)?;
                let other: Vec<_> =
                    copied.lines().filter(|line| !original.lines().any(|known| known == *line)).collect();
                writeln!(
                    said,
                    "{copy}: {} entries, {} differ from the original: {other:#?}",
                    copied.lines().count(),
                    other.len()
                )?;
            }
            // Both handlers could lose the same.
            ensure!(said.lines().filter(|line| line.contains(", 0 differ")).count() == 3, "{said}");
            Ok(said)
        }),
        act!(Volumes, "file tree made by a container", |stage| {
            let mut config = shell(
                "make",
                "cd /volume; mkdir -p a/b; echo x > a/f; ln -s f a/l; ln a/f a/h; mkfifo a/p; chmod 6711 a/f; chown 7:8 a/p; chmod 700 a/b; chmod 1777 a; touch -d '2001-02-03 04:05:06' a/f a/b a; probe files /volume/a >/dev/null; rm -rf a/many a/times a/device a/linked; touch -h -d '2001-02-03 04:05:06' $(find .); stat -c '%n %h' a/*| sort",
            );
            config.mounts = vec![stage.place.mount("made", "/volume")];
            let (id, status) = stage.run_to_end(config).await?;
            Ok(ending(&status) + &stage.tagged_log(&id).await? + &listing(&stage.place.path("made"), Kept::All)?)
        }),
    ]
}

fn shared() -> Vec<Act> {
    vec![
        act!(Volumes, "mount on the node appears with HostToContainer", |stage| {
            let propagation = v1::MountPropagation::PropagationHostToContainer;
            let at = stage.place.directory("slave").to_string_lossy().into_owned();
            let mounted = stage
                .on_node(format!("mount --bind {at} {at} && mount --make-rshared {at} && mkdir -p {at}/sub"))
                .await?;
            let mut config = shell("slave", "exec sleep 1000");
            config.mounts = vec![v1::Mount { propagation: propagation.into(), ..stage.place.mount("slave", "/slave") }];
            let id = stage.run(config).await?;
            let before = stage.shell(&id, "ls /slave/sub").await?;
            let come = stage.on_node(format!("mount -t tmpfs compat {at}/sub && echo x > {at}/sub/there")).await?;
            let after = stage.shell(&id, "ls /slave/sub; cat /slave/sub/there").await?;
            let gone = stage.on_node(format!("umount {at}/sub")).await?;
            let last = stage.shell(&id, "ls /slave/sub").await?;
            stage.remove_container(&id).await?;
            let end = stage.on_node(format!("umount {at}")).await?;
            Ok(format!("{mounted}{before:?}{come}{after:?}{gone}{last:?}{end}"))
        })
        .differs(
            "the guest's kernel keeps files of the mount open until it forgets them, so a plain umount on the node fails with EBUSY; umount -l works",
        ),
        act!(Volumes, "mount below a read-only volume", |stage| {
            let below = stage.place.directory("fixed/below").to_string_lossy().into_owned();
            let mounted = stage.on_node(format!("mount -t tmpfs compat {below} && echo x > {below}/there")).await?;
            let mut config = shell("fixed", "exec sleep 1000");
            config.mounts = vec![v1::Mount { readonly: true, ..stage.place.mount("fixed", "/fixed") }];
            let id = stage.run(config).await?;
            let seen = stage.shell(&id, "cat /fixed/below/there; touch /fixed/new; touch /fixed/below/new").await?;
            stage.remove_container(&id).await?;
            let end = stage.on_node(format!("umount {below}")).await?;
            Ok(format!("{mounted}{seen:?}{end}"))
        })
        .differs(
            "a read-only volume is read-only with all that is mounted below it, whether recursiveReadOnly is asked for or not: the guest's kernel is the pod's, and no mode of a file on the host would stop it",
        ),
        act!(Volumes, "mount on the node below a read-only volume with HostToContainer", |stage| {
            let propagation = v1::MountPropagation::PropagationHostToContainer.into();
            let at = stage.place.directory("fixed-slave").to_string_lossy().into_owned();
            let mounted = stage
                .on_node(format!("mount --bind {at} {at} && mount --make-rshared {at} && mkdir -p {at}/sub"))
                .await?;
            let mut config = shell("fixed-slave", "exec sleep 1000");
            let mount = stage.place.mount("fixed-slave", "/slave");
            config.mounts = vec![v1::Mount { readonly: true, propagation, ..mount }];
            let id = stage.run(config).await?;
            let come = stage.on_node(format!("mount -t tmpfs compat {at}/sub && echo x > {at}/sub/there")).await?;
            // It is made read-only before it comes, which takes a moment.
            let until = |what: &str| format!("n=0; while {what} && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done; ls /slave/sub");
            let after = stage.shell(&id, &until("[ ! -e /slave/sub/there ]")).await?;
            let gone = stage.on_node(format!("umount {at}/sub")).await?;
            let last = stage.shell(&id, &until("[ -e /slave/sub/there ]")).await?;
            stage.remove_container(&id).await?;
            let end = stage.on_node(format!("umount {at}")).await?;
            Ok(format!("{mounted}{come}{after:?}{gone}{last:?}{end}"))
        }),
        act!(Volumes, "change on the node is seen in the container and the other way round", |stage| {
            let mut config = shell("both-ways", "exec sleep 1000");
            config.mounts = vec![stage.place.mount("both", "/both")];
            let id = stage.run(config).await?;
            let file = stage.place.path("both/file");
            let mut said = String::new();
            for number in 0..3 {
                std::fs::write(&file, format!("node {number}\n"))?;
                writeln!(
                    said,
                    "{:?}",
                    stage.shell(&id, &format!("cat /both/file; echo container {number} > /both/file")).await?
                )?;
                said += &std::fs::read_to_string(&file)?;
            }
            std::fs::rename(&file, stage.place.path("both/renamed"))?;
            writeln!(said, "{:?}", stage.shell(&id, "ls /both; cat /both/renamed; rm /both/renamed; ls /both").await?)?;
            Ok(said)
        }),
        act!(Volumes, "volume shared by two containers", |stage| {
            let mut config =
                shell("sharer-one", "exec 9> /shared/lock; flock 9; echo held > /shared/state; exec sleep 1000");
            config.mounts = vec![stage.place.mount("shared", "/shared")];
            let one = stage.run(config).await?;
            let mut config = shell("sharer-two", "exec sleep 1000");
            config.mounts = vec![stage.place.mount("shared", "/shared")];
            let two = stage.run(config).await?;
            let script = "until [ -s /shared/state ]; do sleep 0.1; done; cat /shared/state; flock -n /shared/lock true; echo $?; echo back > /shared/answer";
            let seen = stage.shell(&two, script).await?;
            Ok(format!("{seen:?} {:?}", stage.shell(&one, "cat /shared/answer").await?))
        }),
        act!(Volumes, "sockets, fifos, mappings, locks and events by way of a shared volume", |stage| {
            stage.place.directory("meet");
            let container = |name: &str, script: &str, readonly: bool| {
                let mut config = shell(name, script);
                config.mounts = vec![v1::Mount { readonly, ..stage.place.mount("meet", "/meet") }];
                config
            };
            let holder = container("holder", "exec probe hold /meet", false);
            stage.run(holder.clone()).await?;
            stage.wait_log(&holder, "holding").await?;
            let mut said = String::new();
            for (name, readonly) in [("writer", false), ("reader", true)] {
                let id = stage.run(container(name, "exec sleep 1000", readonly)).await?;
                let met =
                    stage.shell(&id, "probe meet /meet; echo x > /meet/written; mount -o remount,rw /meet").await?;
                writeln!(said, "{name}\n{}{}", met.stdout, met.stderr)?;
            }
            Ok(said)
        }),
        act!(Volumes, "user of the container on a volume with fsGroup", |stage| {
            let at = stage.place.directory("group");
            stage.on_node(format!("chgrp 4242 {0} && chmod 2775 {0}", at.to_string_lossy())).await?;
            let mut config = shell(
                "fs-group",
                "exec 2>&1; id -G; echo x > /group/f && stat -c '%a %u %g' /group/f; mkdir /group/d && stat -c '%a %g' /group/d; chown 0 /group/f; chmod 600 /group/f && cat /group/f; sleep 1",
            );
            config.mounts = vec![stage.place.mount("group", "/group")];
            let security = crate::compat::security(&mut config);
            security.run_as_user = Some(v1::Int64Value { value: 1000 });
            security.run_as_group = Some(v1::Int64Value { value: 3000 });
            security.supplemental_groups = vec![4242];
            let (id, status) = stage.run_to_end(config).await?;
            Ok(ending(&status) + &stage.tagged_log(&id).await?)
        }),
        act!(Volumes, "bind that does not exist on the node", |stage| {
            let mut config = shell("missing-bind", "ls -la /missing | wc -l");
            let host_path = stage.place.path("not-there").to_string_lossy().into_owned();
            config.mounts = vec![v1::Mount { container_path: "/missing".into(), host_path, ..Default::default() }];
            let (id, status) = stage.run_to_end(config).await?;
            Ok(ending(&status) + &stage.tagged_log(&id).await? + &format!("{}", stage.place.path("not-there").is_dir()))
        }),
    ]
}
