//! Root file systems of containers, which their guest keeps to itself until it has to write.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::{node_command, on_node, sh};

/// The disk on which containerd keeps them, a tmpfs of the node's.
const STORE: &str = "/run/node/containerd";

/// Upper layers of containers on the node.
const SNAPSHOTS: &str = "/run/node/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";

/// A file of a root file system, of an image or made by a container, as the node has it.
pub fn on_the_node(name: &str) -> Result<PathBuf> {
    let layers = fs::read_dir(SNAPSHOTS).context("no snapshots")?;
    let found = layers.filter_map(|layer| Some(layer.ok()?.path().join("fs").join(name)));
    found.into_iter().find(|path| path.exists()).with_context(|| format!("the node has no file {name} in any layer"))
}

fn sha256(path: &PathBuf) -> Result<String> {
    let output = Command::new("sha256sum").arg(path).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().next().context("sha256sum says nothing")?.to_owned())
}

#[test]
fn what_a_container_has_written_is_on_the_node_when_it_has_ended() {
    on_node(async |node| {
        let pod = node.pod("written").await?;
        let script =
            "head -c 3000000 /dev/urandom > /written-whole; echo last >> /written-whole; sha256sum /written-whole";
        let (status, said) = pod.run_to_end(sh("writer", script)).await?;
        ensure!(status.exit_code == 0, "{said}");
        let path = on_the_node("written-whole")?;
        ensure!(said.starts_with(&sha256(&path)?), "{said}");
        Ok(())
    });
}

/// As for who copies the container's files meanwhile (`nerdctl commit`).
#[test]
fn what_a_container_has_written_is_on_the_node_when_it_is_paused() {
    on_node(async |node| {
        let pod = node.pod("paused").await?;
        let writer = pod.sleeper("writer").await?;
        let said = pod.sh(&writer, "seq 100000 > /written-before; sha256sum /written-before").await?;
        let task = |action| Command::new("ctr").args(["-n", "k8s.io", "task", action, &writer]).status();
        ensure!(task("pause")?.success());
        let found = on_the_node("written-before").and_then(|path| sha256(&path));
        ensure!(task("resume")?.success());
        ensure!(said.starts_with(&found?), "{said}");
        Ok(())
    });
}

/// Pages that wait to be written are the container's, and those of a small one have to go before it may have more.
#[test]
fn a_container_with_little_memory_writes_large_files() {
    on_node(async |node| {
        let pod = node.pod("large").await?;
        let mut config = sh("writer", "dd if=/dev/zero of=/large bs=64k count=3000 2>/dev/null && stat -c %s /large");
        let resources = v1::LinuxContainerResources { memory_limit_in_bytes: 24 << 20, ..Default::default() };
        config.linux = Some(v1::LinuxContainerConfig { resources: Some(resources), ..Default::default() });
        let (status, said) = pod.run_to_end(config).await?;
        ensure!(status.exit_code == 0 && said.trim() == "196608000", "{} {said}", status.exit_code);
        Ok(())
    });
}

#[test]
fn a_write_that_finds_the_disk_full_says_so() {
    on_node(async |node| {
        let pod = node.pod("full").await?;
        let writer = pod.sleeper("writer").await?;
        let table = node_command("df", &["-k", "--output=used", STORE])?;
        let used: u64 = table.lines().last().unwrap_or_default().trim().parse()?;
        let resize = |size: &str| node_command("mount", &["-o", &format!("remount,size={size}"), STORE]);
        resize(&format!("{}k", used + (20 << 10)))?;
        let said = pod.sh(&writer, "dd if=/dev/zero of=/large bs=64k count=1000 2>&1; rm /large").await;
        resize("50%")?;
        let said = said?;
        ensure!(said.contains("No space left on device"), "{said}");
        Ok(())
    });
}

/// The guest tells the host later that it has forgotten a file, but before it asks for anything.
#[test]
fn space_of_a_removed_file_is_free_for_who_asks_next() {
    on_node(async |node| {
        let pod = node.pod("removed").await?;
        let script = "dd if=/dev/zero of=/large bs=1M count=64 conv=fsync 2>/dev/null; \
                      stat -f -c '%a %S' /; rm /large; stat -f -c '%a %S' /";
        let (status, said) = pod.run_to_end(sh("writer", script)).await?;
        ensure!(status.exit_code == 0, "{said}");
        let free = |line: &str| -> Result<u64> {
            let (blocks, size) = line.split_once(' ').context("no two numbers")?;
            Ok(blocks.parse::<u64>()? * size.parse::<u64>()?)
        };
        let (before, after) = said.trim().split_once('\n').context("no two lines")?;
        // Other pods of the node may write meanwhile.
        ensure!(free(after)? >= free(before)? + (32 << 20), "{said}");
        Ok(())
    });
}

/// Two containers of a pod each have their own, and nobody else's.
#[test]
fn files_of_an_image_are_each_containers_own() {
    on_node(async |node| {
        let pod = node.pod("own").await?;
        let (one, two) = (pod.sleeper("one").await?, pod.sleeper("two").await?);
        pod.sh(&one, "echo changed > /etc/passwd; rm -r /home; mkdir /made").await?;
        ensure!(pod.sh(&one, "cat /etc/passwd; ls -d /home /made 2>&1; true").await?.starts_with("changed"));
        ensure!(pod.sh(&two, "head -c 4 /etc/passwd; ls -d /home; test ! -e /made").await? == "root/home");
        pod.remove_container(&one).await?;
        ensure!(pod.sh(&two, "head -c 4 /etc/passwd").await? == "root");
        Ok(())
    });
}
