//! Ends a VM when the file of an image is cut short that its guest has in its memory.
//!
//! A page that the file has not any more is a fault of the vCPU that touches it. If that vCPU takes interrupts, KVM hopes that the page
//! comes (asynchronous page faults) and tries again and again, on CPUs of the node and not the pod's: the VMM never hears of it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::inotify::WatchFlags;
use tokio::task::JoinHandle;

use super::super::inotify::Inotify;
use super::super::vm::Vm;
use crate::deadlines::{Deadline, Operation};
use crate::host_files::OneEach;

/// Looks after files until it is dropped.
#[derive(Debug)]
pub struct Guard(JoinHandle<()>);

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Guard {
    /// Looks after files of these sizes in bytes.
    pub fn new(inotify: Inotify, files: Vec<(OwnedFd, u64)>, vm: Vm) -> Self {
        Self(tokio::spawn(async move {
            match look_after(inotify, files.into()).await {
                Ok(()) => {
                    tracing::error!("ending the VM: the file of an image layer in its memory has been cut short");
                    vm.kill().await;
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot watch image layers; should one be cut short, processes of the pod hang. Is fs.inotify.max_user_instances of the node too low?")
                }
            }
        }))
    }
}

/// Returns when a file has been cut short.
async fn look_after(inotify: Inotify, files: Arc<[(OwnedFd, u64)]>) -> io::Result<()> {
    let (host, mut changes) = (OneEach::default(), inotify.changes()?);
    let watched = files.clone();
    let _watched = on_thread(&host, move || Watched::new(inotify, &watched)).await??;
    loop {
        let files = files.clone();
        match on_thread(&host, move || files.iter().any(|(file, size)| is_cut(file, *size))).await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "cannot look whether image layers are whole"),
        }
        changes.changed().await.map_err(io::Error::other)?;
    }
}

async fn on_thread<T: Send + 'static>(host: &OneEach<()>, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    host.run((), Deadline::begin(Operation::HostFiles), work).await.map_err(io::Error::other)
}

/// Files that are watched until this is dropped.
struct Watched {
    inotify: Inotify,
    names: Vec<i32>,
}

impl Watched {
    fn new(inotify: Inotify, files: &[(OwnedFd, u64)]) -> io::Result<Self> {
        let mut watched = Self { inotify, names: Vec::new() };
        for (file, _) in files {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            watched.names.push(watched.inotify.add(Path::new(&path), WatchFlags::MODIFY)?);
        }
        Ok(watched)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.names.iter().for_each(|name| self.inotify.remove(*name));
    }
}

fn is_cut(file: &OwnedFd, size: u64) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| u64::try_from(stat.st_size).is_ok_and(|has| has < size))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Duration;

    use super::*;
    use crate::sandbox::Sandbox;

    fn image(dir: &Path, name: &str) -> (File, OwnedFd) {
        let path = dir.join(name);
        std::fs::write(&path, [1; 4096]).unwrap();
        (File::options().write(true).open(&path).unwrap(), File::open(&path).unwrap().into())
    }

    #[test]
    fn file_that_is_removed_or_grows_is_not_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (file, open) = image(dir.path(), "1");
        std::fs::remove_file(dir.path().join("1")).unwrap();
        assert!(!is_cut(&open, 4096));
        file.set_len(8192).unwrap();
        assert!(!is_cut(&open, 4096));
        file.set_len(4095).unwrap();
        assert!(is_cut(&open, 4096));
    }

    #[tokio::test]
    async fn hostile_12_image_that_is_cut_ends_the_vm_whether_it_is_watched_by_then_or_not() {
        for is_watched in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let (sandbox, _) = Sandbox::fake(dir.path()).await;
            let (file, open) = image(dir.path(), "1");
            let inotify = Inotify::default();
            let changes = inotify.changes().unwrap();
            let _guard = Guard::new(inotify, vec![(open, 4096)], sandbox.vm.clone());
            while is_watched && !changes.has_changed().unwrap() {
                // An event as soon as there is a watch.
                file.set_len(4097).unwrap();
                tokio::task::yield_now().await;
            }
            file.set_len(4095).unwrap();
            tokio::time::timeout(Duration::from_secs(60), sandbox.vm.ended()).await.unwrap();
        }
    }

    /// The kernel holds what is watched.
    #[tokio::test]
    async fn files_that_nobody_looks_after_are_not_watched() {
        let dir = tempfile::tempdir().unwrap();
        let (_file, open) = image(dir.path(), "1");
        let inotify = Inotify::default();
        let watched = Watched::new(inotify.clone(), &[(open, 4096)]).unwrap();
        let name = watched.names[0];
        drop(watched);
        let (_file, open) = image(dir.path(), "1");
        let again = Watched::new(inotify, &[(open, 4096)]).unwrap();
        assert_ne!(again.names[0], name, "names are given once");
    }
}
