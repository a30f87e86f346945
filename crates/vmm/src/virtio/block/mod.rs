//! virtio-blk (section 5.2) over a raw image or block device. The format is never probed: what is in the file is what
//! the guest sees. Requests are parsed first ([`request`]) and executed then ([`execute`]), on a thread of the disk's own
//! ([`threads`]): a disk of the host may keep a request for ever, and nobody but its thread waits for it.

mod execute;
mod file_io;
mod request;
mod threads;
mod worker;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{SeekFrom, seek};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::execute::Disk;
use self::request::{SECTOR, SEG_MAX, SERIAL_LEN};
pub use self::threads::DiskThreads;
use self::worker::Worker;
use super::ring::{Chain, Ring};
use super::serving::Serving;
use super::{ActivateError, Activation, VirtioDevice, read_config};

const QUEUE_SIZE: u16 = 128;
const QUEUES: [u16; 1] = [QUEUE_SIZE];
/// The device. What it reads and writes is its thread's, which outlives it as long as a request is in the host.
pub struct Block {
    sectors: u64,
    read_only: bool,
    serving: Serving<Ring>,
    withdrawn: Arc<AtomicBool>,
}

impl Block {
    /// A disk over `file`, which must be open for writing unless `read_only`. It is served, and in the end closed, by one of `threads`.
    ///
    /// # Errors
    ///
    /// [`BlockError`] if the file has no size, or the serial number is too long.
    pub fn new(file: OwnedFd, read_only: bool, serial: &str, threads: &DiskThreads) -> Result<Self, BlockError> {
        let disk = open(file, read_only, serial)?;
        Ok(Self::over(disk.sectors, read_only, threads, move |chain| disk.answer(chain)))
    }

    /// A disk whose requests are answered by `answer`, see [`Worker::new`].
    fn over(
        sectors: u64,
        read_only: bool,
        threads: &DiskThreads,
        answer: impl FnMut(&Chain) -> usize + Send + 'static,
    ) -> Self {
        let (serving, orders) = Serving::new();
        let withdrawn = Arc::new(AtomicBool::new(false));
        let worker = Worker::new(answer, Arc::clone(&withdrawn));
        threads.run(move || worker.run(orders));
        Self { sectors, read_only, serving, withdrawn }
    }
}

fn open(file: OwnedFd, read_only: bool, serial: &str) -> Result<Disk, BlockError> {
    let size = seek(&file, SeekFrom::End(0)).map_err(BlockError::Size)?;
    if serial.len() > SERIAL_LEN {
        return Err(BlockError::Serial(serial.into()));
    }
    let mut id = [0; SERIAL_LEN];
    id.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
    Ok(Disk { file: File::from(file), sectors: size / SECTOR, read_only, id })
}

fn features(read_only: bool) -> u64 {
    let read_only = if read_only { 1 << VIRTIO_BLK_F_RO } else { 0 };
    read_only | (1 << VIRTIO_BLK_F_FLUSH) | (1 << VIRTIO_BLK_F_SEG_MAX)
}

/// struct virtio_blk_config: `capacity`, `size_max` (not offered) and `seg_max`; the rest belongs to features that are not
/// offered.
fn config(sectors: u64) -> [u8; 16] {
    let mut config = [0; 16];
    config[..8].copy_from_slice(&sectors.to_le_bytes());
    config[12..].copy_from_slice(&SEG_MAX.to_le_bytes());
    config
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        features(self.read_only)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&config(self.sectors), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let ring = Ring::take(&mut activation, 0)?;
        self.serving.start(ring, activation.interrupt)
    }

    fn reset(&mut self) {
        self.serving.stop();
    }

    fn is_stopped(&self) -> bool {
        self.serving.is_stopped()
    }

    fn withdraw(&mut self) -> bool {
        self.withdrawn.store(true, Ordering::Release);
        !self.serving.is_in_host()
    }
}

#[cfg(feature = "testing")]
type Answer = Box<dyn FnMut(&Chain) -> usize>;

/// The disk without its thread: it serves when it is told to.
#[cfg(feature = "testing")]
pub struct Inline {
    worker: Worker<Answer>,
    sectors: u64,
    read_only: bool,
    ring: Option<(Ring, super::stop::Stop)>,
}

#[cfg(feature = "testing")]
impl Inline {
    /// A disk over `file`.
    ///
    /// # Errors
    ///
    /// Those of [`Block::new`].
    pub fn new(file: OwnedFd, read_only: bool, serial: &str) -> Result<Self, BlockError> {
        let disk = open(file, read_only, serial)?;
        let sectors = disk.sectors;
        let answer: Answer = Box::new(move |chain| disk.answer(chain));
        Ok(Self { worker: Worker::new(answer, Arc::default()), sectors, read_only, ring: None })
    }

    /// See [`VirtioDevice::features`].
    pub fn features(&self) -> u64 {
        features(self.read_only)
    }

    /// See [`VirtioDevice::read_config`].
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&config(self.sectors), offset, data);
    }

    /// DRIVER_OK.
    ///
    /// # Errors
    ///
    /// Those of [`VirtioDevice::activate`].
    pub fn start(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let host = |source| ActivateError::Host { action: "make an event", source };
        self.ring = Some((Ring::take(&mut activation, 0)?, super::stop::Stop::new().map_err(host)?));
        Ok(())
    }

    /// Serves what is in the queue now. A ring that the driver has broken is not looked at again.
    pub fn serve(&mut self) {
        if let Some((ring, stop)) = &mut self.ring
            && self.worker.serve_once(ring, stop).is_err()
        {
            self.ring = None;
        }
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
