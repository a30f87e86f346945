//! Asks the shim for more memory before the pod needs it, and to take back what it has not needed for a while.
//!
//! A group over its memory.high is not killed: the kernel reclaims what it can and makes the processes wait, and says so by
//! an event (Documentation/admin-guide/cgroup-v2.rst). So the containers' common group has that a step below what the guest
//! has, and by the time that a process has waited some milliseconds there is more. When there is no more to be had the
//! mark is taken away, for a process that waits in vain is worse off than one that is killed.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_protocol::agent::{Demand, DemandRequest};
use tokio::sync::watch;

use crate::cgroup;
use crate::cgroup::notify::KernfsFile;
use crate::cgroup::values::flat_keyed;

/// Time between the two looks that must find memory of no use before it is given back. It costs the host next to nothing
/// meanwhile: pages that are free go back at once.
const UNUSED_BEFORE_SHRINKING: Duration = Duration::from_secs(15);
/// How long a refusal holds. The node may have something again at any time, and says so to nobody; no process waits for it.
const REFUSAL_HOLDS: Duration = Duration::from_secs(10);

/// Time from one event that needed nothing to the next look: a container that reads many files is at the mark all the time,
/// and one that takes memory meanwhile waits so much longer.
const TIME_BETWEEN_LOOKS: Duration = Duration::from_millis(100);

const MIB: u64 = 1 << 20;

/// What of the guest's memory the containers cannot have: that of the kernel and the agent, and some to work with while
/// more is plugged.
const RESERVED_FOR_GUEST: u64 = 64 * MIB;

/// Amounts at which something is done, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Marks {
    /// The containers' memory.high. The more there is, the more is left for the pages' descriptors of as much again, which are
    /// a 64th of it.
    high: u64,
    /// A working set that needs more: what is missing to `high` is for files that are worth keeping.
    more: u64,
    /// A working set that would fit into half of it.
    less: u64,
}

impl Marks {
    /// Of a guest with so much memory for others than the users of huge pages.
    fn of(bytes: u64) -> Self {
        let high = bytes.saturating_sub(bytes / 16 + RESERVED_FOR_GUEST).max(bytes / 2);
        Self { high, more: high - bytes / 8, less: bytes / 4 }
    }
}

/// What is known of the guest's memory.
#[derive(Debug, Default)]
struct State {
    /// MiB, as the shim says.
    size_mib: u64,
    /// Whether processes wait at the mark.
    marked: bool,
    /// The content of memory.high, once that has been written.
    written: Option<String>,
}

/// The containers' memory.
#[derive(Debug)]
pub struct Memory {
    /// Their common group.
    group: PathBuf,
    /// Held while memory.high is written, which takes as long as the kernel reclaims.
    state: Mutex<State>,
    /// Changes with the size.
    resized: watch::Sender<()>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { group: cgroup::pod_dir(), state: Mutex::default(), resized: watch::Sender::default() }
    }
}

impl Memory {
    /// Notes what the guest has or is about to have; 0 leaves it. Waits for the kernel.
    pub fn resize(&self, mib: u64) -> Result<(), MemoryError> {
        if mib == 0 {
            return Ok(());
        }
        let mut state = self.state();
        state.size_mib = mib;
        self.apply(&mut state)?;
        drop(state);
        self.resized.send_replace(());
        Ok(())
    }

    /// Returns with what the pod needs next.
    pub async fn next(self: &Arc<Self>, request: &DemandRequest) -> Result<Demand, MemoryError> {
        let mut resized = self.resized.subscribe();
        if request.refused {
            self.mark(false).await?;
            let _ = tokio::time::timeout(REFUSAL_HOLDS, resized.changed()).await;
        }
        // Of the group itself: those below have limits of their own.
        let path = self.group.join("memory.events.local");
        let fail = |source| MemoryError::Read { path: path.clone(), source };
        let mut events = KernfsFile::open(&path).map_err(fail)?;
        let (mut idle, mut told) = (false, false);
        loop {
            // Before the look, so that nothing is missed.
            events.read().map_err(fail)?;
            let marks = self.marks()?;
            let working_set = self.working_set()?;
            if working_set > marks.more {
                return Ok(demand(false));
            }
            self.mark(true).await?;
            if std::mem::take(&mut told) {
                tokio::time::sleep(TIME_BETWEEN_LOOKS).await;
            }
            let for_a_while = async {
                if request.may_shrink {
                    tokio::time::sleep(UNUSED_BEFORE_SHRINKING).await;
                } else {
                    std::future::pending().await
                }
            };
            tokio::select! {
                changed = events.changed() => {
                    changed.map_err(fail)?;
                    told = true;
                }
                _ = resized.changed() => {}
                () = for_a_while => {
                    let was_idle = std::mem::replace(&mut idle, self.working_set()? < self.marks()?.less);
                    if idle && was_idle {
                        return Ok(demand(true));
                    }
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes processes wait at the mark, or no longer.
    async fn mark(self: &Arc<Self>, marked: bool) -> Result<(), MemoryError> {
        if self.state().marked == marked {
            return Ok(());
        }
        let memory = Arc::clone(self);
        let apply = move || {
            let mut state = memory.state();
            state.marked = marked;
            memory.apply(&mut state)
        };
        tokio::task::spawn_blocking(apply).await.unwrap_or(Ok(()))
    }

    fn apply(&self, state: &mut State) -> Result<(), MemoryError> {
        let content = if state.marked { Marks::of(usable(state.size_mib)).high.to_string() } else { "max".to_owned() };
        // The kernel begins with "max".
        if state.written.as_deref().unwrap_or("max") != content {
            let path = self.group.join("memory.high");
            std::fs::write(&path, &content).map_err(|source| MemoryError::Write { path, source })?;
            state.written = Some(content);
        }
        Ok(())
    }

    fn marks(&self) -> Result<Marks, MemoryError> {
        match self.state().size_mib {
            0 => Err(MemoryError::Unknown),
            mib => Ok(Marks::of(usable(mib))),
        }
    }

    /// What the containers use but for files that have been read once and what the kernel can drop, in bytes: what the kubelet calls
    /// the working set.
    fn working_set(&self) -> Result<u64, MemoryError> {
        let read = |name| {
            let path = self.group.join(name);
            std::fs::read_to_string(&path).map_err(|source| MemoryError::Read { path, source })
        };
        let current = read("memory.current")?.trim().parse().unwrap_or(0u64);
        let stat = read("memory.stat")?;
        let dropped = flat_keyed(&stat).filter(|(key, _)| ["inactive_file", "slab_reclaimable"].contains(key));
        Ok(current.saturating_sub(dropped.map(|(_, bytes)| bytes).sum()))
    }
}

fn demand(less: bool) -> Demand {
    Demand { less, ..Demand::default() }
}

/// What of a guest's memory is not set aside for huge pages, in bytes.
fn usable(mib: u64) -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    (mib * MIB).saturating_sub(set_aside(&meminfo))
}

/// Bytes of all pools of huge pages (proc_meminfo(5)).
fn set_aside(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("Hugetlb:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

/// The guest's memory cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The shim has not said.
    #[error("the size of the guest's memory is not known; the shim tells it with CreateSandbox")]
    Unknown,
    /// A file of the group.
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    /// memory.high.
    #[error("cannot make processes wait for memory by {path}")]
    Write { path: PathBuf, source: io::Error },
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A group that is a plain directory, with a working set.
    fn memory(dir: &Path, size_mib: u64) -> Memory {
        let memory = Memory { group: dir.to_owned(), ..Memory::default() };
        memory.resize(size_mib).unwrap();
        memory
    }

    fn high(dir: &Path) -> u64 {
        std::fs::read_to_string(dir.join("memory.high")).unwrap().parse().unwrap()
    }

    #[test]
    fn marks_leave_room_for_the_kernel_and_for_the_descriptors_of_as_much_again() {
        for mib in [64, 256, 512, 4 << 10, 1 << 20] {
            let marks = Marks::of(mib * MIB);
            assert!(marks.less < marks.more && marks.more < marks.high && marks.high < mib * MIB, "{mib}: {marks:?}");
            assert!(mib < 256 || marks.high + mib * MIB / 64 + RESERVED_FOR_GUEST / 2 < mib * MIB, "{mib}: {marks:?}");
            // What has just been doubled is not halved again, and the other way round.
            assert!(mib < 256 || Marks::of(2 * mib * MIB).less <= marks.more, "{mib}: {marks:?}");
            assert!(mib < 256 || marks.less * 2 <= marks.more + mib * MIB / 8, "{mib}: {marks:?}");
        }
        assert_eq!(Marks::of(256 * MIB), Marks { high: 176 * MIB, more: 144 * MIB, less: 64 * MIB });
    }

    #[test]
    fn huge_pages_are_set_aside() {
        assert_eq!(set_aside("MemTotal: 9 kB\nHugetlb:          8192 kB\n"), 8 * MIB);
        assert_eq!(set_aside(""), 0);
    }

    #[tokio::test]
    async fn mark_is_there_while_there_is_more_to_be_had_and_follows_the_size() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Arc::new(memory(dir.path(), 256));
        assert!(!dir.path().join("memory.high").exists(), "nobody listens yet");
        memory.mark(true).await.unwrap();
        assert_eq!(high(dir.path()), Marks::of(usable(256)).high);
        memory.resize(512).unwrap();
        assert!(high(dir.path()) > 256 * MIB);
        memory.resize(0).unwrap();
        assert!(high(dir.path()) > 256 * MIB);
        memory.mark(false).await.unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("memory.high")).unwrap(), "max");
    }

    #[test]
    fn working_set_is_without_what_the_kernel_can_drop() {
        let dir = tempfile::tempdir().unwrap();
        let memory = memory(dir.path(), 256);
        std::fs::write(dir.path().join("memory.current"), "1000\n").unwrap();
        std::fs::write(dir.path().join("memory.stat"), "anon 1\ninactive_file 300\nslab_reclaimable 100\nfile 9\n")
            .unwrap();
        assert_eq!(memory.working_set().unwrap(), 600);
    }
}
