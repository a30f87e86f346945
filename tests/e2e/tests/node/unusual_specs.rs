//! Who may speak to a shim, what a pod may ask for, and root file systems that are none (docs/negative-tests.md, 23 and
//! 24). The guest is [`bulkhead_e2e::liar`]'s, which tells what it was asked to boot: no VM is needed for a refusal.

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::on_shims;
use bulkhead_e2e::processes::Processes;
use bulkhead_e2e::shim::{Code, code};
use containerd_shim_protos::api;
use containerd_shim_protos::types::mount::Mount;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::contract::{delete, kill, start, wait};
use crate::liar::{Pod, Stage};

fn mode(path: impl AsRef<Path>) -> Result<u32> {
    let path = path.as_ref();
    Ok(std::fs::metadata(path).with_context(|| format!("{} is not there", path.display()))?.mode() & 0o7777)
}

/// Names of sockets that have no path (unix(7)): whoever shares the network namespace could connect.
fn abstract_sockets() -> Result<BTreeSet<String>> {
    let table = std::fs::read_to_string("/proc/net/unix")?;
    let names = table.lines().filter_map(|line| line.split_whitespace().nth(7));
    Ok(names.filter(|name| name.starts_with('@')).map(str::to_owned).collect())
}

#[test]
fn hostile_23_socket_and_directory_of_a_shim_are_roots_alone() {
    on_shims(async || {
        let before = abstract_sockets()?;
        let stage = Stage::empty().await?;
        let (mut story, pod) = stage.begin_with("sockets", "", |_| {}).await?;
        ensure!(mode("/run/containerd/s")? == 0o700, "{:o}", mode("/run/containerd/s")?);
        let address = std::fs::read_to_string(stage.host.bundle(&pod.id).join("address"))?;
        let socket = address.trim().strip_prefix("unix://").context("the shim's address is no path")?.to_owned();
        ensure!(socket.starts_with("/run/containerd/s/") && mode(&socket)? == 0o600, "{socket}");
        ensure!(std::fs::metadata(&socket)?.uid() == 0, "{socket} is not root's");
        for directory in ["/run/bulkhead/k8s.io/sockets", "/run/bulkhead/k8s.io/sockets/share"] {
            ensure!(mode(directory)? & 0o077 == 0, "{directory}: {:o}", mode(directory)?);
        }
        let more: Vec<_> = abstract_sockets()?.difference(&before).cloned().collect();
        ensure!(more.is_empty(), "abstract sockets {more:?}");
        stage.end(&mut story, pod, false).await
    });
}

/// Annotations of our own prefix that name what only the node's owner may choose. The configuration allows none.
const OWN: [&str; 10] = [
    "io.bulkhead.kernel-params",
    "io.bulkhead.vmm",
    "io.bulkhead.kernel",
    "io.bulkhead.initramfs",
    "io.bulkhead.config",
    "io.bulkhead.config-path",
    "io.bulkhead.debug-console",
    "io.bulkhead.",
    "io.bulkhead.vcpus",
    "io.bulkhead.memory-mib",
];

/// What Kata Containers reads for the same; GHSA-rr59-xxvx-96qr and CVE-2020-27151 were about such.
const OTHERS: [&str; 8] = [
    "io.katacontainers.config_path",
    "io.katacontainers.config.hypervisor.path",
    "io.katacontainers.config.hypervisor.kernel",
    "io.katacontainers.config.hypervisor.kernel_params",
    "io.katacontainers.config.hypervisor.virtio_fs_daemon",
    "io.katacontainers.config.hypervisor.virtio_fs_extra_args",
    "io.katacontainers.config.hypervisor.jailer_path",
    "io.katacontainers.config.agent.kernel_modules",
];

#[test]
fn hostile_23_annotations_of_ours_are_refused_unless_the_node_allows_them() {
    on_shims(async || {
        let stage = Stage::empty().await?;
        for (number, name) in OWN.into_iter().enumerate() {
            let id = format!("annotated-{number}");
            let evil = |spec: &mut serde_json::Value| spec["annotations"][name] = "2".into();
            let (mut story, pod) = stage.begin_with(&id, "", evil).await?;
            let text = story.refusal("boot")?;
            ensure!(text.contains(name) && (text.contains("unknown") || text.contains("not allowed")), "{text}");
            stage.end(&mut story, pod, false).await?;
            story.check()?;
        }
        Ok(())
    });
}

#[test]
fn hostile_23_annotations_of_others_choose_no_binary_path_or_kernel_parameter() {
    on_shims(async || {
        let stage = Stage::empty().await?;
        let plain = {
            let (mut story, pod) = stage.begin_with("annotated-plain", "Boot:tell", |_| {}).await?;
            stage.end(&mut story, pod, false).await?;
            story.refusal("boot")?
        };
        ensure!(plain.contains("liar=Boot:tell"), "{plain}");
        let evil = |spec: &mut serde_json::Value| {
            for name in OTHERS {
                spec["annotations"][name] = "/bin/false agent.debug_console init=/bin/sh".into();
            }
        };
        // The VMM that is started, and what it is asked to boot, are the same.
        let (mut story, pod) = stage.begin_with("annotated-evil", "Boot:tell", evil).await?;
        stage.end(&mut story, pod, false).await?;
        ensure!(story.refusal("boot")? == plain, "{} and {plain}", story.refusal("boot")?);
        story.check()
    });
}

/// What becomes of a container with an odd root file system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Outcome {
    Works,
    Refused,
}

/// Makes something in a bundle.
type Prepare = Box<dyn Fn(&Path) -> Result<()>>;

/// A root file system as containerd might describe it.
struct Odd {
    name: &'static str,
    mounts: Vec<Mount>,
    /// What is in the bundle instead of the directory `rootfs`.
    prepared: Option<Prepare>,
    outcome: Outcome,
}

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    Mount { type_: kind.into(), source: source.into(), options, ..Mount::default() }
}

fn mounted(name: &'static str, outcome: Outcome, mounts: Vec<Mount>) -> Odd {
    Odd { name, mounts, prepared: None, outcome }
}

fn prepared(name: &'static str, outcome: Outcome, make: impl Fn(&Path) -> Result<()> + 'static) -> Odd {
    Odd { name, mounts: Vec::new(), prepared: Some(Box::new(make)), outcome }
}

/// A block device of the node's memory: it is there, and opening it would be a disk of the host in the guest.
fn block_device(path: &Path) -> Result<()> {
    Ok(mknodat(CWD, path, FileType::BlockDevice, Mode::from_raw_mode(0o600), rustix::fs::makedev(1, 0))?)
}

fn odd_ones(dir: &Path) -> Result<Vec<Odd>> {
    use Outcome::{Refused, Works};
    let path = |name: &str| dir.join(name).display().to_string();
    for name in ["empty", "layer"] {
        std::fs::create_dir_all(dir.join(name))?;
    }
    std::fs::write(dir.join("file"), "no directory")?;
    block_device(&dir.join("disk"))?;
    symlink("/etc", dir.join("link"))?;
    symlink(dir.join("link"), dir.join("link-to-link"))?;
    symlink("disk", dir.join("disk-link"))?;
    // Read-only, as of an image: what is writable needs a file system that the node's may not be.
    let layered = format!("lowerdir={}:{}", path("layer"), path("empty"));
    let (disk, file, empty) = (path("disk"), path("file"), path("empty"));
    let absent = ["lowerdir=/no/such/layer"];
    Ok(vec![
        mounted("no mount, the bundle's own directory", Works, vec![]),
        mounted("a bind mount of an empty directory", Works, vec![mount("bind", &empty, &["rbind", "rw"])]),
        mounted("a bind mount, read-only", Works, vec![mount("bind", &empty, &["rbind", "ro"])]),
        mounted("an overlay of empty layers", Works, vec![mount("overlay", "overlay", &[&layered, "ro"])]),
        // What CVE-2026-24054 was about: a bind mount is a directory, never the disk that it is on.
        mounted("a bind mount with a file system's type", Refused, vec![mount("ext4", &empty, &["rbind", "rw"])]),
        mounted("an overlay without layers", Refused, vec![mount("overlay", "overlay", &[])]),
        mounted("an overlay of a layer that is not there", Refused, vec![mount("overlay", "overlay", &absent)]),
        mounted("a block device as a file system", Refused, vec![mount("ext4", &disk, &["rw"])]),
        mounted("a block device, bound", Refused, vec![mount("bind", &disk, &["rbind", "rw"])]),
        mounted("a block device without a type", Refused, vec![mount("", &disk, &["rw"])]),
        mounted("a file, bound", Refused, vec![mount("bind", &file, &["rbind", "rw"])]),
        mounted("a file, looped", Refused, vec![mount("ext4", &file, &["loop"])]),
        mounted("an image layer that is no image", Refused, vec![mount("erofs", &file, &["loop", "ro"])]),
        mounted("an image layer that is a disk", Refused, vec![mount("erofs", &disk, &["loop", "ro"])]),
        mounted("an image layer that is a link to a disk", Refused, vec![mount("erofs", &path("disk-link"), &["ro"])]),
        mounted("an image layer that is a directory", Refused, vec![mount("erofs", &empty, &["loop", "ro"])]),
        mounted("an image layer that is not there", Refused, vec![mount("erofs", "/no/such/image", &["loop", "ro"])]),
        mounted("image layers without an overlay", Refused, vec![mount("erofs", &file, &["ro"]); 2]),
        mounted(
            "image layers over a directory of the host",
            Refused,
            vec![mount("erofs", &file, &["ro"]), mount("format/mkdir/overlay", "overlay", &["lowerdir=/etc"])],
        ),
        mounted("the host's proc", Refused, vec![mount("proc", "proc", &[])]),
        mounted("a mount of nothing", Refused, vec![mount("bind", "", &["rbind"])]),
        mounted("a mount of what is not there", Refused, vec![mount("bind", "/no/such/directory", &["rbind"])]),
        mounted("no type and no source", Refused, vec![mount("", "", &[])]),
        mounted(
            "a good mount, then a bad one",
            Refused,
            vec![mount("bind", &empty, &["rbind", "rw"]), mount("ext4", &disk, &["rw"])],
        ),
        prepared("a link to a directory of the host", Refused, |rootfs| Ok(symlink("/etc", rootfs)?)),
        prepared("a link to the host's root", Refused, |rootfs| Ok(symlink("/", rootfs)?)),
        prepared("a link to itself", Refused, |rootfs| Ok(symlink("rootfs", rootfs)?)),
        prepared("a file", Refused, |rootfs| Ok(std::fs::write(rootfs, "")?)),
        prepared("a block device", Refused, block_device),
        prepared("nothing at all", Refused, |_| Ok(())),
    ])
}

/// Creates a container and ends it; answers what came of it.
async fn try_one(stage: &Stage, pod: &Pod, odd: &Odd) -> Result<Outcome> {
    let id = &pod.main;
    let bundle = stage.host.container_bundle(id, &pod.id, pod.pid, "true")?;
    if let Some(make) = &odd.prepared {
        let rootfs = bundle.join("rootfs");
        std::fs::remove_dir_all(&rootfs)?;
        make(&rootfs)?;
    }
    let create = api::CreateTaskRequest {
        id: id.clone(),
        bundle: bundle.display().to_string(),
        rootfs: odd.mounts.clone(),
        ..Default::default()
    };
    let created = pod.shim.task::<api::CreateTaskResponse>("Create", &create).await;
    let outcome = if created.is_ok() {
        let _: api::StartResponse = pod.shim.task("Start", &start(id, "")).await?;
        let _: api::Empty = pod.shim.task("Kill", &kill(id, 9)).await?;
        let _: api::WaitResponse = pod.shim.task("Wait", &wait(id, "")).await?;
        let _: api::DeleteResponse = pod.shim.task("Delete", &delete(id, "")).await?;
        Outcome::Works
    } else {
        let code = code(&created);
        let text = created.err().map(|error| error.to_string()).unwrap_or_default();
        ensure!(code != Code::UNIMPLEMENTED && code != Code::UNAVAILABLE, "{text}");
        ensure!(!text.contains('\n') && text.contains("root"), "the refusal does not say what of: {text:?}");
        println!("{:<45} {text}", odd.name);
        Outcome::Refused
    };
    stage.host.delete(id)?;
    let left = share_of(&pod.id)?;
    ensure!(left.is_empty(), "left in the share: {left:?}");
    Ok(outcome)
}

/// What the guest sees: mounts in the pod's share, and entries.
fn share_of(pod: &str) -> Result<Vec<PathBuf>> {
    let share = Path::new("/run/bulkhead/k8s.io").join(pod).join("share");
    let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", Processes::of_sandbox(pod)?.vmm))?;
    let mounts = table.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut found: Vec<_> = mounts.filter(|point| point != Path::new("/")).collect();
    found.extend(std::fs::read_dir(&share)?.flatten().map(|entry| entry.path()));
    Ok(found)
}

#[test]
fn hostile_24_root_file_system_that_is_no_directory_is_refused_and_no_device_is_looked_for() {
    on_shims(async || {
        let stage = Stage::empty().await?;
        // A VMM that is given a disk ends, and its pod with it: no root file system may become one.
        let (mut story, pod) = stage.begin_with("odd", "AddDevice:exit", |_| {}).await?;
        story.value("boot")?;
        let dir = stage.host.path("odd-rootfs");
        let mut wrong = Vec::new();
        for odd in odd_ones(&dir)? {
            let outcome = try_one(&stage, &pod, &odd).await.with_context(|| odd.name)?;
            if outcome != odd.outcome {
                wrong.push(format!("{}: {outcome:?} instead of {:?}", odd.name, odd.outcome));
            }
        }
        ensure!(wrong.is_empty(), "{wrong:#?}");
        ensure!(std::fs::read_dir("/etc")?.count() > 3, "the host's files are gone");
        stage.end(&mut story, pod, false).await?;
        story.check()
    });
}
