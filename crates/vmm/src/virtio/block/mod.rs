//! virtio-blk (section 5.2) over a raw image or block device. The format is never probed: what is in the file is what
//! the guest sees. Requests are parsed first ([`request`]) and executed then ([`execute`]).

mod execute;
mod file_io;
mod request;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::execute::Disk;
use super::worker::RequestWorker;
use super::{ActivateError, Activation, VirtioDevice};
use crate::event_loop::{EventLoop, WorkerGuard};

const QUEUE_SIZE: u16 = 128;
const QUEUES: [u16; 1] = [QUEUE_SIZE];
/// Data segments of a request: the queue's size without header and status.
const SEG_MAX: u32 = 126;
/// Unit of capacity and sector numbers.
const SECTOR: u64 = 512;
/// Length of the serial number (section 5.2.6).
const SERIAL_LEN: usize = 20;

/// The device.
pub struct Block {
    disk: Arc<Disk>,
    event_loop: EventLoop,
    worker: Option<WorkerGuard>,
}

impl Block {
    /// A disk over `file`, which must be open for writing unless `read_only`. Its requests block the loop's thread, so
    /// the loop should be none that other devices depend on.
    pub fn new(file: OwnedFd, read_only: bool, serial: &str, event_loop: EventLoop) -> Result<Self, BlockError> {
        let size = seek(&file, SeekFrom::End(0)).map_err(BlockError::Size)?;
        if serial.len() > SERIAL_LEN {
            return Err(BlockError::Serial(serial.into()));
        }
        let mut id = [0; SERIAL_LEN];
        id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        let disk = Disk { file: File::from(file), sectors: size / SECTOR, read_only, id };
        Ok(Self { disk: Arc::new(disk), event_loop, worker: None })
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        let read_only = if self.disk.read_only { 1 << VIRTIO_BLK_F_RO } else { 0 };
        read_only | (1 << VIRTIO_BLK_F_FLUSH) | (1 << VIRTIO_BLK_F_SEG_MAX)
    }

    /// `capacity`, `size_max` (not offered) and `seg_max`; the rest belongs to features that are not offered.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.disk.sectors.to_le_bytes());
        config[12..].copy_from_slice(&SEG_MAX.to_le_bytes());
        let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let disk = self.disk.clone();
        let worker = RequestWorker::new("block", &mut activation, 0, move |chain| disk.answer(&chain))?;
        self.worker = Some(self.event_loop.add(Box::new(worker))?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// A disk that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// lseek(2) failed.
    #[error("cannot tell the disk's size; is it an image file or a block device?")]
    Size(#[source] rustix::io::Errno),
    /// Too long.
    #[error("disk serial {0:?} is longer than {SERIAL_LEN} bytes")]
    Serial(String),
}

#[cfg(test)]
mod tests;
