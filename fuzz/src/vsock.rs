//! virtio-vsock, with a host that connects, reads, writes and hangs up as the input says.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bulkhead_protocol::guest::GUEST_CID;
use bulkhead_vmm::virtio::vsock::packet::{HOST_CID, Header, TYPE_STREAM};
use bulkhead_vmm::virtio::vsock::{Vsock, VsockHandle};

use crate::guest::{Device, Guest, drive, event_loop, settle};
use crate::input::Input;

const TX: usize = 1;
/// Connections of one input.
const MAX_STREAMS: usize = 8;
/// First port that the device gives a connection of the host's.
const FIRST_PORT: u32 = 1024;

/// The host's side.
struct Host {
    handle: VsockHandle,
    streams: Vec<Option<UnixStream>>,
    answers: Arc<AtomicUsize>,
}

/// The target.
pub fn vsock(data: &[u8]) {
    let (device, handle) = Vsock::new(GUEST_CID, event_loop(), Box::new(|| ())).unwrap();
    let answers = Arc::new(AtomicUsize::new(0));
    let host = Rc::new(RefCell::new(Host { handle, streams: Vec::new(), answers: answers.clone() }));
    let (acting, recovering) = (host.clone(), host.clone());
    let mut device = Device {
        device: Box::new(device),
        own: Box::new(move |guest, input| acting.borrow_mut().act(guest, input)),
        // A packet that is none is dropped, and its chain returned.
        probe: |guest| (TX, vec![guest.place(&[0; 44])]),
        host_recovers: Box::new(move || recovering.borrow_mut().streams.iter_mut().for_each(|one| *one = None)),
    };
    drive(&mut device, data);
    drop(device);
    settle();
    let asked = host.borrow().streams.len();
    assert_eq!(answers.load(Ordering::SeqCst), asked, "not every connection was answered exactly once");
}

impl Host {
    fn act(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        match input.choice(6) {
            0 => self.connect(input.u32()),
            1 => packet(guest, input),
            action => {
                let index = input.choice(self.streams.len());
                let argument = input.u16();
                let Some(slot) = self.streams.get_mut(index) else { return };
                let Some(stream) = slot else { return };
                match action {
                    2 => drop(stream.write(&vec![7; usize::from(argument)])),
                    3 => drop(stream.read(&mut vec![0; usize::from(argument)])),
                    4 => {
                        let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(argument) % 3];
                        let _ = stream.shutdown(how);
                    }
                    _ => *slot = None,
                }
            }
        }
        settle();
    }

    fn connect(&mut self, port: u32) {
        if self.streams.len() == MAX_STREAMS {
            return;
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.streams.push(Some(ours));
        let answers = self.answers.clone();
        let done = move |_| {
            answers.fetch_add(1, Ordering::SeqCst);
        };
        self.handle.connect(port, theirs.into(), Box::new(done));
    }
}

/// A packet for a connection that there may be: operation, connection, port, flags, window, payload.
fn packet(guest: &mut Guest, input: &mut Input<'_>) {
    let op = u16::from(input.u8() % 9);
    let dst_port = FIRST_PORT + u32::from(input.u8() % 9);
    let (src_port, flags, buf_alloc, fwd_cnt) = (input.u32(), u32::from(input.u8()), input.u32(), input.u32());
    let payload = usize::from(input.u16());
    let len = u32::try_from(payload).unwrap();
    let kind = TYPE_STREAM;
    let header =
        Header { src_cid: GUEST_CID, dst_cid: HOST_CID, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt };
    let header = guest.place(&header.encode());
    let payload = guest.place(&vec![1; payload]);
    guest.offer(TX, &[header, payload]);
    guest.kick(TX);
}
