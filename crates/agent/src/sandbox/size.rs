//! How much of the machine the guest uses: CPUs that are online, and pages that are set aside as huge ones. Memory needs
//! nothing of the agent to come: virtio-mem's driver does as the device asks, and the kernel uses what comes at once.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{HugePagePool, HugePageVolume};
use bulkhead_protocol::guest::HUGE_PAGES_DIR;
use bulkhead_protocol::huge_pages::page_kib;
use rustix::mount::{MountFlags, mount};

/// Brings CPUs up or down until so many are online (Documentation/core-api/cpu_hotplug.rst). CPU 0 always is.
pub fn online_cpus(wanted: u32) -> Result<(), SizeError> {
    if wanted == 0 {
        return Ok(());
    }
    for cpu in 1.. {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        let state = if cpu < wanted { "1" } else { "0" };
        match std::fs::read_to_string(&path) {
            Ok(is) if is.trim() == state => {}
            Ok(_) => std::fs::write(&path, state).map_err(|source| SizeError::Cpu { cpu, source })?,
            // There are no more. Fewer than wanted is no reason to fail: the pod's limits are the host's to keep.
            Err(_) => break,
        }
    }
    Ok(())
}

/// Makes a pool of huge pages have so many (Documentation/admin-guide/mm/hugetlbpage.rst). Pages in use stay when fewer
/// are wanted.
pub fn reserve_huge_pages(pool: &HugePagePool) -> Result<(), SizeError> {
    let HugePagePool { page_kib, pages: wanted, .. } = *pool;
    let path = pool_path(page_kib).join("nr_hugepages");
    let fail = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => SizeError::NoPageSize { page_kib },
        _ => SizeError::HugePages { page_kib, wanted, source },
    };
    std::fs::write(&path, wanted.to_string()).map_err(fail)?;
    let text = std::fs::read_to_string(&path).map_err(fail)?;
    let there: u64 = text.trim().parse().unwrap_or(0);
    // The kernel makes as many as it finds room for and says nothing.
    if there < wanted { Err(SizeError::FewHugePages { page_kib, wanted, there }) } else { Ok(()) }
}

/// Mounts a volume of huge pages, which all containers that name it share; once.
pub fn add_huge_page_volume(volume: &HugePageVolume) -> Result<(), SizeError> {
    let name = &volume.name;
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric()) {
        return Err(SizeError::VolumeName { name: name.chars().take(64).collect() });
    }
    let fail = |source| SizeError::Volume { page_kib: volume.page_kib, source };
    let dir = Path::new(HUGE_PAGES_DIR).join(name);
    std::fs::create_dir_all(HUGE_PAGES_DIR).map_err(fail)?;
    match std::fs::create_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        made => made.map_err(fail)?,
    }
    let data = CString::new(format!("pagesize={}K,mode=0777", volume.page_kib)).map_err(|error| fail(error.into()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("hugetlbfs", &dir, "hugetlbfs", flags, Some(data.as_c_str())).map_err(|error| {
        // So that the next one does not take it for mounted.
        let _ = std::fs::remove_dir(&dir);
        fail(error.into())
    })
}

/// Whether the kernel has pages of a size as cgroups write it, "2MB".
pub fn has_huge_pages(size: &str) -> bool {
    page_kib(size).is_some_and(|kib| pool_path(kib).exists())
}

fn pool_path(page_kib: u64) -> PathBuf {
    Path::new("/sys/kernel/mm/hugepages").join(format!("hugepages-{page_kib}kB"))
}

/// The guest cannot have the size that is wanted.
#[derive(Debug, thiserror::Error)]
pub enum SizeError {
    /// CPU hotplug.
    #[error("cannot change whether CPU {cpu} is online")]
    Cpu { cpu: u32, source: io::Error },
    /// The processor or the kernel lacks them.
    #[error("this guest has no huge pages of {page_kib} KiB; use another size in the pod's limits")]
    NoPageSize { page_kib: u64 },
    /// Too little memory in one piece.
    #[error("the guest has room for {there} of {wanted} huge pages of {page_kib} KiB; give the pod more memory")]
    FewHugePages { page_kib: u64, wanted: u64, there: u64 },
    /// Not fit for a directory's name.
    #[error("{name:?} is no name for a volume: letters and digits only")]
    VolumeName { name: String },
    /// mount(2).
    #[error("cannot make a volume of huge pages of {page_kib} KiB")]
    Volume { page_kib: u64, source: io::Error },
    /// The pool's file.
    #[error("cannot reserve {wanted} huge pages of {page_kib} KiB")]
    HugePages { page_kib: u64, wanted: u64, source: io::Error },
}
