//! Block devices of the host that containers of the pod have (raw block volumes): each is a disk in a slot of the VM, one
//! for all containers that name the device, and gone with the last of them (ARCHITECTURE.md, D3).
//!
//! A device that nobody may write is opened for reading alone: that the guest keeps to it is not trusted, nor that the VMM does
//! not open the device again by its descriptor.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{FileType, OFlags};

use super::agent::{Agent, AgentError};
use super::patience;
use super::vm::{Vm, VmError};
use crate::own_thread;
use crate::share;
use crate::spec::{DeviceNumber, GuestDisk, HostDisk};

/// How long open(2) of a disk may take: one whose path is being recovered may wait for ever.
const OPENED: Duration = Duration::from_secs(30);

/// How long the guest and the VMM may take in all to let go of a container's disks: as long as for one, see the deadlines of
/// `Agent::unbind_device` and `Vm::remove_device`.
const DETACHED: Duration = Duration::from_secs(50);

/// The pod's disks.
#[derive(Debug, Default)]
pub struct Disks {
    /// Held while one comes or goes, so that two containers do not bring the same one.
    disks: tokio::sync::Mutex<Vec<Disk>>,
    /// Containers that have disks or are about to: the others wait for nobody.
    users: Mutex<HashSet<String>>,
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
            files.push(open_beside(host.number, host.writable).await?);
        }
        let mut disks = self.disks.lock().await;
        let mut attached = Vec::new();
        for (host, file) in wanted.iter().zip(files) {
            let fits = |disk: &&mut Disk| disk.host == host.number && (disk.writable || !host.writable);
            let guest = match disks.iter_mut().find(fits) {
                Some(disk) => {
                    disk.users.insert(id.to_owned());
                    disk.guest
                }
                None => {
                    let disk = add(vm, agent, id, host, file).await?;
                    let guest = disk.guest;
                    disks.push(disk);
                    guest
                }
            };
            attached.push(GuestDisk { host: host.number, guest });
        }
        Ok(attached)
    }

    /// Takes a container's disks away, as far as no other has them. The guest may refuse; the slot is emptied anyway.
    pub async fn detach(&self, vm: &Vm, agent: &Agent, id: &str) {
        if !self.users().remove(id) || vm.has_ended() {
            return;
        }
        patience::within(DETACHED, self.take_out(vm, agent, id)).await;
    }

    async fn take_out(&self, vm: &Vm, agent: &Agent, id: &str) {
        let mut disks = self.disks.lock().await;
        let unused = |disk: &mut Disk| disk.users.remove(id) && disk.users.is_empty();
        for disk in disks.extract_if(.., unused).collect::<Vec<_>>() {
            if vm.has_ended() {
                continue;
            }
            if let Err(error) = agent.unbind_device(disk.slot).await {
                tracing::warn!(%error, slot = disk.slot, "the guest does not let go of a disk");
            }
            if let Err(error) = vm.remove_device(disk.slot).await {
                tracing::warn!(%error, slot = disk.slot, "the VMM does not let go of a disk");
            }
        }
    }
}

async fn add(vm: &Vm, agent: &Agent, id: &str, host: &HostDisk, file: OwnedFd) -> Result<Disk, DiskError> {
    let (number, writable) = (host.number, host.writable);
    let slot = vm.add_disk(file, !writable, number.to_string()).await?;
    let guest = match agent.bind_device(slot).await {
        Ok(guest) => guest,
        Err(error) => {
            let _ = vm.remove_device(slot).await;
            return Err(error.into());
        }
    };
    Ok(Disk { host: number, writable, slot, guest, users: HashSet::from([id.to_owned()]) })
}

/// Opens a disk on a thread that others do not wait for.
async fn open_beside(number: DeviceNumber, writable: bool) -> Result<OwnedFd, DiskError> {
    let opened = own_thread::run("bulkhead-open", move || open(number, writable));
    let deadline = patience::left(OPENED);
    match tokio::time::timeout(deadline, opened).await {
        Ok(opened) => opened.map_err(DiskError::Thread)?,
        Err(_) => Err(DiskError::Hung(number, deadline)),
    }
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
    #[error("cannot open the block device {path}; is it in use, or read-only?")]
    Open {
        /// Its node.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// open(2) has not come back.
    #[error("the block device {0} has not been opened within {1:?}; does its disk answer?")]
    Hung(DeviceNumber, Duration),
    /// No thread.
    #[error("cannot start a thread to open a block device; is the node out of threads?")]
    Thread(#[source] std::io::Error),
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
}
