//! What shims that were killed have left, where nobody calls `delete` for them: CRI-O never does. The next shim of any pod cleans
//! up, and so does the action `clean`, by the records that the dead ones have made of themselves. Their mounts have gone with
//! their VMMs.

use std::io::{ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use bulkhead_protocol::error::chain;
use bulkhead_protocol::node::RUN_ROOT;

use crate::paths::{RunDir, SOCKET_DIR};
use crate::sandbox::{Cgroup, has_ended, kill_recorded};
use crate::share::Share;

/// Cleans up, and names what it has removed, one a line.
pub fn run() -> std::io::Result<()> {
    let removed = clean(Path::new(RUN_ROOT), Path::new(SOCKET_DIR));
    removed.iter().try_for_each(|what| writeln!(std::io::stdout(), "{}", what.display()))
}

/// Cleans up when a shim has just been started, and logs what was removed.
pub fn clean_up() {
    for what in clean(Path::new(RUN_ROOT), Path::new(SOCKET_DIR)) {
        tracing::warn!(what = %what.display(), "removed leftovers of a shim that had been killed");
    }
}

/// Removes the directories of pods whose shim is dead, with what they name, and the sockets on which nobody listens any more.
/// Goes on after a failure. One without a record is being made, or is nobody's to remove.
fn clean(run_root: &Path, sockets: &Path) -> Vec<PathBuf> {
    let pods = entries(run_root).flat_map(|namespace| entries(&namespace));
    let mut removed: Vec<_> = pods.filter(|pod| remove_pod(&RunDir::at(pod))).collect();
    let records = entries(sockets).filter(|file| file.extension().is_some_and(|extension| extension == "pid"));
    removed.extend(records.filter(|record| remove_socket(record)));
    removed
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn remove_pod(pod: &RunDir) -> bool {
    if !has_ended(&pod.shim_pid()) {
        return false;
    }
    // It ends by itself when its shim has, unless something keeps it from that.
    kill_recorded(&[&pod.vmm_pid()]);
    if let Some(cgroup) = Cgroup::noted(&pod.cgroup()) {
        cgroup.remove();
    }
    let removed = Share::destroy(pod);
    if let Err(error) = &removed {
        tracing::warn!("{}", chain(error));
    }
    removed.is_ok()
}

fn remove_socket(record: &Path) -> bool {
    if !has_ended(record) {
        return false;
    }
    let socket = record.with_extension("");
    // One with the same id may have been started anew and not have recorded itself yet.
    let refused = UnixStream::connect(&socket).err().map(|error| error.kind());
    if !matches!(refused, Some(ErrorKind::ConnectionRefused | ErrorKind::NotFound)) {
        return false;
    }
    let _ = std::fs::remove_file(&socket);
    std::fs::remove_file(record).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::record;
    use std::os::unix::net::UnixListener;
    use std::process::{Child, Command};

    struct Stage {
        dir: tempfile::TempDir,
        living: Child,
    }

    impl Stage {
        fn new() -> Self {
            let living = Command::new("sleep").arg("60").spawn().unwrap();
            Self { dir: tempfile::tempdir().unwrap(), living }
        }

        fn clean(&self) -> Vec<PathBuf> {
            let mut removed = clean(&self.dir.path().join("run"), &self.dir.path().join("s"));
            removed.sort();
            removed
        }

        /// A pod's directory and socket with the records of a process; it is dead, but not waited for.
        fn pod(&self, id: &str, pid: Option<u32>) -> (RunDir, PathBuf) {
            let run = RunDir::new(&self.dir.path().join("run"), "ns", id);
            let sockets = self.dir.path().join("s");
            std::fs::create_dir_all(&sockets).unwrap();
            Share::create(&run).unwrap();
            let socket = sockets.join(id);
            drop(UnixListener::bind(&socket).unwrap());
            if let Some(pid) = pid {
                record(&run.shim_pid(), pid);
                record(&socket.with_extension("pid"), pid);
            }
            (run, socket)
        }
    }

    impl Drop for Stage {
        fn drop(&mut self) {
            let _ = self.living.kill();
            let _ = self.living.wait();
        }
    }

    #[test]
    fn what_a_dead_shim_left_is_removed_and_that_of_others_is_not() {
        let stage = Stage::new();
        let mut dead = Command::new("sleep").arg("60").spawn().unwrap();
        let mut vmm = Command::new("sleep").arg("60").spawn().unwrap();
        let (run, socket) = stage.pod("dead", Some(dead.id()));
        record(&run.vmm_pid(), vmm.id());
        let others = [stage.pod("living", Some(stage.living.id())), stage.pod("new", None)];
        assert_eq!(stage.clean(), Vec::<PathBuf>::new());
        dead.kill().unwrap();
        // A process that nobody has waited for has ended as well.
        let mut removed = vec![run.path().to_path_buf(), socket.with_extension("pid")];
        removed.sort();
        while !has_ended(&run.shim_pid()) {
            std::thread::yield_now();
        }
        assert_eq!(stage.clean(), removed);
        assert!(!vmm.wait().unwrap().success(), "its VMM goes too");
        assert!(!run.path().exists() && !socket.exists());
        for (run, socket) in others {
            assert!(run.share().exists() && socket.exists());
        }
        dead.wait().unwrap();
    }

    #[test]
    fn socket_that_a_new_shim_listens_on_is_left_alone() {
        let stage = Stage::new();
        let (run, socket) = stage.pod("again", None);
        std::fs::write(socket.with_extension("pid"), format!("{} 1", stage.living.id())).unwrap();
        std::fs::remove_file(&socket).unwrap();
        let _listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(stage.clean(), Vec::<PathBuf>::new());
        assert!(socket.exists() && run.path().exists());
    }
}
