//! Raw block volumes: a disk of the host, under the container's path, as long as a container has it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::{PATIENCE, TestPod, node_command, on_node, sh};

const SLEEP: &str = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done";
const SIZE: u64 = 8 << 20;

/// A loop device over a file in memory.
struct Loop {
    path: String,
    file: File,
    name: String,
}

impl Loop {
    fn new(name: &str) -> Result<Self> {
        let name = format!("/tmp/{name}-{}.img", std::process::id());
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&name)?;
        file.set_len(SIZE)?;
        file.write_all_at(b"hello", 0)?;
        let path = node_command("losetup", &["-f", "--show", &name])?.trim().to_owned();
        Ok(Self { path, file, name })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = node_command("losetup", &["-d", &self.path]);
        let _ = std::fs::remove_file(&self.name);
    }
}

/// A disk that can be made to answer nothing (dmsetup(8), suspend): a linear device over a loop device.
struct Mapped {
    name: String,
    path: String,
    /// The kubelet has a volume's device open too, as long as the pod is there.
    held: Option<File>,
    _below: Loop,
}

impl Mapped {
    fn new(name: &str) -> Result<Self> {
        let below = Loop::new(name)?;
        let name = format!("{name}-{}", std::process::id());
        let table = format!("0 {} linear {} 0", SIZE / 512, below.path);
        node_command("dmsetup", &["create", &name, "--noudevsync", "--table", &table])?;
        let mut disk = Self { name, path: String::new(), held: None, _below: below };
        let minor = node_command("dmsetup", &["info", "-c", "--noheadings", "-o", "minor", &disk.name])?;
        disk.path = format!("/dev/dm-{}", minor.trim());
        disk.held = Some(File::open(&disk.path)?);
        Ok(disk)
    }

    /// From now on it answers nothing.
    fn suspend(&self) -> Result<()> {
        node_command("dmsetup", &["suspend", "--noudevsync", &self.name]).map(drop)
    }

    /// It answers what it was asked meanwhile.
    fn resume(&self) -> Result<()> {
        node_command("dmsetup", &["resume", "--noudevsync", &self.name]).map(drop)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = self.resume();
        self.held = None;
        let _ = node_command("dmsetup", &["remove", "--noudevsync", "--deferred", &self.name]);
    }
}

fn with_device(name: &str, host: &str, permissions: &str) -> v1::ContainerConfig {
    let device =
        v1::Device { container_path: "/dev/xvda".into(), host_path: host.into(), permissions: permissions.into() };
    v1::ContainerConfig { devices: vec![device], ..sh(name, SLEEP) }
}

/// Disks that the guest has.
async fn disks(pod: &TestPod, container: &str) -> Result<usize> {
    let list = pod.sh(container, "ls /sys/block").await?;
    Ok(list.split_whitespace().filter(|name| name.starts_with("vd")).count())
}

async fn remove(pod: &TestPod, container: &str) -> Result<()> {
    pod.stop(container, Duration::from_secs(60)).await?;
    pod.remove_container(container).await
}

#[test]
fn block_volume_is_the_hosts_disk_for_as_long_as_a_container_has_it() {
    on_node(async |node| {
        let disk = Loop::new("volume")?;
        let pod = node.pod("block").await?;
        let main = pod.sleeper("main").await?;
        for round in 0..2u8 {
            let one = pod.run(with_device(&format!("one-{round}"), &disk.path, "rwm")).await?;
            let read = pod.sh(&one, "test -b /dev/xvda && wc -c < /dev/xvda && head -c 5 /dev/xvda").await?;
            ensure!(read == format!("{SIZE}\nhello"), "{read}");
            let write = format!("echo written-{round} | dd of=/dev/xvda bs=512 seek=8 conv=fsync");
            pod.sh(&one, &write).await?;
            let mut there = [0; 9];
            disk.file.read_exact_at(&mut there, 4096)?;
            ensure!(there == format!("written-{round}").as_bytes(), "on the host: {there:?}");
            let two = pod.run(with_device(&format!("two-{round}"), &disk.path, "rwm")).await?;
            ensure!(disks(&pod, &main).await? == 1, "the same device is there twice");
            remove(&pod, &one).await?;
            let read = pod.sh(&two, "dd if=/dev/xvda bs=512 skip=8 count=1 | head -c 9").await?;
            ensure!(read == format!("written-{round}"), "{read}");
            remove(&pod, &two).await?;
            ensure!(disks(&pod, &main).await? == 0, "the disk has stayed in the guest");
        }
        Ok(())
    });
}

#[test]
fn block_volume_that_may_not_be_written_is_read_only() {
    on_node(async |node| {
        let disk = Loop::new("read-only")?;
        let pod = node.pod("block-ro").await?;
        let container = pod.run(with_device("main", &disk.path, "r")).await?;
        ensure!(pod.sh(&container, "head -c 5 /dev/xvda").await? == "hello", "not readable");
        let write = pod.exec(&container, &["/bin/sh", "-c", "echo no > /dev/xvda"]).await?;
        ensure!(write.code != 0, "it was written to");
        ensure!(
            pod.sh(&container, "cat /sys/block/vda/ro").await? == "1",
            "only the cgroup keeps it from being written"
        );
        let mut there = [0; 5];
        disk.file.read_exact_at(&mut there, 0)?;
        ensure!(&there == b"hello", "{there:?}");
        Ok(())
    });
}

#[test]
fn character_device_of_the_host_is_refused() {
    on_node(async |node| {
        let pod = node.pod("char").await?;
        let refused = pod.run(with_device("main", "/dev/kvm", "rwm")).await;
        let message = refused.err().context("the host's /dev/kvm was given away")?.to_string();
        ensure!(message.contains("/dev/xvda") && message.contains("VM cannot reach"), "{message}");
        Ok(())
    });
}

/// Runs something in a container that has nothing to do with the disk.
async fn answers(pod: &TestPod, container: &str) -> Result<()> {
    /// As long as a kubelet's probe may take when it is set generously; an emulated node takes a second or two.
    const PROBE: Duration = Duration::from_secs(15);
    let begin = Instant::now();
    pod.sh(container, "true").await?;
    ensure!(begin.elapsed() < PROBE, "an exec beside a disk that hangs took {:?}", begin.elapsed());
    Ok(())
}

#[test]
fn disk_that_does_not_answer_holds_up_no_other_container() {
    /// What the shim allows the guest and the VMM to let go of a disk (50 s), the guest to end (10 s) and a kill (20 s), and
    /// what an emulated node takes on top.
    const REMOVAL: Duration = Duration::from_secs(100);
    on_node(async |node| {
        let (hanging, other) = (Mapped::new("hanging")?, Loop::new("other")?);
        let pod = node.pod("disk-hangs").await?;
        let healthy = pod.sleeper("healthy").await?;
        let sick = pod.run(with_device("sick", &hanging.path, "rwm")).await?;
        ensure!(pod.sh(&sick, "head -c 5 /dev/xvda").await? == "hello", "not readable");
        hanging.suspend()?;
        // Far from what has been read.
        let read = "dd if=/dev/xvda of=/dev/null bs=512 skip=12288 count=1 </dev/null >/dev/null 2>&1 &";
        let hangs = "until read reads writes < /sys/block/vda/inflight && [ $reads -gt 0 ]; do :; done";
        tokio::time::timeout(PATIENCE, pod.sh(&sick, &format!("{read} {hangs}"))).await.context("nothing hangs")??;

        let begin = Instant::now();
        let come_and_go = async {
            let container = pod.run(with_device("other", &other.path, "rwm")).await?;
            ensure!(pod.sh(&container, "head -c 5 /dev/xvda").await? == "hello", "not readable");
            remove(&pod, &container).await
        };
        let probes = async {
            for _ in 0..5 {
                answers(&pod, &healthy).await?;
            }
            anyhow::Ok(())
        };
        let (come_and_go, probes) = tokio::join!(come_and_go, probes);
        come_and_go.context("a container with another disk")?;
        probes?;
        ensure!(begin.elapsed() < PATIENCE, "a container with another disk took {:?}", begin.elapsed());
        answers(&pod, &healthy).await?;

        let begin = Instant::now();
        node.cri.remove_pod(&pod.id).await?;
        ensure!(begin.elapsed() < REMOVAL, "the removal of a pod whose disk hangs took {:?}", begin.elapsed());
        hanging.resume()
    });
}
