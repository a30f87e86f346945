//! Rings and descriptor chains at any place of a memory with a hole, in the hands of a device that makes full use of them.

use std::sync::Arc;

use bulkhead_vmm::memory::Memory;
use bulkhead_vmm::virtio::buffers::Buffers;
use bulkhead_vmm::virtio::ring::{Ring, RingError, Step};
use bulkhead_vmm::virtio::testing::TestInterrupt;
use bulkhead_vmm::virtio::{Activation, ActiveQueue};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::input::Input;

/// Steps of one input.
const MAX_STEPS: usize = 48;
/// Chains of one turn, each of which may take 65535 steps to follow.
const BUDGET: usize = 8;
const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 0x2_0000), (GuestAddress(0x4_0000), 0x1_0000)];
/// Rings of the driver that means well.
const RINGS: [u32; 3] = [0x1000, 0x2000, 0x3000];

/// The target.
pub fn virtqueue(data: &[u8]) {
    let mut input = Input::new(data);
    let memory: Memory = Arc::new(GuestMemoryMmap::from_ranges(&REGIONS).unwrap());
    let interrupt = Arc::new(TestInterrupt::default());
    let Some(queue) = queue(&memory, &mut input) else { return };
    let (size, rings) = (queue.size(), [queue.desc_table(), queue.avail_ring(), queue.used_ring()]);
    let kick = bulkhead_vmm::virtio::ring::event_fd().unwrap();
    let queues = vec![Some(ActiveQueue { queue, kick })];
    let counts = Arc::default();
    let mut activation = Activation { memory: memory.clone(), features: 0, queues, interrupt, counts };
    let mut ring = Ring::take(&mut activation, 0).unwrap();
    for _ in 0..MAX_STEPS {
        if input.is_empty() || act(&memory, size, rings, &mut ring, &mut input).is_err() {
            break;
        }
    }
    // After whatever it was, and also on a ring that it has broken.
    let _ = ring.notify();
    ring.clear_kick();
}

/// A queue that the transport would let pass: where the input says if the first byte is odd.
fn queue(memory: &Memory, input: &mut Input<'_>) -> Option<Queue> {
    let (wild, event_idx) = (input.u8(), input.u8());
    let size = 1 << input.choice(9);
    let mut queue = Queue::new(256).ok()?;
    queue.try_set_size(size).ok()?;
    let rings = if wild & 1 == 0 { RINGS } else { [input.u32(), input.u32(), input.u32()] };
    let [descriptors, available, used] = rings.map(|ring| GuestAddress(ring.into()));
    queue.try_set_desc_table_address(descriptors).ok()?;
    queue.try_set_avail_ring_address(available).ok()?;
    queue.try_set_used_ring_address(used).ok()?;
    queue.set_event_idx(event_idx & 1 != 0);
    queue.set_ready(true);
    queue.is_valid(memory.as_ref()).then_some(queue)
}

fn act(
    memory: &Memory,
    size: u16,
    [descriptors, available, _]: [u64; 3],
    ring: &mut Ring,
    input: &mut Input<'_>,
) -> Result<(), RingError> {
    match input.choice(6) {
        // A descriptor.
        0 => {
            let index = u64::from(input.u16() % size);
            let address = u64::from(input.u32() & 0x7_ffff);
            let address = if input.u8() & 1 == 0 { address } else { input.u64() };
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(input.u32().to_le_bytes());
            bytes.extend((input.u16() & 7).to_le_bytes());
            bytes.extend((input.u16() % (size + 1)).to_le_bytes());
            let _ = memory.write_slice(&bytes, GuestAddress(descriptors + 16 * index));
        }
        // A head, and an index that is one further, or anywhere.
        1 => {
            let (head, wild) = (input.u16(), input.u8());
            let index: u16 = memory.read_obj(GuestAddress(available + 2)).unwrap_or(0);
            let slot = available + 4 + 2 * u64::from(index % size);
            let _ = memory.write_obj(head, GuestAddress(slot));
            let index = if wild & 3 == 3 { input.u16() } else { index.wrapping_add(1) };
            let _ = memory.write_obj(index, GuestAddress(available + 2));
        }
        // Anything, anywhere.
        2 => {
            let address = u64::from(input.u32() & 0x7_ffff);
            let len = input.choice(64);
            let _ = memory.write_slice(input.bytes(len), GuestAddress(address));
        }
        // A device's turn.
        _ => {
            let plan = Plan { writable: input.u8(), answer: input.u8(), len: input.u16(), offset: input.u16() };
            let mut turns = 0;
            ring.drain(BUDGET, |ring| {
                turns += 1;
                assert!(turns <= BUDGET, "a turn beyond the budget");
                plan.serve(memory, ring)
            })?;
        }
    }
    Ok(())
}

/// What the device does with a chain.
struct Plan {
    writable: u8,
    answer: u8,
    len: u16,
    offset: u16,
}

impl Plan {
    fn serve(&self, memory: &Memory, ring: &mut Ring) -> Result<Step, RingError> {
        let Some(chain) = ring.pop()? else { return Ok(Step::Empty) };
        let head = chain.head_index();
        // Twice over the same chain: what a device that parses first does.
        assert!(chain.clone().count() <= 1 << 16, "a chain without an end");
        let (offset, mut bytes) = (usize::from(self.offset), vec![0x5a; usize::from(self.len)]);
        if self.writable & 1 == 0 {
            if let Ok(buffers) = Buffers::readable(memory, chain) {
                let whole = buffers.read(offset, &mut bytes);
                assert_eq!(whole, bytes.is_empty() || offset + bytes.len() <= buffers.size());
            }
        } else if let Ok(buffers) = Buffers::writable(memory, chain) {
            let whole = buffers.write(offset, &bytes);
            assert_eq!(whole, bytes.is_empty() || offset + bytes.len() <= buffers.size());
        }
        match self.answer % 4 {
            0 => ring.push(head, usize::from(self.len))?,
            1 => {
                ring.stage(head, 0)?;
                ring.stage(self.offset, usize::MAX)?;
                ring.publish()?;
            }
            2 => {
                ring.unpop();
                return Ok(Step::Stop);
            }
            _ => {}
        }
        Ok(Step::Done)
    }
}
