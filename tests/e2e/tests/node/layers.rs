//! Root file systems of image layers, as containerd's erofs snapshotter describes them (containerd 2.2): what the guest makes of
//! them, where what a container writes ends up, and who else has an image's memory.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::erofs::{Entry, image};
use bulkhead_e2e::processes::Processes;
use bulkhead_e2e::shim::{Caller, Code, Output, Shim, code};
use bulkhead_e2e::{PATIENCE, on_node};
use containerd_shim_protos::api;
use containerd_shim_protos::types::mount::Mount;

use crate::contract::{Contract, delete, shutdown, start, wait};

/// The snapshots of an image of two layers, and of containers of it. They are in memory, whose file system can be written by an
/// overlay.
struct Snapshots(PathBuf);

impl Drop for Snapshots {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Snapshots {
    fn new() -> Result<Self> {
        let snapshots = Self(format!("/run/snapshots-of-{}", std::process::id()).into());
        let busybox = std::fs::read("/usr/bin/busybox").context("the node has no busybox")?;
        let mut base = vec![("bin", Entry::Directory), ("bin/busybox", Entry::Program(busybox))];
        base.extend(
            ["bin/sh", "bin/cat", "bin/ls", "bin/rm", "bin/mkdir", "bin/sleep", "bin/stat"]
                .map(|path| (path, Entry::Link("busybox"))),
        );
        base.extend(["dev", "proc", "sys", "tmp", "etc", "etc/old"].map(|path| (path, Entry::Directory)));
        base.push(("etc/layer", Entry::File(b"lower\n".to_vec())));
        base.push(("etc/gone", Entry::File(b"gone\n".to_vec())));
        base.push(("etc/old/file", Entry::File(b"old\n".to_vec())));
        base.push(("etc/replaced", Entry::Directory));
        base.push(("etc/replaced/hidden", Entry::File(b"hidden\n".to_vec())));
        snapshots.layer(1, &image(base))?;
        let upper = vec![
            ("etc", Entry::Directory),
            ("etc/layer", Entry::File(b"upper\n".to_vec())),
            ("etc/replaced", Entry::OpaqueDirectory),
            ("etc/replaced/new", Entry::File(b"new\n".to_vec())),
        ];
        snapshots.layer(2, &image(upper))?;
        Ok(snapshots)
    }

    fn path(&self, number: u32, name: &str) -> PathBuf {
        self.0.join(number.to_string()).join(name)
    }

    fn layer(&self, number: u32, bytes: &[u8]) -> Result<()> {
        std::fs::create_dir_all(self.path(number, "fs"))?;
        Ok(std::fs::write(self.path(number, "layer.erofs"), bytes)?)
    }

    /// The mounts of a container, and what is beside its directories.
    fn container(&self, number: u32) -> Result<Vec<Mount>> {
        for name in ["fs", "work"] {
            std::fs::create_dir_all(self.path(number, name))?;
        }
        std::fs::write(self.path(number, ".erofslayer"), "")?;
        let layer = |number| mount("erofs", self.path(number, "layer.erofs"), &["ro", "loop"]);
        let upper = format!("upperdir={}", self.path(number, "fs").display());
        let work = format!("workdir={}", self.path(number, "work").display());
        let overlay = mount("format/mkdir/overlay", "overlay", &[&work, &upper, "lowerdir={{ overlay 0 1 }}"]);
        Ok(vec![layer(2), layer(1), overlay])
    }
}

fn mount(kind: &str, source: impl AsRef<Path>, options: &[&str]) -> Mount {
    let options = options.iter().map(|option| (*option).to_owned()).collect();
    Mount { type_: kind.into(), source: source.as_ref().display().to_string(), options, ..Mount::default() }
}

/// Creates a container of such mounts, which runs a script when it is started.
async fn create(
    contract: &Contract,
    (shim, pid): (&Shim, u32),
    id: &str,
    script: &str,
    mounts: Vec<Mount>,
    stdout: String,
) -> Result<Result<api::CreateTaskResponse, String>> {
    let bundle = contract.host.container_bundle(id, contract.sandbox, pid, script)?;
    let request = api::CreateTaskRequest {
        id: id.into(),
        bundle: bundle.display().to_string(),
        rootfs: mounts,
        stdout,
        ..Default::default()
    };
    let created = shim.task::<api::CreateTaskResponse>("Create", &request).await;
    ensure!(code(&created) != Code::UNIMPLEMENTED, "{created:?}");
    Ok(created.map_err(|error| error.to_string()))
}

/// Starts a container and waits for its end; answers its exit code.
async fn run(shim: &Shim, id: &str) -> Result<u32> {
    let _: api::StartResponse = shim.task("Start", &start(id, "")).await?;
    let ended: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
    Ok(ended.exit_status)
}

async fn remove(shim: &Shim, id: &str) -> Result<()> {
    let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
    Ok(())
}

/// Mappings of images in a VMM, by their permissions.
fn mapped(sandbox: &str) -> Result<Vec<String>> {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", Processes::of_sandbox(sandbox)?.vmm))?;
    let images = maps.lines().filter(|line| line.contains("layer.erofs"));
    Ok(images.filter_map(|line| line.split(' ').nth(1)).map(str::to_owned).collect())
}

/// Waits until no image is mapped any more: that takes its own time, for which nobody waits.
async fn gone(sandbox: &str) -> Result<()> {
    let begin = Instant::now();
    while !mapped(sandbox)?.is_empty() {
        ensure!(begin.elapsed() < PATIENCE, "images stay in the VMM: {:?}", mapped(sandbox)?);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

const SCRIPT: &str = "cat /etc/layer; echo new > /etc/new; rm /etc/gone; rm -r /etc/old; mkdir /etc/old; \
     echo changed >> /etc/layer; cat /etc/layer; ls /etc /etc/old /etc/replaced; \
     cat /proc/mounts | while read a b c d; do [ $b = / ] && echo $c; done; \
     [ $(stat -c %d /bin/busybox) = $(stat -c %d /) ] && [ $(stat -c %d /etc/new) = $(stat -c %d /) ]";

#[test]
fn image_layers_are_read_from_the_hosts_memory_and_written_to_the_snapshot() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd2_1).await?;
        let snapshots = Snapshots::new()?;
        let (shim, pid) = contract.pod_by_task().await?;
        let output = Output::new(contract.host.path("layers-out"))?;
        let mounts = snapshots.container(8)?;
        let created = create(&contract, (&shim, pid), "layered", SCRIPT, mounts, output.path()).await?;
        created.map_err(anyhow::Error::msg)?;
        ensure!(mapped(contract.sandbox)? == ["r--s"; 2], "{:?}", mapped(contract.sandbox)?);
        // Another container of the image: its layers are there already.
        let other = create(&contract, (&shim, pid), "other", "cat /etc/gone", snapshots.container(9)?, String::new());
        other.await?.map_err(anyhow::Error::msg)?;
        ensure!(mapped(contract.sandbox)?.len() == 2, "{:?}", mapped(contract.sandbox)?);

        ensure!(run(&shim, "layered").await? == 0, "{:?}", output.to_end().await);
        remove(&shim, "layered").await?;
        let text = output.to_end().await?;
        let expected =
            "upper\nupper\nchanged\n/etc:\nlayer\nnew\nold\nreplaced\n\n/etc/old:\n\n/etc/replaced:\nnew\noverlay\n";
        ensure!(text == expected, "{text:?}");
        let upper = |name: &str| snapshots.path(8, "fs/etc").join(name);
        ensure!(std::fs::read_to_string(upper("new"))? == "new\n", "what is written is in the snapshot");
        ensure!(std::fs::read_to_string(upper("layer"))? == "upper\nchanged\n", "and what is changed");
        let whiteout = std::fs::symlink_metadata(upper("gone"))?;
        ensure!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0, "what is removed is a whiteout");
        // The other one has none of that, and the layers as long as it is there.
        ensure!(run(&shim, "other").await? == 0, "the containers of an image have what they write in common");
        ensure!(mapped(contract.sandbox)?.len() == 2, "{:?}", mapped(contract.sandbox)?);
        remove(&shim, "other").await?;
        gone(contract.sandbox).await?;
        let mut beside: Vec<_> = std::fs::read_dir(snapshots.path(8, ""))?.flatten().map(|e| e.file_name()).collect();
        beside.sort_unstable();
        ensure!(beside == [".erofslayer", "fs", "work"], "{beside:?}");
        contract.end_by_task(&shim).await
    });
}

/// Its processes would hang that touch what is gone: that is said, and the pod is over.
#[test]
fn hostile_12_layer_that_is_cut_short_ends_its_pod() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd2_1).await?;
        let snapshots = Snapshots::new()?;
        let (shim, pid) = contract.pod_by_task().await?;
        let created = create(&contract, (&shim, pid), "cut", "sleep 10000", snapshots.container(9)?, String::new());
        created.await?.map_err(anyhow::Error::msg)?;
        let _: api::StartResponse = shim.task("Start", &start("cut", "")).await?;
        // What is removed stays.
        std::fs::remove_file(snapshots.path(2, "layer.erofs"))?;
        std::fs::File::options().write(true).open(snapshots.path(1, "layer.erofs"))?.set_len(4096)?;
        for id in ["cut", contract.sandbox] {
            let ended: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
            ensure!(ended.exit_status == 137, "{id}: {ended:?}");
            remove(&shim, id).await?;
        }
        let _: api::Empty = shim.task("Shutdown", &shutdown(contract.sandbox)).await?;
        ensure!(contract.host.delete(contract.sandbox)?.exit_status == 137, "delete of a pod that is gone");
        Ok(())
    });
}

#[test]
fn hostile_12_corrupt_image_is_refused_and_its_pod_goes_on() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd2_1).await?;
        let snapshots = Snapshots::new()?;
        let (shim, pid) = contract.pod_by_task().await?;
        let good = std::fs::read(snapshots.path(1, "layer.erofs"))?;
        // In the superblock its block size, the root's number and the features that a kernel must know; in the root its kind.
        for (name, at, byte) in
            [("size", 1036, 99), ("root", 1038, 200), ("features", 1104, 0xff), ("kind", 4101, 0x81)]
        {
            let mut bad = good.clone();
            bad[at] = byte;
            snapshots.layer(1, &bad)?;
            let refused = create(&contract, (&shim, pid), "corrupt", "true", snapshots.container(9)?, String::new());
            let text = refused.await?.err().with_context(|| name)?;
            ensure!(text.contains("image layer"), "{name}: {text}");
            contract.host.delete("corrupt")?;
            gone(contract.sandbox).await.context(name)?;
        }
        snapshots.layer(1, &good)?;
        let created = create(&contract, (&shim, pid), "good", "cat /etc/layer", snapshots.container(9)?, String::new());
        created.await?.map_err(anyhow::Error::msg)?;
        ensure!(run(&shim, "good").await? == 0, "the pod does not go on");
        remove(&shim, "good").await?;
        contract.end_by_task(&shim).await
    });
}
