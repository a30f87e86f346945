//! A container: its init and its execs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::types::task::Status;

use super::error::TaskError;
use super::hooks::ContainerHooks;
use super::process::Process;
use super::stats_cache::StatsCache;
use crate::deadlines::{Deadline, Operation};
use crate::host_files;

/// File in the bundle by which CRI-O knows that a container was out of memory (cri-o: internal/oci/runtime_vm.go).
const OOM_FILE: &str = "oom";

/// What a container is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// The pod's own: the VM stands for it, and nothing runs.
    Sandbox,
    /// One that runs in the pod's VM.
    Member,
    /// One without a pod, with the VM to itself.
    Standalone,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// What it is.
    pub kind: Kind,
    /// Its bundle on the host.
    pub bundle: PathBuf,
    /// Its first process.
    pub init: Arc<Process>,
    /// What the host runs when it begins and ends.
    pub hooks: ContainerHooks,
    /// It is known to have been out of memory.
    oom: AtomicBool,
    /// What it uses, as far as the guest has told.
    pub stats: StatsCache,
    execs: Mutex<Execs>,
}

/// By exec id: the process, and the OCI process (JSON) that it is started from.
type Execs = HashMap<String, (Arc<Process>, Arc<[u8]>)>;

impl Container {
    /// A created container.
    pub fn new(id: String, kind: Kind, bundle: PathBuf, init: Arc<Process>, hooks: ContainerHooks) -> Self {
        let (oom, stats, execs) = (AtomicBool::new(false), StatsCache::default(), Mutex::default());
        Self { id, kind, bundle, init, hooks, oom, stats, execs }
    }

    /// Notes that it was out of memory, and answers whether that is news. Who gets no events finds a file when it has ended.
    pub async fn out_of_memory(&self) -> bool {
        let news = !self.oom.swap(true, Ordering::Relaxed);
        if news {
            let file = self.bundle.join(OOM_FILE);
            let deadline = Deadline::begin(Operation::NoteOutOfMemory);
            let noted = host_files::CONTAINERS.run(deadline, move || std::fs::write(file, "")).await;
            if let Err(error) = noted.map_err(std::io::Error::other).and_then(|written| written) {
                tracing::warn!(%error, "cannot note in the bundle that the container was out of memory");
            }
        }
        news
    }

    fn execs(&self) -> MutexGuard<'_, Execs> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An exec by its id.
    pub fn exec(&self, id: &str) -> Result<Arc<Process>, TaskError> {
        let found = self.execs().get(id).map(|(process, _)| process.clone());
        found.ok_or_else(|| TaskError::NotFound(format!("exec {id} of container {}", self.id)))
    }

    /// An exec's OCI process.
    pub fn exec_spec(&self, id: &str) -> Result<Arc<[u8]>, TaskError> {
        let found = self.execs().get(id).map(|(_, spec)| spec.clone());
        found.ok_or_else(|| TaskError::NotFound(format!("exec {id} of container {}", self.id)))
    }

    /// Adds an exec that is not started yet.
    pub fn add_exec(&self, process: Arc<Process>, spec: Vec<u8>) -> Result<(), TaskError> {
        let mut execs = self.execs();
        let id = process.key.exec.clone();
        if execs.contains_key(&id) {
            return Err(TaskError::Exists(format!("exec {id}")));
        }
        execs.insert(id, (process, spec.into()));
        Ok(())
    }

    /// Forgets an exec.
    pub fn remove_exec(&self, id: &str) {
        self.execs().remove(id);
    }

    /// Its execs, whatever their state.
    pub fn all_execs(&self) -> Vec<Arc<Process>> {
        self.execs().values().map(|(process, _)| process.clone()).collect()
    }

    /// Init and execs that run.
    pub fn running(&self) -> Vec<Arc<Process>> {
        let mut all = vec![self.init.clone()];
        all.extend(self.all_execs());
        all.retain(|process| process.status() != Status::STOPPED && process.pid() != 0);
        all
    }

    /// Waits until the execs that ran have ended, in bounded time.
    pub async fn execs_ended(&self) {
        let running: Vec<_> = self.running().into_iter().filter(|process| !process.key.exec.is_empty()).collect();
        let all = async {
            for process in running {
                process.wait().await;
            }
        };
        let _ = Deadline::begin(Operation::ExecsEnd).timeout(all).await;
    }
}
