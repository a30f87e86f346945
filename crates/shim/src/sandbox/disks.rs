//! Block devices of the host that containers of the pod have (raw block volumes): each is a disk in a slot of the VM, one
//! for all containers that name the device, and gone with the last of them (ARCHITECTURE.md, D3).
//!
//! A device that nobody may write is opened for reading alone: that the guest keeps to it is not trusted, nor that the VMM does
//! not open the device again by its descriptor.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{FileType, OFlags};

use super::agent::{Agent, AgentError};
use super::vm::{Vm, VmError};
use crate::about;
use crate::deadlines::{Deadline, Operation};
use crate::host_files::{HostFilesError, OneEach};
use crate::share;
use crate::spec::{DeviceNumber, GuestDisk, HostDisk};

/// The pod's disks.
#[derive(Debug, Default)]
pub struct Disks {
    /// Held while one comes or goes, so that two containers do not bring the same one.
    disks: Arc<tokio::sync::Mutex<Vec<Disk>>>,
    /// Containers that have disks or are about to: the others wait for nobody.
    users: Mutex<HashSet<String>>,
    /// Those that are being opened: a disk that hangs has one thread, however often the kubelet tries again.
    opening: OneEach<(DeviceNumber, bool)>,
}

#[derive(Debug)]
struct Disk {
    host: DeviceNumber,
    writable: bool,
    slot: u8,
    guest: DeviceNumber,
    /// Containers.
    users: HashSet<String>,
}

impl Disks {
    #[cfg(test)]
    pub async fn lock(&self) -> impl Drop {
        self.disks.lock().await
    }

    fn users(&self) -> MutexGuard<'_, HashSet<String>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a container its disks. On an error, [`Self::detach`] takes back what it has got.
    pub async fn attach(
        &self,
        deadline: Deadline,
        vm: &Vm,
        agent: &Agent,
        id: &str,
        wanted: &[HostDisk],
    ) -> Result<Vec<GuestDisk>, DiskError> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        self.users().insert(id.to_owned());
        // Before the lock: what hangs here holds up this container alone.
        let mut files = Vec::new();
        for host in wanted {
            files.push(self.open(deadline, host.number, host.writable).await?);
        }
        let mut disks = deadline.timeout(self.disks.lock()).await.map_err(DiskError::Busy)?;
        let mut attached = Vec::new();
        for (host, file) in wanted.iter().zip(files) {
            let fits = |disk: &&mut Disk| disk.host == host.number && (disk.writable || !host.writable);
            let guest = match disks.iter_mut().find(fits) {
                Some(disk) => {
                    disk.users.insert(id.to_owned());
                    disk.guest
                }
                None => {
                    let disk = add(deadline, vm, agent, id, host, file).await?;
                    let guest = disk.guest;
                    disks.push(disk);
                    guest
                }
            };
            attached.push(GuestDisk { host: host.number, guest });
        }
        Ok(attached)
    }

    /// Opens a disk on a thread of its own.
    async fn open(&self, deadline: Deadline, number: DeviceNumber, writable: bool) -> Result<OwnedFd, DiskError> {
        let deadline = deadline.part(Operation::OpenDisk);
        match self.opening.run((number, writable), deadline, move || open(number, writable)).await {
            Ok(opened) => opened,
            Err(HostFilesError::Hung(waited)) => Err(DiskError::Hung(number, waited)),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes a container's disks away, as far as no other has them. The guest may refuse; the slot is emptied anyway, also when
    /// the time of whoever waits for it is over.
    pub async fn detach(&self, deadline: Deadline, vm: &Vm, agent: &Agent, id: &str) {
        if !self.users().remove(id) || vm.has_ended() {
            return;
        }
        let (disks, vm, agent, id) = (self.disks.clone(), vm.clone(), agent.clone(), id.to_owned());
        let taking_out = about::spawn(async move { take_out(&mut *disks.lock().await, &vm, &agent, &id).await });
        let _ = deadline.timeout(taking_out).await;
    }
}

async fn take_out(disks: &mut Vec<Disk>, vm: &Vm, agent: &Agent, id: &str) {
    let deadline = Deadline::begin(Operation::DetachDisks);
    let unused = |disk: &mut Disk| disk.users.remove(id) && disk.users.is_empty();
    for disk in disks.extract_if(.., unused).collect::<Vec<_>>() {
        if vm.has_ended() {
            continue;
        }
        if let Err(error) = agent.unbind_device(deadline, disk.slot).await {
            tracing::warn!(%error, slot = disk.slot, "the guest does not release a disk; is it still mounted or in use in the pod?");
        }
        if let Err(error) = vm.remove_device(deadline, disk.slot).await {
            tracing::warn!(%error, slot = disk.slot, "the VMM does not release a disk; does the disk answer?");
        }
    }
}

async fn add(
    deadline: Deadline,
    vm: &Vm,
    agent: &Agent,
    id: &str,
    host: &HostDisk,
    file: OwnedFd,
) -> Result<Disk, DiskError> {
    let (number, writable) = (host.number, host.writable);
    let slot = vm.add_disk(deadline, file, !writable, number.to_string()).await?;
    let guest = match agent.bind_device(deadline, slot).await {
        Ok(guest) => guest,
        Err(error) => {
            let _ = vm.remove_device(deadline, slot).await;
            return Err(error.into());
        }
    };
    Ok(Disk { host: number, writable, slot, guest, users: HashSet::from([id.to_owned()]) })
}

/// Where the kernel keeps the nodes of devices (devtmpfs).
const DEVICES: &str = "/dev";

/// Opens a block device by its number. A spec does not say where its node is on the host, but the kernel does.
fn open(number: DeviceNumber, writable: bool) -> Result<OwnedFd, DiskError> {
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{number}/uevent")).unwrap_or_default();
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")).ok_or(DiskError::NoDevice(number))?;
    let path = Path::new(DEVICES).join(name);
    let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
    let failed = |error: rustix::io::Errno| DiskError::Open { path: path.clone(), source: error.into() };
    let file = share::open_device(Path::new(DEVICES), Path::new(name), access).map_err(failed)?;
    let stat = rustix::fs::fstat(&file).map_err(failed)?;
    let is_block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    if is_block && DeviceNumber::of(stat.st_rdev) == number { Ok(file) } else { Err(DiskError::NoDevice(number)) }
}

/// A container cannot have its disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host has no such device, or /dev shows another one.
    #[error("the host has no block device {0}; was the volume detached?")]
    NoDevice(DeviceNumber),
    /// open(2).
    #[error("cannot open the block device {path}; is it in use, or read-only while the container may write to it?")]
    Open {
        /// Its node.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// open(2) has not come back.
    #[error(
        "the block device {0} could not be opened within {1:?}; its disk does not answer: look at the node's kernel log and at the volume's storage"
    )]
    Hung(DeviceNumber, Duration),
    /// They come or go for others.
    #[error(
        "disks of other containers of the pod have been attached or detached for {0:?}; does a disk of the host answer?"
    )]
    Busy(Duration),
    /// No thread.
    #[error(transparent)]
    HostFiles(#[from] HostFilesError),
    /// The VMM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_that_is_not_there_is_named() {
        let number = DeviceNumber { major: 4000, minor: 1 };
        assert_eq!(
            open(number, true).unwrap_err().to_string(),
            "the host has no block device 4000:1; was the volume detached?"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn disk_that_hangs_has_one_thread_and_who_asks_again_is_told_at_once() {
        let (disks, number) = (Disks::default(), DeviceNumber { major: 4000, minor: 1 });
        let (answer, hung) = std::sync::mpsc::channel::<()>();
        let deadline = Deadline::begin(Operation::OpenDisk);
        assert!(disks.opening.run((number, true), deadline, move || hung.recv()).await.is_err());
        let begun = tokio::time::Instant::now();
        for _ in 0..3 {
            let again = disks.open(Deadline::begin(Operation::MakeContainer), number, true).await;
            let limit = Operation::OpenDisk.budget();
            assert!(matches!(again, Err(DiskError::Hung(_, waited)) if waited == limit), "{again:?}");
        }
        assert_eq!(begun.elapsed().as_secs(), 0);
        drop(answer);
    }
}
