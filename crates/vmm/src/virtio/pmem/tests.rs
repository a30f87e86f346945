use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use vm_memory::GuestAddress;

use super::*;
use crate::layout::MEMORY_BLOCK;
use crate::virtio::testing::{DriverQueue, TestInterrupt, activation, memory};

const START: u64 = 6 << 30;
const SIZE: u64 = 4 << 20;

/// Says when it is dropped.
struct Region(Arc<AtomicBool>);

impl ImageRegion for Region {
    fn start(&self) -> u64 {
        START
    }
    fn size(&self) -> u64 {
        SIZE
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn pmem() -> (Pmem, EventLoop, Arc<AtomicBool>) {
    assert_eq!(START % MEMORY_BLOCK, 0);
    let (gone, memory_loop) = (Arc::new(AtomicBool::new(false)), EventLoop::spawn().unwrap());
    let device = Pmem::new(Box::new(Region(gone.clone())), EventLoop::spawn().unwrap(), memory_loop.clone());
    (device, memory_loop, gone)
}

/// Answers one chain of these buffers, of which the first holds `request`: how many bytes were written, and which.
fn ask(request: u32, buffers: &[(u64, u32, bool)]) -> (u32, [u8; 4]) {
    let memory = memory();
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
    memory.write_obj(request.to_le_bytes(), GuestAddress(0x4000)).unwrap();
    memory.write_obj([7_u8; 4], GuestAddress(0x5000)).unwrap();
    driver.add(buffers);
    let interrupt = Arc::new(TestInterrupt::default());
    let mut activation = activation(&memory, 0, &[&driver], &interrupt);
    RequestWorker::new("pmem", &mut activation, 0, |chain| answer(&chain)).unwrap().serve().unwrap();
    (driver.take_used().unwrap().1, memory.read_obj(GuestAddress(0x5000)).unwrap())
}

#[test]
fn driver_is_told_where_the_memory_is() {
    let (device, ..) = pmem();
    let mut config = [0xff; 24];
    device.read_config(0, &mut config);
    assert_eq!(config, [START.to_le_bytes(), SIZE.to_le_bytes(), [0; 8]].concat()[..]);
    assert_eq!((device.device_type(), device.features(), device.queue_sizes()), (27, 0, &[64][..]));
}

#[test]
fn flush_is_done_at_once() {
    assert_eq!(ask(0, &[(0x4000, 4, false), (0x5000, 4, true)]), (4, [0; 4]));
}

#[test]
fn hostile_12_request_that_is_no_flush_fails_and_one_without_room_for_an_answer_is_returned() {
    let failed = (4, [0xff; 4]);
    for request in [1, 2, 0x100, u32::MAX] {
        assert_eq!(ask(request, &[(0x4000, 4, false), (0x5000, 4, true)]), failed, "{request}");
    }
    let untouched = (0, [7; 4]);
    for (buffers, expected) in [
        (&[(0x5000, 4, true)][..], failed),
        (&[(0x4000, 3, false), (0x5000, 4, true)], failed),
        (&[(1 << 40, 4, false), (0x5000, 4, true)], failed),
        // Where the device's own memory is, which is none that a device reads or writes.
        (&[(START, 4, false), (0x5000, 4, true)], failed),
        (&[(0x4000, 4, false), (START, 4, true)], untouched),
        (&[(0x4000, 4, false), (0x5000, 3, true)], untouched),
        (&[(0x4000, 4, false)], untouched),
        (&[(0x4000, 4, false), (u64::MAX - 1, 4, true)], untouched),
    ] {
        assert_eq!(ask(0, buffers), expected, "{buffers:?}");
    }
}

/// KVM lets go of memory only when no vCPU waits for the host's disk.
#[test]
fn hostile_07_device_that_goes_waits_for_nobody_to_take_its_memory_away() {
    let (device, memory_loop, gone) = pmem();
    let (release, released) = channel::<()>();
    // A loop that is busy for as long as the host does not answer.
    memory_loop.run(move || {
        let _ = released.recv();
    });
    drop(device);
    assert!(!gone.load(Ordering::Acquire));
    drop(release);
    let (tell, told) = channel();
    memory_loop.run(move || tell.send(()).unwrap());
    told.recv().unwrap();
    assert!(gone.load(Ordering::Acquire));
}
