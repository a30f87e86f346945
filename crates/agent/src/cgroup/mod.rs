//! One container's control group (cgroup v2, Documentation/admin-guide/cgroup-v2.rst).
//!
//! The hierarchy has two children: the agent's own leaf, and `pod`, whose children are the containers'. libcontainer puts
//! processes into a container's group when it creates them; everything after that is done here, by files and by the
//! kernel's notifications on them, never by trying again after a while.

mod devices;
pub mod notify;
pub mod stats;
pub mod values;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_bpf::ProgramType;
use bulkhead_protocol::error::chain;
use libcgroups::common::{CgroupManager, ControllerOpt};
use libcgroups::v2::manager::Manager;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};

use crate::{guest_time, sys};
use notify::KernfsFile;

/// Where cgroup v2 is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
/// The agent's own leaf, below [`ROOT`].
const AGENT: &str = "agent";
/// Parent of the containers' groups, below [`ROOT`].
const POD: &str = "pod";

/// How long the kernel may take to freeze or empty a group. Both are quick unless a process sits in an uninterruptible
/// wait (a share whose host does not answer), and then the caller must hear of it before it gives up (20 s).
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Depth to which containers can make groups below their own, and to which these are followed.
const MAX_DEPTH: usize = 16;

/// Splits the root group into the agent's leaf and the pod's parent, with every controller enabled on the way down.
pub fn prepare_hierarchy() -> Result<(), CgroupError> {
    let root = Path::new(ROOT);
    for name in [AGENT, POD] {
        let dir = root.join(name);
        match std::fs::create_dir(&dir) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(CgroupError::Create { path: dir, source });
            }
            _ => {}
        }
    }
    write(&root.join(AGENT).join("cgroup.procs"), &std::process::id().to_string())?;
    let controllers = read(&root.join("cgroup.controllers"))?;
    let enable: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    for dir in [root.to_path_buf(), root.join(POD)] {
        write(&dir.join("cgroup.subtree_control"), &enable.join(" "))?;
    }
    // Here, where no container can change it: one may be able to write all that is in its own group. That is a level itself.
    write(&root.join(POD).join("cgroup.max.depth"), &(MAX_DEPTH + 1).to_string())
}

/// The group that holds the containers' groups.
pub fn pod_dir() -> PathBuf {
    Path::new(ROOT).join(POD)
}

/// Kills every process of every container and waits until they are gone.
pub async fn kill_pod() -> Result<(), CgroupError> {
    Cgroup { dir: pod_dir(), path: Path::new("/").join(POD) }.kill_and_wait().await
}

/// A container's group.
#[derive(Clone, Debug)]
pub struct Cgroup {
    dir: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// Makes the group. The id must be fit for a file name.
    pub fn create(container_id: &str) -> Result<Self, CgroupError> {
        let path = Path::new("/").join(POD).join(container_id);
        let dir = Path::new(ROOT).join(POD).join(container_id);
        std::fs::create_dir(&dir).map_err(|source| CgroupError::Create { path: dir.clone(), source })?;
        Ok(Self { dir, path })
    }

    /// The group as `linux.cgroupsPath` names it: absolute below the mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Applies a `linux.resources` object.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let manager = Manager::new(ROOT.into(), self.path.clone()).map_err(|error| self.refused(&error))?;
        let options = ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None };
        manager.apply(&options).map_err(|error| self.refused(&error))
    }

    fn refused(&self, error: &dyn std::error::Error) -> CgroupError {
        CgroupError::Update { path: self.dir.clone(), reason: chain(error) }
    }

    /// Lets the group's processes use the devices of these rules only, and those that every container has.
    pub fn restrict_devices(&self, rules: &[LinuxDeviceCgroup]) -> Result<(), CgroupError> {
        let program = devices::program(rules).ok_or_else(|| CgroupError::DeviceRules { path: self.dir.clone() })?;
        let attach = || {
            let program = bulkhead_bpf::load(ProgramType::CgroupDevice, &program)?;
            bulkhead_bpf::attach_to_cgroup(&program, &std::fs::File::open(&self.dir)?)
        };
        attach().map_err(|source| CgroupError::Devices { path: self.dir.clone(), source })
    }

    /// Freezes or thaws every process; returns when the kernel says that it is done.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let flag = if frozen { "1" } else { "0" };
        write(&self.dir.join("cgroup.freeze"), flag)?;
        self.wait_for_event("frozen", flag).await
    }

    /// Sends SIGKILL to every process, those that are being forked included.
    pub fn kill(&self) -> Result<(), CgroupError> {
        write(&self.dir.join("cgroup.kill"), "1")
    }

    /// Kills every process and waits until none is left. A group that does not exist has none.
    pub async fn kill_and_wait(&self) -> Result<(), CgroupError> {
        let killed = async {
            self.kill()?;
            self.wait_for_event("populated", "0").await
        };
        match killed.await {
            Err(CgroupError::Write { source, .. } | CgroupError::Read { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Sends a signal to every process. One that ends meanwhile is no error.
    pub fn signal_all(&self, signal: u32) -> Result<(), CgroupError> {
        for pid in self.processes()? {
            match sys::kill(pid, signal) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(CgroupError::Signal { pid, source: error });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The pids of the group and of all below it, as the agent's pid namespace numbers them.
    fn processes(&self) -> Result<BTreeSet<u32>, CgroupError> {
        let mut pids = BTreeSet::new();
        collect_processes(&self.dir, MAX_DEPTH, &mut pids)?;
        Ok(pids)
    }

    /// The group below this one that new processes must join, if the container has split its group up: a group that hands
    /// controllers down has no processes of its own, and theirs is then init's, as runc has it.
    pub fn group_for_exec(&self, init: u32) -> Option<String> {
        let control = read(&self.dir.join("cgroup.subtree_control")).ok()?;
        if control.trim().is_empty() {
            return None;
        }
        let groups = read(Path::new(&format!("/proc/{init}/cgroup"))).ok()?;
        let below =
            Path::new(groups.lines().find_map(|line| line.strip_prefix("0::"))?).strip_prefix(&self.path).ok()?;
        below.to_str().filter(|below| !below.is_empty()).map(str::to_owned)
    }

    /// Removes the group and those below it. They must be empty.
    pub fn remove(&self) -> Result<(), CgroupError> {
        remove_tree(&self.dir, MAX_DEPTH).map_err(|source| CgroupError::Remove { path: self.dir.clone(), source })
    }

    /// Starts to watch for processes that the kernel kills for want of memory. An error without the memory controller.
    pub fn watch_oom(&self) -> Result<OomWatch, CgroupError> {
        let path = self.dir.join("memory.events");
        match KernfsFile::open(&path) {
            Ok(file) => Ok(OomWatch { file, path, seen: 0 }),
            Err(source) => Err(CgroupError::Read { path, source }),
        }
    }

    /// Whether the kernel has killed any of its processes for want of memory.
    pub fn has_oom_kills(&self) -> bool {
        self.watch_oom().and_then(|mut watch| watch.look()).unwrap_or(false)
    }

    /// Waits until a key of `cgroup.events` has a value.
    async fn wait_for_event(&self, key: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.dir.join("cgroup.events");
        let error = |source| CgroupError::Read { path: path.clone(), source };
        let mut file = KernfsFile::open(&path).map_err(error)?;
        let wait = async {
            loop {
                let text = file.read().map_err(error)?;
                if text.lines().any(|line| line.split_once(' ') == Some((key, value))) {
                    return Ok(());
                }
                file.changed().await.map_err(error)?;
            }
        };
        let unsettled = || CgroupError::Unsettled { path: self.dir.clone() };
        guest_time::timeout(SETTLE_TIMEOUT, wait).await.ok_or_else(unsettled)?
    }
}

/// Counts out-of-memory kills in a group.
#[derive(Debug)]
pub struct OomWatch {
    file: KernfsFile,
    path: PathBuf,
    seen: u64,
}

impl OomWatch {
    /// Waits until processes have been killed since the last look.
    pub async fn killed(&mut self) -> Result<(), CgroupError> {
        while !self.look()? {
            let changed = self.file.changed().await;
            changed.map_err(|source| CgroupError::Read { path: self.path.clone(), source })?;
        }
        Ok(())
    }

    /// Whether processes have been killed since the last look.
    pub fn look(&mut self) -> Result<bool, CgroupError> {
        let text = self.file.read().map_err(|source| CgroupError::Read { path: self.path.clone(), source })?;
        let kills = values::flat_keyed(&text).find(|(key, _)| *key == "oom_kill").map_or(0, |(_, count)| count);
        let more = kills > self.seen;
        self.seen = kills;
        Ok(more)
    }
}

fn collect_processes(dir: &Path, depth: usize, pids: &mut BTreeSet<u32>) -> Result<(), CgroupError> {
    // Reading the processes of a threaded group is refused (EOPNOTSUPP); they show in the group above it.
    let path = dir.join("cgroup.procs");
    match std::fs::read_to_string(&path) {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(source) => return Err(CgroupError::Read { path, source }),
    }
    let Some(depth) = depth.checked_sub(1) else { return Ok(()) };
    for child in child_dirs(dir).map_err(|source| CgroupError::Read { path: dir.into(), source })? {
        match collect_processes(&child, depth, pids) {
            // The container may remove its own groups while they are walked.
            Err(CgroupError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

fn remove_tree(dir: &Path, depth: usize) -> io::Result<()> {
    if let Some(depth) = depth.checked_sub(1) {
        for child in child_dirs(dir)? {
            remove_tree(&child, depth)?;
        }
    }
    match std::fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn child_dirs(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    entries
        .filter(|entry| entry.as_ref().map_or(true, |entry| entry.file_type().is_ok_and(|kind| kind.is_dir())))
        .map(|entry| entry.map(|entry| entry.path()))
        .collect()
}

fn read(path: &Path) -> Result<String, CgroupError> {
    std::fs::read_to_string(path).map_err(|source| CgroupError::Read { path: path.into(), source })
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    std::fs::write(path, value).map_err(|source| CgroupError::Write { path: path.into(), value: value.into(), source })
}

/// A control group did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// mkdir(2).
    #[error("cannot create the control group {path}")]
    Create { path: PathBuf, source: io::Error },
    /// rmdir(2); a process is left in it.
    #[error("cannot remove the control group {path}")]
    Remove { path: PathBuf, source: io::Error },
    /// A file of the group cannot be read.
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    /// A file of the group does not take a value.
    #[error("cannot write \"{value}\" to {path}")]
    Write { path: PathBuf, value: String, source: io::Error },
    /// kill(2).
    #[error("cannot signal process {pid}")]
    Signal { pid: u32, source: io::Error },
    /// Rules that make no sense.
    #[error("the device rules for {path} are not understood, or there are more than 512")]
    DeviceRules { path: PathBuf },
    /// bpf(2).
    #[error("cannot restrict the devices of {path}; the kernel needs CONFIG_CGROUP_BPF")]
    Devices { path: PathBuf, source: io::Error },
    /// A resource limit was refused.
    #[error("the control group {path} refuses the new limits: {reason}")]
    Update { path: PathBuf, reason: String },
    /// The processes of the group did not freeze or end in time.
    #[error(
        "processes of {path} did not freeze or end within 5 s; one may wait for a disk, or for the file system of a volume, that does not answer"
    )]
    Unsettled { path: PathBuf },
}
