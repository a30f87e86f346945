//! virtio-mem over a region that is not there: what the device tells its backing is checked instead.

use std::io;
use std::ops::Range;

use bulkhead_vmm::layout::MEMORY_BLOCK;
use bulkhead_vmm::memory::Backing;
use bulkhead_vmm::virtio::mem::Mem;

use crate::guest::{Device, Guest, drive, event_loop};
use crate::input::Input;

const START: u64 = 8 << 30;
const BLOCKS: usize = 4;
const SIZE: u64 = BLOCKS as u64 * MEMORY_BLOCK;
/// What the device plugs at a time.
const UNIT: u64 = 2 << 20;

/// A backing that insists on the device's promises.
struct Region {
    attached: [bool; BLOCKS],
    /// Which attachments fail, one bit for each.
    failing: u8,
}

impl Backing for Region {
    fn start(&self) -> u64 {
        START
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn attach(&mut self, block: usize) -> io::Result<()> {
        assert!(!self.attached[block], "memory block {block} attached twice");
        let fails = self.failing & 1 != 0;
        self.failing >>= 1;
        if fails {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.attached[block] = true;
        Ok(())
    }

    fn detach(&mut self, block: usize) -> io::Result<()> {
        assert!(self.attached[block], "memory block {block} detached, but not attached");
        self.attached[block] = false;
        Ok(())
    }

    fn discard(&mut self, address: u64, len: u64) {
        let region: Range<u64> = START..START + SIZE;
        let end = address.checked_add(len).expect("discarded range wraps around");
        assert!(region.contains(&address) && end <= region.end, "{len:#x} bytes at {address:#x} discarded");
    }
}

/// The target. The first byte says which attachments fail, the second how much is asked for.
pub fn mem(data: &[u8]) {
    let mut input = Input::new(data);
    let region = Region { attached: [false; BLOCKS], failing: input.u8() };
    let requested = u64::from(input.u8()) * UNIT;
    let (device, handle) = Mem::new(Box::new(region), requested, event_loop()).unwrap();
    let own = move |guest: &mut Guest, input: &mut Input<'_>| match input.u8() {
        0 => {
            let _ = handle.resize(input.u64(), Box::new(|_| ()));
        }
        1 => {
            let _ = handle.resize(u64::from(input.u16()), Box::new(|_| ()));
        }
        kind => {
            let mut request = [0; 24];
            request[0] = kind & 3;
            request[8..16].copy_from_slice(&(START + u64::from(input.u8()) * UNIT).to_le_bytes());
            request[16] = input.u8();
            let request = guest.place(&request);
            let response = guest.room(10);
            guest.offer(0, &[request, response]);
        }
    };
    drive(
        &mut Device {
            device: Box::new(device),
            own: Box::new(own),
            probe: |guest| (0, vec![guest.place(&[0; 24]), guest.room(10)]),
            host_recovers: Box::new(|| ()),
        },
        data.get(2..).unwrap_or_default(),
    );
}
