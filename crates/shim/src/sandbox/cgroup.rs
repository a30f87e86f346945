//! The pod's cgroup on the host: shim and VMM are accounted where the kubelet expects the pod (cgroups(7), version 2).
//!
//! Best effort: without a cgroup the pod runs, unaccounted.

use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::huge_pages::page_name;

/// Where cgroup v2 is mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup that holds shim and VMM.
#[derive(Clone, Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the cgroup that `cgroupsPath` names, and notes it for a later clean-up.
    pub fn create(cgroups_path: &Path, note: &Path) -> Option<Self> {
        let dir = Path::new(ROOT).join(relative(cgroups_path)?);
        if !Path::new(ROOT).join("cgroup.procs").exists() {
            return None;
        }
        if let Err(error) = std::fs::create_dir_all(&dir) {
            tracing::warn!(%error, dir = %dir.display(), "cannot create the pod's cgroup: the pod's limits and statistics do not include its VM");
            return None;
        }
        let cgroup = Self(dir);
        cgroup.hand_down_controllers();
        let _ = std::fs::write(note, cgroup.0.as_os_str().as_encoded_bytes());
        Some(cgroup)
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Its directory and those of the groups above it, the root's included.
    pub fn with_those_above(&self) -> impl Iterator<Item = &Path> {
        self.0.ancestors().take_while(|dir| dir.starts_with(ROOT))
    }

    /// Enables in every group above this one what is there to enable, as runc does: the kubelet's own groups hand down what the
    /// kubelet limits, and CPUs are not among it. A group that refuses has processes of its own.
    fn hand_down_controllers(&self) {
        let above: Vec<&Path> = self.with_those_above().skip(1).collect();
        for group in above.into_iter().rev() {
            let controllers = std::fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
            for controller in controllers.split_whitespace() {
                let _ = std::fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
            }
        }
    }

    /// Moves the VMM into it, and the shim.
    pub fn add(&self, vmm: u32) {
        for pid in [vmm, std::process::id()] {
            if let Err(error) = std::fs::write(self.0.join("cgroup.procs"), pid.to_string()) {
                tracing::warn!(%error, dir = %self.0.display(), "cannot move the shim or the VMM into the pod's cgroup: the pod's limits and statistics do not include it");
            }
        }
    }

    /// Moves the shim out of it, to the nearest group above that may hold processes: groups that hand controllers down may
    /// not, and the root always may.
    pub fn leave(&self) {
        let pid = std::process::id().to_string();
        if !self.holds(&pid) {
            return;
        }
        if !self.with_those_above().skip(1).any(|dir| std::fs::write(dir.join("cgroup.procs"), &pid).is_ok()) {
            tracing::warn!(dir = %self.0.display(), "the shim cannot leave the pod's cgroup, so the kubelet may kill it before it has reported how the pod ended");
        }
    }

    fn holds(&self, pid: &str) -> bool {
        let members = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        members.lines().any(|member| member == pid)
    }

    /// Lets its processes run on these CPUs only, listed as in cpuset(7); on all of the pod's if there are none.
    pub fn bind_to_cpus(&self, cpus: &str) {
        let file = self.0.join("cpuset.cpus");
        let is_bound = std::fs::read_to_string(&file).is_ok_and(|is| !is.trim().is_empty());
        if (is_bound || !cpus.is_empty())
            && let Err(error) = std::fs::write(&file, format!("{cpus}\n"))
        {
            tracing::warn!(%error, cpus, "cannot bind the VM to the CPUs that the kubelet chose for its containers");
        }
    }

    /// Bytes of huge pages that the kubelet lets the pod have: the limit of the group above, if there is one.
    pub fn pod_huge_pages(&self, page_kib: u64) -> Option<u64> {
        let file = self.0.parent()?.join(format!("hugetlb.{}.max", page_name(page_kib)));
        std::fs::read_to_string(file).ok()?.trim().parse().ok()
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
    fn pods_limit_of_huge_pages_is_that_of_the_group_above() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup(dir.path().join("sandbox"));
        assert_eq!(cgroup.pod_huge_pages(2048), None);
        std::fs::write(dir.path().join("hugetlb.2MB.max"), "8388608\n").unwrap();
        std::fs::write(dir.path().join("hugetlb.1GB.max"), "max\n").unwrap();
        assert_eq!((cgroup.pod_huge_pages(2048), cgroup.pod_huge_pages(1 << 20)), (Some(8 << 20), None));
    }

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
