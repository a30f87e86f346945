//! Volumes of huge pages (emptyDir with medium HugePages): the kubelet mounts a hugetlbfs on the host, whose pages a guest
//! cannot use; the guest has one of its own instead, which the pod's containers share by the volume's place on the host.

use std::path::{Path, PathBuf};

use bulkhead_protocol::guest::HUGE_PAGES_DIR;
use oci_spec::runtime::Spec;
use sha2::{Digest, Sha256};

/// statfs(2), HUGETLBFS_MAGIC.
const HUGETLBFS: u64 = 0x9584_58f6;

/// A volume of huge pages.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HugeVolume {
    /// Where it is on the host.
    pub source: PathBuf,
    /// Its name in the guest.
    pub name: String,
    /// Size of its pages.
    pub page_kib: u64,
}

impl HugeVolume {
    /// The volume at a place on the host.
    pub fn new(source: &Path, page_kib: u64) -> Self {
        let digest = Sha256::digest(source.as_os_str().as_encoded_bytes());
        let name = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Self { source: source.to_path_buf(), name, page_kib }
    }

    /// Where it is in the guest.
    pub fn guest_path(&self) -> PathBuf {
        Path::new(HUGE_PAGES_DIR).join(&self.name)
    }
}

/// The volumes of huge pages among a spec's mounts. Asks their file systems, and blocks as long as these do.
pub fn huge_volumes(spec: &Spec) -> Vec<HugeVolume> {
    let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_deref());
    let volume = |source: &Path| {
        let file_system = rustix::fs::statfs(source).ok().filter(|_| source.is_absolute())?;
        let is_huge = u64::try_from(file_system.f_type).is_ok_and(|kind| kind & 0xffff_ffff == HUGETLBFS);
        let page = u64::try_from(file_system.f_bsize).ok()?;
        is_huge.then(|| HugeVolume::new(source, page / 1024))
    };
    sources.filter_map(volume).collect()
}
