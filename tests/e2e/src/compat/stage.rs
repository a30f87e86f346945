//! The place where a group's cases run: one pod of one handler.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use bulkhead_cli::cri::{ExecOutput, v1};
use bulkhead_cli::log;
use tokio::sync::OnceCell;

use super::shell;
use crate::log_watch::LogWatch;
use crate::{PATIENCE, TestPod};

/// A directory of the node that a pod may use for its volumes; it is the same tree for both handlers.
#[derive(Clone, Debug)]
pub struct Place(PathBuf);

impl Place {
    /// Makes it, empty.
    pub fn new(path: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    /// A path below it, created as a directory.
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        // A failure shows in whatever uses the directory.
        let _ = std::fs::create_dir_all(&path);
        path
    }

    /// A path below it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Itself.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// A bind of a path below it, made as a directory unless it exists.
    pub fn mount(&self, name: &str, container_path: &str) -> v1::Mount {
        let host = self.path(name);
        let host = if host.exists() { host } else { self.directory(name) };
        v1::Mount {
            container_path: container_path.to_owned(),
            host_path: host.to_string_lossy().into_owned(),
            ..Default::default()
        }
    }
}

/// A pod of one handler.
pub struct Stage {
    /// The pod.
    pub pod: TestPod,
    /// Its directory on the node.
    pub place: Place,
    volatile: Mutex<HashMap<String, &'static str>>,
    sleeper: OnceCell<String>,
}

impl std::ops::Deref for Stage {
    type Target = TestPod;

    fn deref(&self) -> &TestPod {
        &self.pod
    }
}

impl Stage {
    /// Takes note of what is this pod's alone and no part of an observation.
    pub async fn new(pod: TestPod, place: Place) -> Result<Self> {
        let addresses = pod.addresses().await?;
        let mut volatile = HashMap::from([(pod.id.clone(), "<pod>")]);
        if let Some(metadata) = pod.config.metadata.clone() {
            volatile.insert(metadata.uid, "<uid>");
            volatile.insert(metadata.name, "<name>");
        }
        volatile.insert(place.root().to_string_lossy().into_owned(), "<place>");
        volatile.insert(pod.config.log_directory.clone(), "<logs>");
        for (address, name) in addresses.into_iter().zip(["<ipv4>", "<ipv6>"]) {
            volatile.insert(address, name);
        }
        Ok(Self { pod, place, volatile: Mutex::new(volatile), sleeper: OnceCell::new() })
    }

    /// Creates and starts a container.
    pub async fn run(&self, config: v1::ContainerConfig) -> Result<String> {
        let id = self.create(config).await?;
        self.start(&id).await?;
        Ok(id)
    }

    /// Creates a container.
    pub async fn create(&self, config: v1::ContainerConfig) -> Result<String> {
        let id = self.pod.create(config).await?;
        self.volatile.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), "<container>");
        Ok(id)
    }

    /// An ordinary container that stays, for execs; the same for all cases of a group.
    pub async fn sleeper(&self) -> Result<String> {
        let start = async || self.run(shell("sleeper", "exec sleep 3600")).await;
        self.sleeper.get_or_try_init(start).await.cloned()
    }

    /// Runs a container to its end.
    pub async fn run_to_end(&self, config: v1::ContainerConfig) -> Result<(String, v1::ContainerStatus)> {
        let id = self.run(config).await?;
        let status = self.wait_exit(&id, PATIENCE).await?;
        Ok((id, status))
    }

    /// Waits until a container's log contains a text; needs no container that goes on.
    pub async fn wait_log(&self, config: &v1::ContainerConfig, text: &str) -> Result<()> {
        self.wait_log_within(config, text, PATIENCE).await
    }

    /// The same, for what may take longer.
    pub async fn wait_log_within(&self, config: &v1::ContainerConfig, text: &str, limit: Duration) -> Result<()> {
        let watch = LogWatch::new(Path::new(&self.config.log_directory), &config.log_path)?;
        watch.contains(text.to_owned(), limit).await
    }

    /// A container's log so far, of one stream.
    pub async fn text(&self, container: &str, stream: &str) -> Result<String> {
        Ok(log::text_of(&self.log(container).await?, stream))
    }

    /// A container's log as tags and texts, without times.
    pub async fn tagged_log(&self, container: &str) -> Result<String> {
        let lines = self.log(container).await?;
        let line = |line: &log::Line| {
            let tag = if line.complete { "F" } else { "P" };
            format!("{} {tag} {}\n", line.stream, line.text)
        };
        Ok(lines.iter().map(line).collect())
    }

    /// Executes a shell script whatever its exit code.
    pub async fn shell(&self, container: &str, script: &str) -> Result<ExecOutput> {
        self.exec(container, &["/bin/sh", "-c", script]).await
    }

    /// Runs a shell command on the node and says what came of it.
    pub async fn on_node(&self, script: String) -> Result<String> {
        let command = move || std::process::Command::new("/bin/sh").args(["-c", &script]).output();
        let output = tokio::task::spawn_blocking(command).await.context("the command panicked")??;
        let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let code = output.status.code().unwrap_or(-1);
        Ok(format!("exit code: {code}\n{out}{errors}"))
    }

    /// Takes out of an observation what is different in every run: this pod's ids, addresses and directories.
    pub fn normalise(&self, text: &str) -> String {
        let volatile = self.volatile.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names: Vec<_> = volatile.iter().collect();
        // A directory's name may contain another's: the longer one first.
        names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        names.into_iter().fold(text.to_owned(), |text, (name, stand_in)| text.replace(name.as_str(), stand_in))
    }
}

/// The fields of a status that do not depend on the run. containerd's own note of the start may come after a quick end.
pub fn ending(status: &v1::ContainerStatus) -> String {
    let in_order =
        status.created_at > 0 && status.started_at > status.created_at && status.finished_at > status.created_at;
    format!(
        "state: {:?}\nexit code: {}\nreason: {}\nmessage: {}\ntimes in order: {in_order}\n",
        status.state(),
        status.exit_code,
        status.reason,
        status.message,
    )
}

/// An ext4 with room for the volumes of a group, gone with the value.
pub struct Disk {
    directory: PathBuf,
    image: PathBuf,
}

impl Disk {
    /// Makes and mounts it at a directory.
    pub fn new(directory: PathBuf) -> Result<Self> {
        const SIZE: &str = "1G";
        std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        let image = directory.with_extension("ext4");
        let (at, file) = (directory.to_string_lossy().into_owned(), image.to_string_lossy().into_owned());
        crate::node_command("mkfs.ext4", &["-q", "-F", &file, SIZE])?;
        crate::node_command("mount", &["-o", "loop", &file, &at])?;
        Ok(Self { directory, image })
    }

    /// Takes off what cases have mounted on it; pods that run may still have it.
    pub fn clear(&self) -> Result<()> {
        let list = format!("findmnt -Rlno TARGET {}", self.directory.display());
        crate::node_command("sh", &["-c", &format!("{list} | tail -n +2 | tac | xargs -r umount -l")]).map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = crate::node_command("umount", &["-R", &self.directory.to_string_lossy()]);
        let _ = std::fs::remove_file(&self.image);
    }
}
