//! The pod's cgroup on the host: the VMM is accounted where the kubelet expects the pod (cgroups(7), version 2).
//!
//! Best effort: without a cgroup the pod runs, unaccounted.

use std::path::{Component, Path, PathBuf};

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup that holds the VMM.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the cgroup that `cgroupsPath` names, and notes it for a later clean-up.
    pub fn create(cgroups_path: &Path, note: &Path) -> Option<Self> {
        let dir = Path::new(ROOT).join(relative(cgroups_path)?);
        if !Path::new(ROOT).join("cgroup.procs").exists() {
            return None;
        }
        if let Err(error) = std::fs::create_dir_all(&dir) {
            tracing::warn!(%error, dir = %dir.display(), "the pod is not accounted: no cgroup");
            return None;
        }
        let _ = std::fs::write(note, dir.as_os_str().as_encoded_bytes());
        Some(Self(dir))
    }

    /// Moves a process into it.
    pub fn add(&self, pid: u32) {
        if let Err(error) = std::fs::write(self.0.join("cgroup.procs"), pid.to_string()) {
            tracing::warn!(%error, dir = %self.0.display(), "the pod is not accounted");
        }
    }

    /// Removes it. The kubelet removes the pod's own above it.
    pub fn remove(&self) {
        let _ = std::fs::remove_dir(&self.0);
    }

    /// The one that a dead shim has noted.
    pub fn noted(note: &Path) -> Option<Self> {
        let dir = PathBuf::from(std::fs::read_to_string(note).ok()?);
        dir.starts_with(ROOT).then_some(Self(dir))
    }
}

/// The path below the root: cgroupfs form as it is, systemd form `slice:prefix:name` spelled out
/// (runtime-spec: config-linux.md, cgroups path; systemd.slice(5)).
fn relative(cgroups_path: &Path) -> Option<PathBuf> {
    let text = cgroups_path.to_str()?;
    let parts: Vec<&str> = text.split(':').collect();
    if let [slice, prefix, name] = parts.as_slice() {
        return Some(slice_path(slice)?.join(format!("{prefix}-{name}.scope")));
    }
    let path = PathBuf::from(text.trim_start_matches('/'));
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && path.components().next().is_some()).then_some(path)
}

/// `a-b.slice` is in `a.slice/a-b.slice`.
fn slice_path(slice: &str) -> Option<PathBuf> {
    let name = slice.strip_suffix(".slice").filter(|name| !name.contains('/'))?;
    let mut path = PathBuf::new();
    for (at, _) in name.match_indices('-').chain([(name.len(), "")]) {
        path.push(format!("{}.slice", name.get(..at)?));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_understood() {
        let path = |text: &str| relative(Path::new(text));
        assert_eq!(path("/kubepods/pod1/s"), Some("kubepods/pod1/s".into()));
        assert_eq!(
            path("kubepods-pod1.slice:cri-containerd:s"),
            Some("kubepods.slice/kubepods-pod1.slice/cri-containerd-s.scope".into())
        );
        assert_eq!(path("/a/../../b"), None);
        assert_eq!(path("/"), None);
    }
}
