//! What takes more than reading and writing: volumes within volumes, locks, overlays, loop devices.

use std::fmt::Write;
use std::fs::{File, create_dir_all};
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::Result;
use bulkhead_cli::cri::v1;
use rustix::fs::{FlockOperation, fcntl_lock, flock};

use crate::compat::Area::{Security, Volumes};
use crate::compat::stage::Place;
use crate::compat::{Act, Stage, act, security, shell};

/// In an ordinary container.
pub fn acts() -> Vec<Act> {
    vec![
        act!(Volumes, "volumes nested in a ConfigMap", |stage| {
            let mut config = shell("nested", "exec sleep 1000");
            config.mounts = nested(&stage.place)?;
            let id = stage.run(config).await?;
            let script = "cat /config/a; ls /config /config/more; cat /config/more/key; echo x > /config/data/x && echo written; touch /config/b; touch /config/more/x";
            Ok(format!("{:?}", stage.shell(&id, script).await?))
        }),
        act!(Volumes, "locks that a process of the node has", |stage| {
            let id = sharer(stage, "locked-out", "locks", "exec sleep 1000").await?.1;
            let node = Locks::take(&stage.place, "locks")?;
            let refused = stage.shell(&id, "probe try /locks").await?;
            drop(node);
            let granted = stage.shell(&id, "probe try /locks").await?;
            Ok(format!("{refused:?}\n{granted:?}"))
        }),
        act!(Volumes, "locks that a container has, and waits for", |stage| {
            let node = Locks::take(&stage.place, "waited")?;
            let (config, id) = sharer(stage, "waits", "waited", "exec probe lock /locks").await?;
            let said = stage.text(&id, "stdout").await?;
            drop(node);
            stage.wait_log(&config, "locked").await?;
            let refused = Locks::take(&stage.place, "waited").err().map(|error| error.to_string());
            // The end of a process lets go of all.
            stage.remove_container(&id).await?;
            Locks::take(&stage.place, "waited")?;
            Ok(format!("{said:?} {refused:?}"))
        }),
    ]
}

/// In a privileged container.
pub fn privileged_acts() -> Vec<Act> {
    vec![
        act!(Volumes, "overlay on a volume", |stage| {
            let mut said = String::new();
            let id = privileged(stage, "overlay").await?;
            for script in [OVERLAY, OVERLAY_OPTIONS] {
                writeln!(said, "{:?}", stage.shell(&id, script).await?)?;
            }
            Ok(said)
        }),
        act!(Volumes, "image file mounted by a loop device", |stage| {
            let image = stage.place.path("image").to_string_lossy().into_owned();
            crate::node_command("mkfs.ext4", &["-q", "-F", &image, "16M"])?;
            let id = privileged(stage, "loop").await?;
            let script = "ls -l /dev/loop-control /dev/loop[0-7] | awk '{ print $1, $5, $6, $NF }'; mkdir -p /mnt; mount -o loop /data/image /mnt && cp -r /etc /mnt/etc && ls /mnt; umount /mnt && echo unmounted; mount -o loop,ro /data/image /mnt && cat /mnt/etc/hostname; touch /mnt/x; umount /mnt && echo unmounted";
            Ok(format!("{:?}", stage.shell(&id, script).await?))
        }),
        act!(Security, "devices that everyone may open", |stage| {
            let id = privileged(stage, "everyone").await?;
            Ok(format!("{:?}", stage.shell(&id, "stat -c '%a %u %g %t:%T %n' /dev/fuse /dev/net/tun").await?))
        }),
    ]
}

/// What docker, podman and k3s do in a pod.
const OVERLAY: &str = "mkdir -p /data/o && cd /data/o && mkdir -p l1/sub l2 u w m
    echo 1 > l1/f; echo 1 > l1/gone; echo x > l1/sub/deep; ln l1/f l1/hard; ln -s f l1/link
    mount -t overlay o -o lowerdir=l2:l1,upperdir=u,workdir=w m || exit 1
    rm m/gone; rm -r m/sub; mkdir m/sub; echo 2 >> m/f; cat m/f m/hard; mv m/hard m/hard2; chown 1000:2000 m/f; chmod 4755 m/f
    mkfifo m/fifo; mkdir m/dir; mv m/dir m/dir2; chown -h 7 m/link; touch -d '2001-02-03 04:05:06' m/f
    ls -ln u | awk 'NR > 1 { print $1, $3, $4, $NF }'
    umount m; mount -t overlay o -o lowerdir=l2:l1,upperdir=u,workdir=w m && ls m m/sub; cat m/f; stat -c '%a %u %g %s %y' m/f; umount m && echo end";

const OVERLAY_OPTIONS: &str =
    "cd /data/o; for options in metacopy=on,redirect_dir=on index=on userxattr volatile xino=on; do
    rm -rf v x; mkdir v x; mount -t overlay o -o lowerdir=l1,upperdir=v,workdir=x,$options m || continue
    echo $options; mv m/sub m/moved && cat m/moved/deep; chmod 600 m/f && cat m/f; rm m/gone; ls m; umount m; done";

async fn privileged(stage: &Stage, name: &str) -> Result<String> {
    let mut config = shell(name, "exec sleep 1000");
    config.mounts = vec![stage.place.mount("", "/data")];
    security(&mut config).privileged = true;
    stage.run(config).await
}

async fn sharer(stage: &Stage, name: &str, directory: &str, script: &str) -> Result<(v1::ContainerConfig, String)> {
    let mut config = shell(name, script);
    config.mounts = vec![stage.place.mount(directory, "/locks")];
    let id = stage.run(config.clone()).await?;
    Ok((config, id))
}

/// A ConfigMap with places for a Secret and an emptyDir in it, as the kubelet makes them.
fn nested(place: &Place) -> Result<Vec<v1::Mount>> {
    let volumes = "nested/volumes";
    let atomic = |kind: &str, name: &str, keys: &[&str]| {
        let at = format!("{volumes}/kubernetes.io~{kind}/{name}");
        let directory = place.directory(&at);
        create_dir_all(directory.join("..v1"))?;
        symlink("..v1", directory.join("..data"))?;
        for key in keys {
            std::fs::write(directory.join("..v1").join(key), format!("{key} of {name}\n"))?;
            symlink(Path::new("..data").join(key), directory.join(key))?;
        }
        anyhow::Ok(at)
    };
    let (outer, inner) = (atomic("configmap", "outer", &["a", "b"])?, atomic("secret", "inner", &["key"])?);
    place.directory(&format!("{outer}/more"));
    place.directory(&format!("{outer}/data"));
    let read_only = |name: &str, at: &str| v1::Mount { readonly: true, ..place.mount(name, at) };
    let scratch = place.mount(&format!("{volumes}/kubernetes.io~empty-dir/scratch"), "/config/data");
    Ok(vec![read_only(&outer, "/config"), read_only(&inner, "/config/more"), scratch])
}

/// Locks of this process on the files that `probe lock` and `probe try` are about.
struct Locks {
    _files: Vec<File>,
}

impl Locks {
    fn take(place: &Place, directory: &str) -> Result<Self> {
        let directory = place.directory(directory);
        let open = |name: &str| {
            let path = directory.join(name);
            File::options().read(true).write(true).create(true).truncate(false).open(path)
        };
        let files = vec![open("flock")?, File::open(&directory)?, open("posix")?, open("ofd")?];
        for file in &files[..2] {
            flock(file, FlockOperation::NonBlockingLockExclusive)?;
        }
        for file in &files[2..] {
            fcntl_lock(file, FlockOperation::NonBlockingLockExclusive)?;
        }
        Ok(Self { _files: files })
    }
}
