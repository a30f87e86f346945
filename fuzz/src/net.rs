//! virtio-net over a socket that keeps the borders of frames.

use std::os::fd::OwnedFd;

use bulkhead_vmm::event_loop::WorkerGuard;
use bulkhead_vmm::virtio::Activation;
use bulkhead_vmm::virtio::net::worker_over;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use crate::guest::{Buffer, Guest, Subject, drive, event_loop, settle};
use crate::input::Input;

/// Largest frame with its virtio header: a VLAN tag and 65535 bytes of IP.
const LARGEST: usize = 12 + 14 + 4 + 65535;
/// Feature bits that change what the worker does: checksums and segmentation both ways, mergeable buffers.
const FEATURES: u64 = 0b1 | 0b10 | 0b1011_1000_0000 | 0b0111_1000_0000_0000 | 1 << 15;

/// Headers of a TCP segment without data: virtio with a checksum to be finished, Ethernet, IPv4, TCP with an acknowledgement.
const SEGMENT: [u8; 66] = [
    1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0, // virtio
    2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, // Ethernet
    0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, // IPv4
    0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0, // TCP
];

#[derive(Default)]
struct Net {
    /// The worker and the host's end of its wire.
    running: Option<(WorkerGuard, OwnedFd)>,
}

/// The target.
pub fn net(data: &[u8]) {
    drive(&mut Net::default(), data);
}

impl Net {
    /// TCP segments of one connection that wait together, but for what the input changes of them.
    fn segments(&self, input: &mut Input<'_>) {
        let Some((_, wire)) = &self.running else { return };
        let mut number = 0_u32;
        for _ in 0..input.choice(8) {
            let payload = input.u8();
            let mut frame = SEGMENT.to_vec();
            frame[29] = 40 + payload % 128;
            frame[50..54].copy_from_slice(&number.to_be_bytes());
            frame.resize(SEGMENT.len() + usize::from(payload % 128), payload);
            if input.choice(4) == 0 {
                let at = input.choice(frame.len());
                frame[at] = input.u8();
            }
            let _ = send(wire, &frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            number += u32::from(payload % 128);
        }
        settle();
    }

    /// What the guest has sent, a frame at a time.
    fn take_frames(&self) {
        let Some((_, wire)) = &self.running else { return };
        let mut frame = vec![0; 2 * LARGEST];
        while let Ok((len, _)) = recv(wire, &mut frame[..], RecvFlags::DONTWAIT) {
            if len == 0 {
                break;
            }
            assert!(len <= LARGEST, "a frame of {len} bytes reached the host");
        }
    }
}

impl Subject for Net {
    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 16]
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn start(&mut self, activation: Activation) -> bool {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (wire, tap) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let worker = worker_over(tap, 1500, activation).unwrap();
        self.running = Some((event_loop().add(worker).unwrap(), wire));
        true
    }

    fn stop(&mut self) {
        self.running = None;
    }

    fn settle(&mut self) {
        settle();
    }

    fn own(&mut self, guest: &mut Guest, input: &mut Input<'_>) {
        match input.choice(7) {
            0 => self.take_frames(),
            // A frame for the guest.
            1 => {
                let len = 12 + usize::from(input.u16());
                let mut frame = vec![0; len];
                frame.iter_mut().zip(input.bytes(len)).for_each(|(to, from)| *to = *from);
                if let Some((_, wire)) = &self.running {
                    let _ = send(wire, &frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
                }
                settle();
            }
            // A frame of the guest's with an offload header that is nearly right.
            2 => {
                let mut frame = vec![0; 12 + 14 + usize::from(input.u16())];
                frame.iter_mut().zip(input.bytes(12)).for_each(|(to, from)| *to = *from);
                let frame = guest.place(&frame);
                guest.offer(1, &[frame]);
            }
            // Buffers for frames.
            3 => {
                for _ in 0..input.choice(16) {
                    let room = guest.room(1536);
                    guest.offer(0, &[room]);
                }
                guest.kick(0);
            }
            4 => {
                let room = guest.room(u32::try_from(LARGEST).unwrap());
                guest.offer(0, &[room]);
                guest.kick(0);
            }
            5 => self.segments(input),
            // The interface goes down.
            _ => {
                if let Some((_, wire)) = &self.running {
                    let _ = rustix::net::shutdown(wire, rustix::net::Shutdown::Both);
                }
            }
        }
    }

    fn probe(&mut self, guest: &mut Guest) -> Option<(usize, Vec<Buffer>)> {
        Some((1, vec![guest.place(&[0; 12 + 60])]))
    }
}
