//! Requests of the driver, `struct virtio_mem_req`, and the answers, `struct virtio_mem_resp` (section 5.15.6).

use virtio_queue::desc::split::Descriptor;
use vm_memory::Bytes;

use super::blocks::{Blocks, Occupancy, Verdict};
use crate::virtio::ring::{Chain, readable, writable};

/// type, padding, and for all but one: address, number of blocks, padding.
const REQUEST_LEN: usize = 24;
/// type, padding, state.
const RESPONSE_LEN: usize = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Executes the request of a chain; returns the bytes that were written to it.
pub fn answer(blocks: &mut Blocks, chain: &Chain) -> usize {
    let (verdict, state) = match read(chain) {
        Some(request) => execute(blocks, &request),
        None => (Verdict::Error, None),
    };
    let mut response = [0; RESPONSE_LEN];
    let (head, tail) = response.split_at_mut(8);
    head.iter_mut().zip((verdict as u16).to_le_bytes()).for_each(|(to, from)| *to = from);
    tail.copy_from_slice(&state.map_or(0, |state| state as u16).to_le_bytes());
    write(chain, &response)
}

fn execute(blocks: &mut Blocks, request: &[u8; REQUEST_LEN]) -> (Verdict, Option<Occupancy>) {
    let [t0, t1, _, _, _, _, _, _, address @ .., n0, n1, _, _, _, _, _, _] = *request;
    let (address, count) = (u64::from_le_bytes(address), u16::from_le_bytes([n0, n1]));
    match u16::from_le_bytes([t0, t1]) {
        PLUG => (blocks.plug(address, count), None),
        UNPLUG => (blocks.unplug(address, count), None),
        UNPLUG_ALL => (blocks.unplug_all(), None),
        STATE => match blocks.occupancy(address, count) {
            Some(state) => (Verdict::Ack, Some(state)),
            None => (Verdict::Error, None),
        },
        _ => (Verdict::Error, None),
    }
}

/// The first bytes that the driver wrote, from however many buffers.
fn read(chain: &Chain) -> Option<[u8; REQUEST_LEN]> {
    let mut request = [0; REQUEST_LEN];
    let mut rest = request.as_mut_slice();
    for buffer in readable(chain) {
        let (part, left) = rest.split_at_mut(len(&buffer).min(rest.len()));
        chain.memory().read_slice(part, buffer.addr()).ok()?;
        rest = left;
    }
    rest.is_empty().then_some(request)
}

/// As much of the answer as the driver has room for.
fn write(chain: &Chain, response: &[u8]) -> usize {
    let mut rest = response;
    for buffer in writable(chain) {
        let (part, left) = rest.split_at(len(&buffer).min(rest.len()));
        if chain.memory().write_slice(part, buffer.addr()).is_err() {
            break;
        }
        rest = left;
    }
    response.len() - rest.len()
}

fn len(buffer: &Descriptor) -> usize {
    usize::try_from(buffer.len()).unwrap_or(usize::MAX)
}
