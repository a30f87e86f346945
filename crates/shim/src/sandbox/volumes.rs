//! Volumes that the kubelet updates: the guest keeps copies, and each new version is told to it (agent.proto,
//! `CopiedVolume`). The kubelet switches versions by renaming `..data`, which inotify(7) reports.
//!
//! A pod needs one inotify instance, made with its first such volume.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::agent::CopiedVolume;
use bulkhead_protocol::guest::DATA_LINK;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::net::unix::pipe;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::agent::{Agent, AgentError};
use crate::spec::GuestVolume;

/// The followed volumes of a pod.
#[derive(Debug, Default)]
pub struct FollowedVolumes {
    follower: Mutex<Option<Follower>>,
}

/// Carries versions to the guest until it is dropped or the guest is gone.
#[derive(Debug)]
struct Follower {
    watch: Arc<Watch>,
    task: JoinHandle<()>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FollowedVolumes {
    /// Begins to follow those of a container that are to be copied, and answers which version each has. Nothing is told
    /// to the guest before [`Self::activate`].
    pub fn add(&self, agent: &Agent, container: &str, volumes: &[GuestVolume]) -> Vec<CopiedVolume> {
        let mut copied: Vec<_> = volumes.iter().filter(|volume| volume.host.copied).collect();
        // A container may bind one in several ways. It has one copy of it.
        copied.sort_by_key(|volume| volume.number);
        copied.dedup_by_key(|volume| volume.number);
        let followed = copied.into_iter().map(|GuestVolume { host, number }| {
            let version = self.watch(agent).and_then(|watch| watch.add(container, *number, &host.source));
            let version = version.unwrap_or_else(|error| {
                let dir = host.source.display();
                tracing::warn!(%error, %dir, "updates of a volume raise no events in the guest; fs.inotify.max_user_instances may be too low");
                String::new()
            });
            CopiedVolume { number: *number, version, ..CopiedVolume::default() }
        });
        followed.collect()
    }

    fn watch(&self, agent: &Agent) -> io::Result<Arc<Watch>> {
        let mut follower = self.lock();
        if let Some(follower) = &*follower {
            return Ok(follower.watch.clone());
        }
        let watch = Arc::new(Watch::new()?);
        let task = tokio::spawn(follow(watch.clone(), agent.clone()));
        *follower = Some(Follower { watch: watch.clone(), task });
        Ok(watch)
    }

    /// The container exists in the guest, which is told of updates from now on, and of those since [`Self::add`].
    pub fn activate(&self, container: &str) {
        if let Some(follower) = &*self.lock() {
            follower.watch.activate(container);
        }
    }

    /// Follows a container's volumes no longer.
    pub fn remove(&self, container: &str) {
        if let Some(follower) = &*self.lock() {
            follower.watch.remove(container);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Follower>> {
        self.follower.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the guest of each version. What it does not take is tried again with the next change, of whichever volume.
async fn follow(watch: Arc<Watch>, agent: Agent) {
    while watch.changed().await.is_ok() {
        for (container, volume) in watch.updates() {
            match agent.update_volume(&container, volume.clone()).await {
                Ok(()) => watch.taken(&container, volume),
                Err(error @ (AgentError::Refused { .. } | AgentError::Silent(_))) => {
                    tracing::warn!(%error, container, "the guest does not take a volume's update");
                }
                Err(error) => {
                    tracing::debug!(%error, "no more updates of volumes");
                    return;
                }
            }
        }
    }
}

/// An inotify instance and what it watches.
#[derive(Debug)]
struct Watch {
    /// Not a pipe, but what it takes to read a descriptor once it is readable.
    inotify: pipe::Receiver,
    activated: Notify,
    entries: Mutex<Vec<Entry>>,
}

/// One volume of one container.
#[derive(Debug)]
struct Entry {
    container: String,
    /// The volume's, in the share.
    number: u64,
    dir: PathBuf,
    /// inotify's name for the directory; the same for every entry of it.
    descriptor: i32,
    /// What the guest knows.
    version: String,
    active: bool,
}

impl Watch {
    fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        Ok(Self {
            inotify: pipe::Receiver::from_owned_fd_unchecked(inotify)?,
            activated: Notify::new(),
            entries: Mutex::default(),
        })
    }

    fn add(&self, container: &str, number: u64, dir: &Path) -> io::Result<String> {
        let flags = WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        let descriptor = inotify::add_watch(&self.inotify, dir, flags)?;
        // Read after the watch is set, so that no version is missed.
        let version = version(dir).unwrap_or_default();
        self.entries().push(Entry {
            container: container.to_owned(),
            number,
            dir: dir.to_path_buf(),
            descriptor,
            version: version.clone(),
            active: false,
        });
        Ok(version)
    }

    fn activate(&self, container: &str) {
        self.entries().iter_mut().filter(|entry| entry.container == container).for_each(|entry| entry.active = true);
        self.activated.notify_one();
    }

    fn remove(&self, container: &str) {
        let mut entries = self.entries();
        let (gone, kept): (Vec<_>, Vec<_>) = entries.drain(..).partition(|entry| entry.container == container);
        for entry in gone.iter().filter(|gone| kept.iter().all(|kept| kept.descriptor != gone.descriptor)) {
            // The kernel has removed it already if the directory is gone.
            let _ = inotify::remove_watch(&self.inotify, entry.descriptor);
        }
        *entries = kept;
    }

    /// Returns when a version may have changed.
    async fn changed(&self) -> io::Result<()> {
        tokio::select! {
            () = self.activated.notified() => Ok(()),
            ready = self.inotify.readable() => {
                ready?;
                // Which directory it was does not matter: all are looked at.
                match self.inotify.try_read(&mut [0; 4096]) {
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
                    _ => Ok(()),
                }
            }
        }
    }

    /// What the guest does not know yet.
    fn updates(&self) -> Vec<(String, CopiedVolume)> {
        let mut updates = Vec::new();
        for entry in self.entries().iter().filter(|entry| entry.active) {
            if let Some(version) = version(&entry.dir).filter(|version| *version != entry.version) {
                let volume = CopiedVolume { number: entry.number, version, ..CopiedVolume::default() };
                updates.push((entry.container.clone(), volume));
            }
        }
        updates
    }

    /// The guest knows a version from now on.
    fn taken(&self, container: &str, volume: CopiedVolume) {
        let mut entries = self.entries();
        let entry = entries.iter_mut().find(|entry| entry.container == container && entry.number == volume.number);
        if let Some(entry) = entry {
            entry.version = volume.version;
        }
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What `..data` names; `None` if the volume is not laid out like that.
fn version(dir: &Path) -> Option<String> {
    let target = std::fs::read_link(dir.join(DATA_LINK)).ok()?;
    let name = target.to_str()?;
    (target.components().count() == 1 && target.file_name()? == target).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Sandbox;
    use crate::spec::{Access, Volume};
    use std::os::unix::fs::symlink;

    fn switch(dir: &Path, version: &str) {
        std::fs::create_dir(dir.join(version)).unwrap();
        symlink(version, dir.join("..data_tmp")).unwrap();
        std::fs::rename(dir.join("..data_tmp"), dir.join(DATA_LINK)).unwrap();
    }

    #[tokio::test]
    async fn each_container_is_told_of_a_version_once() {
        let dir = tempfile::tempdir().unwrap();
        switch(dir.path(), "..1");
        let watch = Watch::new().unwrap();
        assert_eq!(watch.add("a", 0, dir.path()).unwrap(), "..1");
        assert_eq!(watch.add("b", 3, dir.path()).unwrap(), "..1");
        watch.activate("a");
        watch.activate("b");
        watch.changed().await.unwrap();
        assert!(watch.updates().is_empty());
        switch(dir.path(), "..2");
        watch.changed().await.unwrap();
        let updates = watch.updates();
        let told: Vec<_> = updates.iter().map(|(id, volume)| (&**id, volume.number, &*volume.version)).collect();
        assert_eq!(told, [("a", 0, "..2"), ("b", 3, "..2")]);
        updates.into_iter().for_each(|(id, volume)| watch.taken(&id, volume));
        assert!(watch.updates().is_empty());
        // One of two users of the directory leaves; the other is still told.
        watch.remove("a");
        switch(dir.path(), "..3");
        watch.changed().await.unwrap();
        assert_eq!(watch.updates().len(), 1);
    }

    #[tokio::test]
    async fn an_update_before_the_container_exists_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        switch(dir.path(), "..1");
        let watch = Watch::new().unwrap();
        watch.add("a", 0, dir.path()).unwrap();
        switch(dir.path(), "..2");
        watch.changed().await.unwrap();
        assert!(watch.updates().is_empty());
        watch.activate("a");
        watch.changed().await.unwrap();
        assert_eq!(watch.updates().len(), 1);
    }

    #[tokio::test]
    async fn guest_that_does_not_take_a_version_is_told_again_with_the_next_change() {
        let dir = tempfile::tempdir().unwrap();
        let (sandbox, guest) = Sandbox::fake(dir.path()).await;
        let sources = ["one", "two"].map(|name| dir.path().join(name));
        for (container, source) in ["a", "b"].into_iter().zip(&sources) {
            std::fs::create_dir(source).unwrap();
            switch(source, "..1");
            let host = Volume {
                source: source.clone(),
                recursive: true,
                access: Access::ReadOnly,
                follows_host: false,
                copied: true,
                scratch: false,
                mapped_by: None,
            };
            sandbox.volumes.add(&sandbox.agent, container, &[GuestVolume { host, number: 7 }]);
            sandbox.volumes.activate(container);
        }
        guest.hold("UpdateVolume");
        switch(&sources[0], "..2");
        guest.called("UpdateVolume a/7 ..2", 1).await;
        tokio::time::pause();
        tokio::time::advance(std::time::Duration::from_secs(61)).await;
        tokio::time::resume();
        guest.release("UpdateVolume");
        guest.refuse("UpdateVolume");
        switch(&sources[1], "..2");
        guest.called("UpdateVolume a/7 ..2", 2).await;
        guest.called("UpdateVolume b/7 ..2", 1).await;
        guest.accept("UpdateVolume");
        switch(&sources[0], "..3");
        guest.called("UpdateVolume a/7 ..3", 1).await;
        guest.called("UpdateVolume b/7 ..2", 2).await;
    }

    #[tokio::test]
    async fn container_has_one_copy_of_a_volume_that_it_binds_twice() {
        let dir = tempfile::tempdir().unwrap();
        let (sandbox, _guest) = Sandbox::fake(dir.path()).await;
        let source = dir.path().join("map");
        std::fs::create_dir(&source).unwrap();
        switch(&source, "..1");
        let given = |recursive, copied, number| {
            let (source, access) = (source.clone(), Access::ReadOnly);
            let (follows_host, scratch, mapped_by) = (false, false, None);
            let host = Volume { source, recursive, access, follows_host, copied, scratch, mapped_by };
            GuestVolume { host, number }
        };
        let volumes = [given(true, true, 7), given(true, false, 8), given(false, true, 7)];
        let copied = sandbox.volumes.add(&sandbox.agent, "c", &volumes);
        let copied: Vec<_> = copied.iter().map(|volume| (volume.number, &*volume.version)).collect();
        assert_eq!(copied, [(7, "..1")]);
    }

    #[test]
    fn a_volume_of_another_layout_has_no_version() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(version(dir.path()), None);
        symlink("../elsewhere", dir.path().join(DATA_LINK)).unwrap();
        assert_eq!(version(dir.path()), None);
        std::fs::remove_file(dir.path().join(DATA_LINK)).unwrap();
        symlink("..", dir.path().join(DATA_LINK)).unwrap();
        assert_eq!(version(dir.path()), None);
    }
}
