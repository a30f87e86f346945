//! Files of the host as memory that a guest can only read, straight from the host's page cache.
//!
//! Three locks are on each page: the file is open for reading alone, so its shared mapping can never become writable; the mapping
//! is PROT_READ; and KVM's slot is read-only, so a write of the guest's is an exit to an address of nobody's.
//!
//! **Nothing here or elsewhere in the VMM looks at the mapping.** It is in no [`Memory`], so no device finds a ring or a buffer
//! there. A page that the host cannot give, because the file was cut or its disk fails, would be SIGBUS to a thread of the VMM. To
//! the vCPU that touches it it is a fault, which ends the guest (`vcpu`). Only where KVM can let the guest do something else
//! meanwhile (asynchronous page faults: a vCPU that takes interrupts) it tries again and again, and the process in the guest waits
//! (arch/x86/kvm/mmu/mmu.c, KVM_PFN_ERR_NEEDS_IO). So the shim watches the files.
//!
//! KVM changes its slots only when no vCPU is in the middle of a fault, and such a fault waits for the host's disk. So slots come
//! and go in a thread that nobody waits for.
#![allow(unsafe_code)] // reason: mmap(2), and KVM is given an address of the host

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bulkhead_protocol::images::{self, Layout};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::error::{KvmError, call};
use super::memory_slot::IMAGES;
use crate::layout::{MEMORY_BLOCK, SLOTS};
use crate::memory::{ImageRegion, Memory, leave_out_of_dumps};

/// The part of a machine's address space that images can be in. Cheap to clone.
#[derive(Clone)]
pub struct ImageSpace(Arc<Space>);

struct Space {
    // Before `_memory`, as in `Vm`.
    fd: Arc<VmFd>,
    range: Range<u64>,
    /// What is taken, by slot of KVM's from [`IMAGES`] on.
    taken: Mutex<[Option<(u64, u64)>; SLOTS]>,
    _memory: Memory,
}

impl Space {
    fn taken(&self) -> MutexGuard<'_, [Option<(u64, u64)>; SLOTS]> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ImageSpace {
    /// The addresses of `range`.
    pub(super) fn new(fd: Arc<VmFd>, memory: Memory, range: Range<u64>) -> Self {
        Self(Arc::new(Space { fd, range, taken: Mutex::default(), _memory: memory }))
    }

    /// Shows the guest images of these sizes, behind each other. May wait for the host, and for vCPUs that do.
    ///
    /// # Errors
    ///
    /// [`ImageError`]; then the guest has nothing of them.
    pub fn map(&self, images: &[(OwnedFd, u64)]) -> Result<ImageMemory, ImageError> {
        let sizes: Vec<_> = images.iter().map(|(_, size)| *size).collect();
        let Layout { offsets, size } = images::layout(&sizes).ok_or(ImageError::Layout)?;
        let mapping = Mapping::reserve(size)?;
        for (number, ((file, size), offset)) in images.iter().zip(offsets).enumerate() {
            check(number, file, *size)?;
            mapping.show(file, *size, offset).map_err(|source| ImageError::Map { number, source })?;
        }
        let (slot, address) = self.take(size).ok_or(ImageError::NoRoom(size >> 20))?;
        let space = Arc::clone(&self.0);
        let mut memory = ImageMemory { space, slot, address, size, mapping: Some(mapping), is_known: false };
        memory.set_slot(size)?;
        memory.is_known = true;
        Ok(memory)
    }

    /// Whether the guest has an image at an address.
    pub fn has(&self, address: u64) -> bool {
        let is_there = |(start, size): &(u64, u64)| address.checked_sub(*start).is_some_and(|offset| offset < *size);
        self.0.range.contains(&address) && self.0.taken().iter().flatten().any(is_there)
    }

    /// Finds a slot and an address.
    fn take(&self, size: u64) -> Option<(usize, u64)> {
        let mut taken = self.0.taken();
        let slot = taken.iter().position(Option::is_none)?;
        let mut others: Vec<_> = taken.iter().flatten().copied().collect();
        others.sort_unstable();
        let mut address = self.0.range.start;
        for (start, len) in others {
            if address.checked_add(size)? <= start {
                break;
            }
            // In memory blocks of its own: Linux has one kind of memory in a block.
            address = start.checked_add(len)?.checked_next_multiple_of(MEMORY_BLOCK)?;
        }
        if address.checked_add(size)? > self.0.range.end {
            return None;
        }
        *taken.get_mut(slot)? = Some((address, size));
        Some((slot, address))
    }
}

/// A file that has not its size any more is not served. If it loses it later, the guest ends that needs what is gone.
fn check(number: usize, file: &OwnedFd, size: u64) -> Result<(), ImageError> {
    let unknown = |error: Errno| ImageError::Map { number, source: error.into() };
    let stat = fstat(file).map_err(unknown)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(ImageError::Kind(number));
    }
    let has = u64::try_from(stat.st_size).unwrap_or(0);
    if has != size {
        return Err(ImageError::Size { number, size: has });
    }
    match fcntl_getfl(file).map_err(unknown)? & OFlags::RWMODE {
        OFlags::RDONLY => Ok(()),
        _ => Err(ImageError::Writable(number)),
    }
}

/// Images that the guest has in its memory, until this is dropped. That may wait as [`ImageSpace::map`] does.
pub struct ImageMemory {
    space: Arc<Space>,
    slot: usize,
    address: u64,
    size: u64,
    /// There until the drop.
    mapping: Option<Mapping>,
    /// Whether KVM has it.
    is_known: bool,
}

impl ImageMemory {
    /// Gives KVM so much of the mapping; with no length the slot is deleted.
    fn set_slot(&self, len: u64) -> Result<(), KvmError> {
        let number = u32::try_from(self.slot).ok().and_then(|slot| IMAGES.checked_add(slot));
        let region = kvm_userspace_memory_region {
            slot: number.ok_or(KvmError::Missing("number of memory slots"))?,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: self.address,
            memory_size: len,
            userspace_addr: self.mapping.as_ref().map_or(0, |mapping| mapping.address as u64),
        };
        // SAFETY: the range is a mapping that this owns, and keeps until the slot is deleted. KVM only reads it, and nothing in
        // this process has a reference into it.
        unsafe { self.space.fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
    }
}

impl ImageRegion for ImageMemory {
    fn start(&self) -> u64 {
        self.address
    }

    fn size(&self) -> u64 {
        self.size
    }
}

impl Drop for ImageMemory {
    fn drop(&mut self) {
        if self.is_known
            && let Err(error) = self.set_slot(0)
        {
            crate::vmm_log!("images stay in the guest's memory: {}", bulkhead_protocol::error::chain(&error));
            // So does the mapping, which KVM has, and the place.
            std::mem::forget(self.mapping.take());
            return;
        }
        if let Some(place) = self.space.taken().get_mut(self.slot) {
            *place = None;
        }
    }
}

/// A range of the process's address space that can be read, and that nobody here reads.
struct Mapping {
    address: *mut libc::c_void,
    len: usize,
}

// SAFETY: the pointer is only a number for mmap(2), munmap(2) and KVM.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Zeros, as far as nothing is shown there.
    fn reserve(size: u64) -> Result<Self, ImageError> {
        let len = usize::try_from(size).map_err(|_| ImageError::Layout)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(ImageError::Reserve { mib: size >> 20, source: io::Error::last_os_error() });
        }
        Ok(Self { address, len })
    }

    /// Shows a file of `size` bytes at `offset`.
    fn show(&self, file: impl AsFd, size: u64, offset: u64) -> io::Result<()> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = images::taken(size).and_then(|len| usize::try_from(len).ok()).ok_or_else(invalid)?;
        let offset = usize::try_from(offset).map_err(|_| invalid())?;
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(invalid());
        }
        let at = self.address.wrapping_byte_add(offset);
        let (flags, file) = (libc::MAP_SHARED | libc::MAP_FIXED, file.as_fd().as_raw_fd());
        // SAFETY: the range is inside of a mapping that this owns and that nobody has a reference into, checked above.
        if unsafe { libc::mmap(at, len, libc::PROT_READ, flags, file, 0) } == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is mapped, and the slice is only an address and a length for madvise(2).
        leave_out_of_dumps(&unsafe { VolatileSlice::new(at.cast(), len) })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this owns the mapping, nobody has a reference into it, and KVM has let go of it.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

/// Images that the guest cannot have.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// None, too many, or sizes that make no sense.
    #[error("a device has 1 to {} images, none of them empty", images::MAX_IMAGES)]
    Layout,
    /// A directory, a device, a pipe.
    #[error("image {0} is no regular file")]
    Kind(usize),
    /// Not what was said.
    #[error("the file of image {number} has {size} bytes by now; is somebody changing it?")]
    Size {
        /// Which.
        number: usize,
        /// What it has.
        size: u64,
    },
    /// Not only for reading.
    #[error("image {0} is open for writing")]
    Writable(usize),
    /// mmap(2) of one.
    #[error("cannot map image {number}; can its file system map files?")]
    Map {
        /// Which.
        number: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// mmap(2) of the room for them.
    #[error("cannot reserve {mib} MiB of addresses for images; is the host's limit of address space too small?")]
    Reserve {
        /// Size.
        mib: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// In the guest's address space.
    #[error(
        "{0} MiB of images do not fit into what the processor leaves of the guest's addresses, or all places are taken"
    )]
    NoRoom(u64),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

#[cfg(test)]
mod tests;
