//! Volumes, as the kubelet prepares them and containers see them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cli::cri::{self, v1};
use bulkhead_cli::log;
use bulkhead_e2e::log_watch::LogWatch;
use bulkhead_e2e::{PATIENCE, TestPod, WATCH, on_node, sh};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount};

/// A directory of a pod as the kubelet has it, removed at the end with what is mounted there.
pub struct KubeletDir {
    pub dir: PathBuf,
    mounts: Vec<PathBuf>,
}

impl KubeletDir {
    pub fn new(name: &str) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("bulkhead-volumes-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).context("cannot create the kubelet's directory")?;
        Ok(Self { dir, mounts: Vec::new() })
    }

    /// An empty volume of a plugin.
    pub fn volume(&self, plugin: &str, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(format!("volumes/kubernetes.io~{plugin}/{name}"));
        fs::create_dir_all(&path)?;
        Ok(path)
    }

    pub fn tmpfs(&mut self, at: &Path, options: &std::ffi::CStr) -> Result<()> {
        fs::create_dir_all(at)?;
        mount("tmpfs", at, "tmpfs", MountFlags::empty(), options).context("cannot mount a tmpfs")?;
        self.mounts.push(at.to_path_buf());
        Ok(())
    }
}

impl Drop for KubeletDir {
    fn drop(&mut self) {
        for path in self.mounts.iter().rev() {
            let _ = unmount(path, UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Makes `files` the volume's content, by the steps of the kubelet's atomic writer.
fn write_version(volume: &Path, version: &str, files: &[(&str, &str)]) -> Result<()> {
    let dir = volume.join(version);
    fs::create_dir(&dir)?;
    for (name, content) in files {
        fs::write(dir.join(name), content)?;
    }
    let old = fs::read_link(volume.join("..data")).ok();
    symlink(version, volume.join("..data_tmp"))?;
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    for (name, _) in files.iter().filter(|(name, _)| !volume.join(name).is_symlink()) {
        symlink(Path::new("..data").join(name), volume.join(name))?;
    }
    old.map_or(Ok(()), |old| Ok(fs::remove_dir_all(volume.join(old))?))
}

pub fn mounted(mut config: v1::ContainerConfig, host: &Path, container: &str, readonly: bool) -> v1::ContainerConfig {
    config.mounts.push(v1::Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Default::default()
    });
    config
}

pub const SLEEP: &str = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done";

#[test]
fn update_of_a_config_map_appears_and_raises_inotify_events() {
    on_node(async |node| {
        let kubelet = KubeletDir::new("configmap")?;
        let volume = kubelet.volume("configmap", "config")?;
        write_version(&volume, "..2026_01", &[("key", "old"), ("gone", "x")])?;
        let pod = node.pod("configmap").await?;
        let reader = mounted(sh("reader", SLEEP), &volume, "/config", true);
        let reader = pod.run(reader).await?;
        ensure!(pod.sh(&reader, "cat /config/key").await? == "old");
        node.cri.pull(WATCH).await?;
        let config = cri::container_config("watcher", WATCH, &["/bin/watch", "/config"]);
        let watcher = pod.run(mounted(config, &volume, "/config", true)).await?;
        says(&pod, &watcher, "watching\n").await?;
        write_version(&volume, "..2026_02", &[("key", "new"), ("more", "m")])?;
        // In the kubelet's order, so that whoever waits for the rename finds the new files.
        says(&pod, &watcher, "moved-to ..data\n").await?;
        let events = log::text_of(&pod.log(&watcher).await?, "stdout");
        ensure!(events.starts_with("watching\ncreate ..2026_02\n"), "{events}");
        says(&pod, &watcher, "delete ..2026_01\n").await?;
        let seen = pod.sh(&reader, "cat /config/key /config/more; ls -A /config | sort | tr '\\n' ' '").await?;
        ensure!(seen == "newm..2026_02 ..data key more", "{seen:?}");
        ensure!(pod.sh(&reader, "echo x > /config/key").await.is_err(), "the volume is read-only");
        Ok(())
    });
}

/// Waits until a container's log has a line.
async fn says(pod: &TestPod, container: &str, line: &str) -> Result<()> {
    let path = pod.log_path(container).await?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        bail!("{} is no path of a log", path.display());
    };
    LogWatch::new(directory, name)?.contains(line.to_owned(), PATIENCE).await
}

#[test]
fn secret_keeps_mode_and_owner_and_is_no_ones_to_write() {
    on_node(async |node| {
        let kubelet = KubeletDir::new("secret")?;
        let volume = kubelet.volume("secret", "token")?;
        write_version(&volume, "..1", &[("token", "secret")])?;
        let file = volume.join("token");
        chown(&file, Some(1000), Some(2000))?;
        fs::set_permissions(fs::canonicalize(&file)?, fs::Permissions::from_mode(0o440))?;
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o2750))?;
        let pod = node.pod("secret").await?;
        let container = pod.run(mounted(sh("main", SLEEP), &volume, "/token", true)).await?;
        let seen = pod.sh(&container, "stat -Lc '%a %u:%g' /token /token/token; cat /token/token").await?;
        ensure!(seen == "2750 0:0\n440 1000:2000\nsecret", "{seen}");
        let refused = pod.exec(&container, &["touch", "/token/new"]).await?;
        ensure!(refused.stderr.contains("Read-only file system"), "{refused:?}");
        Ok(())
    });
}

#[test]
fn subpath_shows_one_directory_and_one_file() {
    on_node(async |node| {
        let kubelet = KubeletDir::new("subpath")?;
        let volume = kubelet.volume("empty-dir", "data")?;
        fs::create_dir(volume.join("inner"))?;
        fs::write(volume.join("inner/file"), "inner")?;
        fs::write(volume.join("secret"), "outer")?;
        // The kubelet binds what a subPath names to a place of its own, and hands that on.
        let place = kubelet.dir.join("volume-subpaths/data/main/0");
        let mut kubelet = kubelet;
        fs::create_dir_all(&place)?;
        mount_bind(volume.join("inner"), &place)?;
        kubelet.mounts.push(place.clone());
        let pod = node.pod("subpath").await?;
        let config = mounted(sh("main", SLEEP), &place, "/data", false);
        let container = pod.run(mounted(config, &volume.join("secret"), "/etc/one", true)).await?;
        let seen = pod.sh(&container, "ls -A /data /data/..; cat /data/file /etc/one; echo new > /data/made").await?;
        ensure!(seen.starts_with("/data:\nfile\n") && seen.ends_with("innerouter"), "{seen}");
        ensure!(fs::read_to_string(volume.join("inner/made"))? == "new\n");
        Ok(())
    });
}

/// Has the last mount follow the host.
pub fn following(mut config: v1::ContainerConfig) -> v1::ContainerConfig {
    if let Some(last) = config.mounts.last_mut() {
        last.propagation = v1::MountPropagation::PropagationHostToContainer.into();
    }
    config
}

#[test]
fn mounts_of_the_host_propagate_only_if_asked_for() {
    on_node(async |node| {
        let mut kubelet = KubeletDir::new("propagation")?;
        let volume = kubelet.dir.join("shared");
        kubelet.tmpfs(&volume, c"")?;
        mount_change(&volume, MountPropagationFlags::SHARED)?;
        let pod = node.pod("propagation").await?;
        let mut config = mounted(sh("main", SLEEP), &volume, "/private", false);
        for (at, readonly) in [("/slave", false), ("/fixed", true)] {
            config = following(mounted(config, &volume, at, readonly));
        }
        let container = pod.run(config).await?;
        let late = volume.join("late");
        kubelet.tmpfs(&late, c"")?;
        fs::write(late.join("file"), "late")?;
        let seen = pod.sh(&container, "cat /slave/late/file; ls /private/late").await?;
        ensure!(seen == "late", "{seen}");
        // This one is made read-only first, so it comes a moment later.
        let script = "while ! cat /fixed/late/file 2>/dev/null; do sleep 0.1; done; touch /fixed/late/new 2>&1; true";
        let seen = pod.sh(&container, script).await?;
        ensure!(seen.starts_with("late") && seen.contains("Read-only file system"), "{seen}");
        // Lazily: what the guest has looked at stays open in the VMM (docs/compatibility.md).
        unmount(&late, UnmountFlags::DETACH)?;
        // The guest trusts a name for a second before it asks again.
        let seen =
            pod.sh(&container, "sleep 1; ls /slave/late; while [ -e /fixed/late/file ]; do sleep 0.1; done").await?;
        ensure!(seen.is_empty(), "{seen}");
        Ok(())
    });
}

#[test]
fn empty_dir_is_accounted_on_the_host_and_bounded_by_it() {
    on_node(async |node| {
        let mut kubelet = KubeletDir::new("emptydir")?;
        let disk = kubelet.volume("empty-dir", "disk")?;
        let memory = kubelet.dir.join("volumes/kubernetes.io~empty-dir/memory");
        kubelet.tmpfs(&memory, c"size=1m")?;
        let pod = node.pod("emptydir").await?;
        let config = mounted(sh("main", SLEEP), &disk, "/disk", false);
        let container = pod.run(mounted(config, &memory, "/memory", false)).await?;
        pod.sh(&container, "dd if=/dev/zero of=/disk/file bs=1M count=4 2> /dev/null").await?;
        let blocks = fs::metadata(disk.join("file"))?.blocks();
        ensure!(blocks * 512 >= 4 << 20, "{blocks} blocks on the host");
        let full = pod.exec(&container, &["dd", "if=/dev/zero", "of=/memory/file", "bs=64k", "count=32"]).await?;
        ensure!(full.code != 0 && full.stderr.contains("No space left"), "{full:?}");
        let free = pod.sh(&container, "df -k /memory | tail -n 1 | awk '{ print $2 }'").await?;
        ensure!(free == "1024", "df says {free} KiB");
        Ok(())
    });
}

#[test]
fn termination_message_reaches_the_kubelets_file() {
    on_node(async |node| {
        let kubelet = KubeletDir::new("termination")?;
        let file = kubelet.dir.join("termination-log");
        fs::write(&file, "")?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666))?;
        let pod = node.pod("termination").await?;
        let config =
            mounted(sh("main", "echo why > /dev/termination-log; exit 3"), &file, "/dev/termination-log", false);
        let (status, _) = pod.run_to_end(config).await?;
        ensure!(status.exit_code == 3 && fs::read_to_string(&file)? == "why\n", "{status:?}");
        Ok(())
    });
}
