//! The files of a pod that containerd binds into its containers: hostname, hosts, resolv.conf and the directory of
//! /dev/shm. With the Sandbox API containerd leaves them to the shim, and mounts those that are where it looks
//! (containerd: internal/cri/server/container_create.go linuxContainerMounts, helpers.go getSandboxRootDir).

use std::fs::{DirBuilder, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bulkhead_protocol::cri::{DNSConfig, PodSandboxConfig};

/// The directory that containerd's CRI plugin has below its root and its state.
const CRI_DIR: &str = "io.containerd.grpc.v1.cri/sandboxes";

/// The directories of one pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PodFiles {
    root: PathBuf,
    state: PathBuf,
}

impl PodFiles {
    /// Finds containerd's directories from the bundle's: it is `<state>/<plugin>/<namespace>/<id>`, and its link `work`
    /// leads to `<root>/<plugin>/<namespace>/<id>` (containerd: core/runtime/v2/bundle.go). Nobody else makes such a link.
    pub fn locate(bundle: &Path, id: &str) -> Option<Self> {
        let work = std::fs::read_link(bundle.join("work")).ok()?;
        let base = |path: &Path| path.ancestors().nth(3).map(|base| base.join(CRI_DIR).join(id));
        let both_named = bundle.ends_with(id) && work.ends_with(id) && work.is_absolute();
        if both_named { Some(Self { root: base(&work)?, state: base(bundle)? }) } else { None }
    }

    /// Makes them. The shared memory itself is the guest's: the directory only tells containerd that there is one.
    pub fn create(&self, config: &PodSandboxConfig) -> Result<(), FilesError> {
        let hostname = if config.hostname.is_empty() { node_name() } else { config.hostname.clone() };
        let resolv = match config.dns_config.as_ref() {
            Some(dns) => resolv_conf(dns),
            None => node_file("/etc/resolv.conf"),
        };
        make_dir(&self.root, 0o755)?;
        write(&self.root.join("hostname"), format!("{hostname}\n").as_bytes())?;
        write(&self.root.join("hosts"), node_file("/etc/hosts").as_bytes())?;
        write(&self.root.join("resolv.conf"), resolv.as_bytes())?;
        make_dir(&self.state.join("shm"), 0o1777)
    }

    /// Whether they are there.
    pub fn exist(&self) -> bool {
        self.root.join("resolv.conf").exists() && self.state.join("shm").exists()
    }

    /// Removes them. What is gone is no error; what cannot be removed is logged, the pod ends all the same.
    pub fn remove(&self) {
        for dir in [&self.root, &self.state] {
            if let Err(error) = std::fs::remove_dir_all(dir)
                && error.kind() != ErrorKind::NotFound
            {
                tracing::warn!(%error, dir = %dir.display(), "cannot remove the pod's files (hosts, resolv.conf, hostname); remove them by hand");
            }
        }
    }
}

/// resolv.conf(5) from the pod's DNS settings.
fn resolv_conf(dns: &DNSConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

fn node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// A file of the node, as far as there is one.
fn node_file(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn make_dir(path: &Path, mode: u32) -> Result<(), FilesError> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    // The mode of mkdir(2) is cut by the umask.
    made.and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)))
        .map_err(|source| FilesError { path: path.to_path_buf(), source })
}

fn write(path: &Path, text: &[u8]) -> Result<(), FilesError> {
    let mut options = std::fs::OpenOptions::new();
    let file = options.create(true).write(true).truncate(true).mode(0o644).open(path);
    file.and_then(|mut file| file.write_all(text)).map_err(|source| FilesError { path: path.to_path_buf(), source })
}

/// A file of the pod cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the pod's file {path}; is containerd's root full or read-only?")]
pub struct FilesError {
    path: PathBuf,
    #[source]
    source: std::io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::MessageField;

    fn bundle(dir: &Path) -> PathBuf {
        let bundle = dir.join("state/io.containerd.sandbox.controller.v1.shim/k8s.io/s");
        std::fs::create_dir_all(&bundle).unwrap();
        let work = dir.join("root/io.containerd.sandbox.controller.v1.shim/k8s.io/s");
        std::os::unix::fs::symlink(work, bundle.join("work")).unwrap();
        bundle
    }

    #[test]
    fn files_are_made_where_containerd_looks_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let files = PodFiles::locate(&bundle(dir.path()), "s").unwrap();
        let dns = DNSConfig {
            servers: vec!["10.0.0.2".into()],
            searches: vec!["a.example".into(), "b.example".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        };
        let config = PodSandboxConfig {
            hostname: "web".into(),
            dns_config: MessageField::some(dns),
            ..PodSandboxConfig::default()
        };
        files.create(&config).unwrap();
        let root = dir.path().join("root/io.containerd.grpc.v1.cri/sandboxes/s");
        assert_eq!(std::fs::read_to_string(root.join("hostname")).unwrap(), "web\n");
        assert_eq!(
            std::fs::read_to_string(root.join("resolv.conf")).unwrap(),
            "search a.example b.example\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        assert!(root.join("hosts").exists());
        let shm = dir.path().join("state/io.containerd.grpc.v1.cri/sandboxes/s/shm");
        assert_eq!(std::fs::metadata(&shm).unwrap().permissions().mode() & 0o7777, 0o1777);
        assert!(files.exist());
        files.remove();
        files.remove();
        assert!(!files.exist());
        assert!(!root.exists() && !shm.exists());
    }

    #[test]
    fn bundle_that_containerd_did_not_make_has_no_such_files() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(PodFiles::locate(dir.path(), "s"), None);
        assert_eq!(PodFiles::locate(&bundle(dir.path()), "other"), None);
    }
}
