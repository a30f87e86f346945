//! Volumes that the kubelet updates: the guest keeps copies, and each new version is told to it (agent.proto,
//! `CopiedVolume`). The kubelet switches versions by renaming `..data`, which inotify(7) reports.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent::CopiedVolume;
use bulkhead_protocol::guest::DATA_LINK;
use rustix::fs::inotify::WatchFlags;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

use super::agent::{Agent, AgentError};
use super::inotify::Inotify;
use crate::deadlines::{Deadline, Operation};
use crate::host_files::{self, HostFilesError, OneEach};
use crate::retry::GrowingPause;
use crate::spec::GuestVolume;

/// The followed volumes of a pod.
#[derive(Debug)]
pub struct FollowedVolumes {
    inotify: Inotify,
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
    /// None yet.
    pub fn new(inotify: Inotify) -> Self {
        Self { inotify, follower: Mutex::default() }
    }

    /// Begins to follow those of a container that are to be copied, and answers which version each has. Nothing is told
    /// to the guest before [`Self::activate`].
    pub async fn add(
        &self,
        deadline: Deadline,
        agent: &Agent,
        container: &str,
        volumes: &[GuestVolume],
    ) -> Result<Vec<CopiedVolume>, HostFilesError> {
        let copied = volumes.iter().filter(|volume| volume.host.copied);
        let mut copied: Vec<(u64, PathBuf)> =
            copied.map(|GuestVolume { host, number }| (*number, host.source.clone())).collect();
        // A container may bind one in several ways. It has one copy of it.
        copied.sort_by_key(|(number, _)| *number);
        copied.dedup_by_key(|(number, _)| *number);
        if copied.is_empty() {
            return Ok(Vec::new());
        }
        let watch = match self.watch(agent) {
            Ok(watch) => watch,
            Err(error) => return Ok(copied.iter().map(|(number, dir)| unfollowed(&error, *number, dir)).collect()),
        };
        let (abandoned, its_container) = (watch.clone(), container.to_owned());
        let container = container.to_owned();
        let add = move || {
            let followed = copied.iter().map(|(number, dir)| match watch.add(&container, *number, dir) {
                Ok(version) => CopiedVolume { number: *number, version, ..CopiedVolume::default() },
                Err(error) => unfollowed(&error, *number, dir),
            });
            followed.collect()
        };
        host_files::CONTAINERS.run_or_undo(deadline, add, move || abandoned.remove(&its_container)).await
    }

    fn watch(&self, agent: &Agent) -> io::Result<Arc<Watch>> {
        let mut follower = self.lock();
        if let Some(follower) = &*follower {
            return Ok(follower.watch.clone());
        }
        let watch = Arc::new(Watch::new(self.inotify.clone()));
        let task = tokio::spawn(follow(watch.clone(), self.inotify.changes()?, agent.clone()));
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

/// A volume of which the guest has the version that it finds, and no later one.
fn unfollowed(error: &io::Error, number: u64, dir: &Path) -> CopiedVolume {
    let dir = dir.display();
    tracing::warn!(%error, %dir, "cannot watch a ConfigMap, Secret or other projected volume: its updates raise no inotify events in the guest; is fs.inotify.max_user_instances of the node too low?");
    CopiedVolume { number, ..CopiedVolume::default() }
}

/// Tells the guest of each version. What it does not take is tried again after a pause that grows, and with the next change of
/// whichever volume: a token that comes too late is an outage of whoever uses it.
async fn follow(watch: Arc<Watch>, mut changes: watch::Receiver<()>, agent: Agent) {
    let (looking, mut growing, mut pause) = (OneEach::default(), GrowingPause::default(), None::<Duration>);
    loop {
        let changed = match pause {
            None => watch.changed(&mut changes).await,
            // The pause is over.
            Some(pause) => tokio::time::timeout(pause, watch.changed(&mut changes)).await.unwrap_or(Ok(())),
        };
        if changed.is_err() {
            return;
        }
        pause = match carry(&watch, &agent, &looking).await {
            Ok(true) => {
                growing.worked();
                None
            }
            Ok(false) => Some(growing.failed()),
            Err(error) => return tracing::debug!(%error, "no more updates of volumes"),
        };
    }
}

/// Tells the guest what it does not know. Answers whether it knows all then; fails if it cannot be told any more.
async fn carry(watch: &Arc<Watch>, agent: &Agent, looking: &OneEach<()>) -> Result<bool, AgentError> {
    let look = {
        let watch = watch.clone();
        move || watch.updates()
    };
    let updates = match looking.run((), Deadline::begin(Operation::LookAtVolumes), look).await {
        Ok(updates) => updates,
        Err(error) => {
            tracing::warn!(%error, "cannot look for updates of the pod's volumes");
            return Ok(false);
        }
    };
    let mut all = true;
    for (container, volume) in updates {
        match agent.update_volume(Deadline::begin(Operation::UpdateVolume), &container, volume.clone()).await {
            Ok(()) => watch.taken(&container, volume),
            Err(error @ (AgentError::Refused { .. } | AgentError::Silent(_))) => {
                tracing::warn!(%error, container, "the guest does not take a volume's update yet");
                all = false;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// What is watched.
#[derive(Debug)]
struct Watch {
    inotify: Inotify,
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
    fn new(inotify: Inotify) -> Self {
        Self { inotify, activated: Notify::new(), entries: Mutex::default() }
    }

    fn add(&self, container: &str, number: u64, dir: &Path) -> io::Result<String> {
        let descriptor = self.inotify.add(dir, WatchFlags::MOVED_TO | WatchFlags::ONLYDIR)?;
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
            self.inotify.remove(entry.descriptor);
        }
        *entries = kept;
    }

    /// Returns when a version may have changed: which directory it was does not matter, all are looked at.
    async fn changed(&self, changes: &mut watch::Receiver<()>) -> Result<(), watch::error::RecvError> {
        tokio::select! {
            () = self.activated.notified() => Ok(()),
            changed = changes.changed() => changed,
        }
    }

    /// What the guest does not know yet. Blocks as long as the file systems of the volumes do; nothing is locked meanwhile.
    fn updates(&self) -> Vec<(String, CopiedVolume)> {
        let known = |entry: &Entry| (entry.container.clone(), entry.number, entry.dir.clone(), entry.version.clone());
        let active: Vec<_> = self.entries().iter().filter(|entry| entry.active).map(known).collect();
        let mut updates = Vec::new();
        for (container, number, dir, known) in active {
            if let Some(version) = version(&dir).filter(|version| *version != known) {
                updates.push((container, CopiedVolume { number, version, ..CopiedVolume::default() }));
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
    use crate::sandbox::fake::FakeAgent;
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
        let watch = Watch::new(Inotify::default());
        let mut changes = watch.inotify.changes().unwrap();
        assert_eq!(watch.add("a", 0, dir.path()).unwrap(), "..1");
        assert_eq!(watch.add("b", 3, dir.path()).unwrap(), "..1");
        watch.activate("a");
        watch.activate("b");
        watch.changed(&mut changes).await.unwrap();
        assert!(watch.updates().is_empty());
        switch(dir.path(), "..2");
        watch.changed(&mut changes).await.unwrap();
        let updates = watch.updates();
        let told: Vec<_> = updates.iter().map(|(id, volume)| (&**id, volume.number, &*volume.version)).collect();
        assert_eq!(told, [("a", 0, "..2"), ("b", 3, "..2")]);
        updates.into_iter().for_each(|(id, volume)| watch.taken(&id, volume));
        assert!(watch.updates().is_empty());
        // One of two users of the directory leaves; the other is still told.
        watch.remove("a");
        switch(dir.path(), "..3");
        watch.changed(&mut changes).await.unwrap();
        assert_eq!(watch.updates().len(), 1);
    }

    #[tokio::test]
    async fn an_update_before_the_container_exists_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        switch(dir.path(), "..1");
        let watch = Watch::new(Inotify::default());
        let mut changes = watch.inotify.changes().unwrap();
        watch.add("a", 0, dir.path()).unwrap();
        switch(dir.path(), "..2");
        watch.changed(&mut changes).await.unwrap();
        assert!(watch.updates().is_empty());
        watch.activate("a");
        watch.changed(&mut changes).await.unwrap();
        assert_eq!(watch.updates().len(), 1);
    }

    /// A pod whose containers, `a` and `b`, have a volume each.
    async fn pod_with_volumes(dir: &Path) -> (Arc<Sandbox>, Arc<FakeAgent>, [PathBuf; 2]) {
        let (sandbox, guest) = Sandbox::fake(dir).await;
        let sources = ["one", "two"].map(|name| dir.join(name));
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
            let deadline = Deadline::begin(Operation::CreateContainer);
            let volume = GuestVolume { host, number: 7 };
            sandbox.volumes.add(deadline, &sandbox.agent, container, &[volume]).await.unwrap();
            sandbox.volumes.activate(container);
        }
        (sandbox, guest, sources)
    }

    #[tokio::test]
    async fn guest_that_does_not_take_a_version_is_told_again_with_the_next_change() {
        let dir = tempfile::tempdir().unwrap();
        let (_sandbox, guest, sources) = pod_with_volumes(dir.path()).await;
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
        let deadline = Deadline::begin(Operation::CreateContainer);
        let copied = sandbox.volumes.add(deadline, &sandbox.agent, "c", &volumes).await.unwrap();
        let copied: Vec<_> = copied.iter().map(|volume| (volume.number, &*volume.version)).collect();
        assert_eq!(copied, [(7, "..1")]);
    }

    #[tokio::test]
    async fn version_that_the_guest_has_refused_or_not_answered_is_told_again_though_nothing_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (_sandbox, guest, sources) = pod_with_volumes(dir.path()).await;
        guest.refuse("UpdateVolume");
        switch(&sources[0], "..2");
        guest.called("UpdateVolume a/7 ..2", 1).await;
        // The first pauses are short.
        guest.hold("UpdateVolume");
        guest.called("UpdateVolume a/7 ..2", 2).await;
        tokio::time::pause();
        tokio::time::advance(Operation::UpdateVolume.budget() + Duration::from_secs(1)).await;
        // Until who waits for the answer has seen that its time is over.
        tokio::time::sleep(Duration::from_millis(1)).await;
        tokio::time::resume();
        guest.accept("UpdateVolume");
        guest.release("UpdateVolume");
        guest.called("UpdateVolume a/7 ..2", 3).await;
        // What has been taken is not told again.
        switch(&sources[1], "..2");
        guest.called("UpdateVolume b/7 ..2", 1).await;
        assert_eq!(guest.calls("UpdateVolume a/7 ..2"), 3);
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
