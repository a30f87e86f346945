//! Guest memory under the type that virtiofsd's message parser wants.
//!
//! The crate reads messages through regions that carry vhost-user's dirty log, which can be empty; ours carry none. So
//! this makes regions of its type over the same mapping.
#![allow(unsafe_code)] // reason: a second owner-less mapping object over memory that is mapped already

use virtiofsd::descriptor_utils::Reader;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::memory::Memory;

/// Names the dirty log's type, which is in a crate that nothing else here needs.
pub trait Logged {
    /// The log.
    type Log;
}

impl<B> Logged for Reader<'_, B> {
    type Log = B;
}

/// What [`virtiofsd::server::Server`] reads messages through.
pub type Log = <Reader<'static> as Logged>::Log;

/// The guest's memory, for the file server.
pub struct ServerMemory {
    regions: GuestMemoryMmap<Log>,
    /// Owns what `regions` points to.
    _owner: Memory,
}

impl ServerMemory {
    /// A view of `memory`; `None` if its regions do not make a valid memory, which those of a machine do.
    pub fn new(memory: &Memory) -> Option<Self> {
        let regions = memory.iter().map(view).collect::<Option<Vec<_>>>()?;
        let regions = GuestMemoryMmap::from_regions(regions).ok()?;
        Some(Self { regions, _owner: memory.clone() })
    }

    /// The memory.
    pub fn get(&self) -> &GuestMemoryMmap<Log> {
        &self.regions
    }
}

fn view(region: &GuestRegionMmap) -> Option<GuestRegionMmap<Log>> {
    let builder = MmapRegionBuilder::new(region.size()).with_mmap_prot(region.prot()).with_mmap_flags(region.flags());
    // SAFETY: Pointer and size are those of a region that `ServerMemory::_owner` keeps mapped; the built object does not
    // unmap it.
    let builder: Result<_, MmapRegionError> = unsafe { builder.with_raw_mmap_pointer(region.as_ptr()) }.build();
    GuestRegionMmap::new(builder.ok()?, region.start_addr())
}
