//! The buffers of one descriptor chain as the kernel takes them, so that a socket or a tap reads and writes guest memory
//! without a copy in between (readv(2), writev(2)).
//!
//! The module exists to hold the raw pointers that this needs. A chain is walked once; what the guest does to its
//! descriptors afterwards changes nothing.
#![allow(unsafe_code)] // reason: iovecs into guest memory cannot be slices, which would promise that nobody else writes

use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd};

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::ring::MAX_DESCRIPTORS;
use crate::memory::Memory;

/// Most buffers in a chain: IOV_MAX, what one readv(2) takes, and no more than are looked at, empty ones included.
const MAX_SEGMENTS: usize = 1024;

const _: () = assert!(MAX_SEGMENTS == MAX_DESCRIPTORS);

/// The buffers of one chain, all of them readable for the device or all writable.
pub struct Buffers {
    /// Invariant: each lies within `memory`.
    segments: Vec<libc::iovec>,
    len: usize,
    /// Keeps the mapping.
    _memory: Memory,
}

// SAFETY: The pointers lead into a mapping that `_memory` keeps and that every thread may access.
unsafe impl Send for Buffers {}

impl Buffers {
    /// The buffers of a chain that the driver wrote for the device (section 2.7.4.2: flag WRITE clear).
    pub fn readable<M>(memory: &Memory, chain: DescriptorChain<M>) -> Result<Self, BufferError>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        Self::collect(memory, chain, false)
    }

    /// The buffers of a chain that the driver left for the device to fill.
    pub fn writable<M>(memory: &Memory, chain: DescriptorChain<M>) -> Result<Self, BufferError>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        Self::collect(memory, chain, true)
    }

    fn collect<M>(memory: &Memory, chain: DescriptorChain<M>, writable: bool) -> Result<Self, BufferError>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        let mut segments = Vec::new();
        let mut len = 0_usize;
        let mut complete = false;
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_SEGMENTS {
                return Err(BufferError::TooLarge);
            }
            complete = !descriptor.has_next();
            if descriptor.is_write_only() != writable {
                return Err(BufferError::Direction);
            }
            let size = usize::try_from(descriptor.len()).map_err(|_| BufferError::TooLarge)?;
            if size == 0 {
                continue;
            }
            len = len.checked_add(size).ok_or(BufferError::TooLarge)?;
            let slice = memory.get_slice(descriptor.addr(), size).map_err(|_| BufferError::Address)?;
            segments.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: size });
        }
        // The iterator ends without a word at a descriptor that it cannot follow.
        if !complete {
            return Err(BufferError::Chain);
        }
        Ok(Self { segments, len, _memory: memory.clone() })
    }

    /// Bytes in all buffers.
    pub fn size(&self) -> usize {
        self.len
    }

    /// Copies from the buffers. `false` if they end before `data` is full.
    #[must_use]
    pub fn read(&self, offset: usize, data: &mut [u8]) -> bool {
        let mut done = 0;
        for slice in self.window(offset, data.len()) {
            let Some(part) = data.get_mut(done..) else { break };
            done += volatile(&slice).read(part, 0).unwrap_or(0);
        }
        done == data.len()
    }

    /// Copies into the buffers. `false` if they end before all of `data` is there.
    #[must_use]
    pub fn write(&self, offset: usize, data: &[u8]) -> bool {
        let mut done = 0;
        for slice in self.window(offset, data.len()) {
            let Some(part) = data.get(done..) else { break };
            done += volatile(&slice).write(part, 0).unwrap_or(0);
        }
        done == data.len()
    }

    /// Sends up to `limit` bytes from `offset` on a socket, without blocking and without SIGPIPE.
    pub fn send(&self, socket: impl AsFd, offset: usize, limit: usize) -> io::Result<usize> {
        let socket = socket.as_fd().as_raw_fd();
        let mut sent = 0;
        // One by one: sendmsg(2) would send all parts at once, but it can also send descriptors, so no thread's filter allows
        // it.
        for part in self.window(offset, limit) {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the buffer is guest memory by the invariant of `segments`.
            match retry(|| unsafe { libc::send(socket, part.iov_base, part.iov_len, flags) }) {
                Ok(bytes) => {
                    sent += bytes;
                    if bytes < part.iov_len {
                        break;
                    }
                }
                // Report what was sent; the next call for the rest gets the error.
                Err(_) if sent > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(sent)
    }

    /// Receives up to `limit` bytes from a socket to `offset`, without blocking. 0 is the end of the stream.
    pub fn receive(&self, socket: impl AsFd, offset: usize, limit: usize) -> io::Result<usize> {
        let mut iov: Vec<_> = self.window(offset, limit).collect();
        let mut header = message(&mut iov);
        // SAFETY: `header` leads to `iov`, whose buffers are guest memory by the invariant of `segments`.
        retry(|| unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut header, libc::MSG_DONTWAIT) })
    }

    /// writev(2) of `head` and what follows `offset`.
    pub fn write_to(&self, file: impl AsFd, head: &[u8], offset: usize) -> io::Result<usize> {
        let mut iov = vec![libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() }];
        iov.extend(self.window(offset, usize::MAX).take(MAX_SEGMENTS - 1));
        let count = count(&iov);
        // SAFETY: The first buffer is `head`, which is only read; the others are guest memory by the invariant of
        // `segments`.
        retry(|| unsafe { libc::writev(file.as_fd().as_raw_fd(), iov.as_ptr(), count) })
    }

    /// readv(2) into `head`, and then into several chains, one after the other.
    pub fn read_from<'a>(
        file: impl AsFd,
        head: &mut [u8],
        chains: impl Iterator<Item = &'a Self>,
    ) -> io::Result<usize> {
        let own = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() };
        let theirs = chains.flat_map(|chain| chain.segments.iter().copied());
        let iov: Vec<_> = std::iter::once(own).filter(|own| own.iov_len > 0).chain(theirs).take(MAX_SEGMENTS).collect();
        // SAFETY: The first buffer is `head`, if that is not empty; every other is guest memory by the invariant of `segments`.
        retry(|| unsafe { libc::readv(file.as_fd().as_raw_fd(), iov.as_ptr(), count(&iov)) })
    }

    /// The part of the buffers from `offset` on, `limit` bytes at most.
    fn window(&self, offset: usize, limit: usize) -> impl Iterator<Item = libc::iovec> + '_ {
        let (mut skip, mut left) = (offset, limit);
        self.segments.iter().filter_map(move |segment| {
            let start = skip.min(segment.iov_len);
            skip -= start;
            let len = (segment.iov_len - start).min(left);
            left -= len;
            // Wrapping and plain addition agree: `start` is within the segment.
            let base = segment.iov_base.cast::<u8>().wrapping_add(start);
            (len > 0).then_some(libc::iovec { iov_base: base.cast(), iov_len: len })
        })
    }
}

fn volatile(segment: &libc::iovec) -> VolatileSlice<'_> {
    // SAFETY: Called only with parts of `segments`, whose invariant makes them guest memory.
    unsafe { VolatileSlice::new(segment.iov_base.cast(), segment.iov_len) }
}

fn message(iov: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: All of msghdr's fields are integers and pointers that may be null.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = iov.as_mut_ptr();
    header.msg_iovlen = iov.len();
    header
}

fn count(iov: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(iov.len()).unwrap_or(libc::c_int::MAX)
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// A chain that the device will not use.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BufferError {
    /// It loops, leaves its table or its memory, or holds an indirect table where there must be none.
    #[error("descriptor chain is broken")]
    Chain,
    /// A buffer is outside of the guest's memory.
    #[error("descriptor points outside of the guest's memory")]
    Address,
    /// Writable where it must be readable, or the reverse.
    #[error("descriptor is of the wrong direction")]
    Direction,
    /// Beyond [`MAX_SEGMENTS`], or the lengths overflow.
    #[error("descriptor chain is longer than {MAX_SEGMENTS} buffers")]
    TooLarge,
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use super::*;
    use crate::virtio::ring::Ring;
    use crate::virtio::testing::{DriverQueue, INDIRECT, NEXT, TestInterrupt, activation, memory};
    use vm_memory::GuestAddress;

    /// The buffers of what is at the head of a queue with one chain.
    fn collect(memory: &Memory, driver: &DriverQueue) -> Result<Buffers, BufferError> {
        let interrupt = Arc::new(TestInterrupt::default());
        let mut ring = Ring::take(&mut activation(memory, 0, &[driver], &interrupt), 0).unwrap();
        Buffers::readable(memory, ring.pop().unwrap().unwrap())
    }

    #[test]
    fn hostile_05_chain_that_breaks_off_is_an_error_and_not_a_shorter_chain() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
        driver.descriptor(0, 0x4000, 16, NEXT, 9);
        driver.offer(0);
        assert_eq!(collect(&memory, &driver).err(), Some(BufferError::Chain));
    }

    #[test]
    fn hostile_05_buffer_that_wraps_or_leaves_memory_is_an_error() {
        for address in [u64::MAX - 7, (16 << 20) - 8, 1 << 40] {
            let memory = memory();
            let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
            driver.add(&[(0x4000, 16, false), (address, 16, false)]);
            assert_eq!(collect(&memory, &driver).err(), Some(BufferError::Address), "{address:#x}");
        }
    }

    #[test]
    fn hostile_05_buffer_of_the_wrong_direction_is_an_error() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
        driver.add(&[(0x4000, 16, false), (0x5000, 16, true)]);
        assert_eq!(collect(&memory, &driver).err(), Some(BufferError::Direction));
    }

    #[test]
    fn hostile_05_chain_of_more_buffers_or_bytes_than_may_be_is_an_error() {
        const TABLE: u64 = 0x20_0000;
        // The same buffer again and again: too many of them, too many empty ones, and more than 4 GiB.
        for (count, len, error) in
            [(1025, 16, BufferError::TooLarge), (1025, 0, BufferError::TooLarge), (600, 8 << 20, BufferError::Chain)]
        {
            let memory = memory();
            let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
            let table = DriverQueue::new(&memory, TABLE, 8);
            (0..count).for_each(|i| table.descriptor(i, 0x80_0000, len, if i + 1 < count { NEXT } else { 0 }, i + 1));
            driver.descriptor(0, TABLE, u32::from(count) * 16, INDIRECT, 0);
            driver.offer(0);
            assert_eq!(collect(&memory, &driver).err(), Some(error), "{count}");
        }
    }

    #[test]
    fn payload_of_several_buffers_is_sent_in_order_and_as_far_as_the_socket_takes_it() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
        memory.write_slice(b"abcdefghi", GuestAddress(0x4000)).unwrap();
        driver.add(&[(0x4000, 3, false), (0x4003, 3, false), (0x4006, 3, false)]);
        let buffers = collect(&memory, &driver).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(buffers.send(&ours, 1, 7).unwrap(), 7);
        let mut got = [0; 7];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"bcdefgh");
        // Full, then gone: an error and no signal.
        while buffers.send(&ours, 0, 9).is_ok_and(|sent| sent == 9) {}
        assert_eq!(buffers.send(&ours, 0, 9).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        assert_eq!(buffers.send(&ours, 0, 9).unwrap_err().raw_os_error(), Some(libc::EPIPE));
    }

    #[test]
    fn what_a_socket_takes_of_a_payload_is_a_part_from_its_start() {
        const LEN: u32 = 1 << 20;
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
        let bytes: Vec<_> = (0..=250).cycle().take(3 * LEN as usize).collect();
        memory.write_slice(&bytes, GuestAddress(0x40_0000)).unwrap();
        driver.add(&[0, 1, 2].map(|part| (0x40_0000 + u64::from(part * LEN), LEN, false)));
        let buffers = collect(&memory, &driver).unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sent = buffers.send(&ours, 0, usize::MAX).unwrap();
        assert!(sent > 0 && sent < LEN as usize, "{sent}");
        drop(ours);
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        assert!(got == bytes[..sent], "{} of {sent} bytes", got.len());
    }

    #[test]
    fn hostile_06_descriptors_that_change_after_the_walk_change_nothing() {
        let memory = memory();
        let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
        memory.write_slice(b"first", GuestAddress(0x4000)).unwrap();
        driver.add(&[(0x4000, 5, false)]);
        let buffers = collect(&memory, &driver).unwrap();
        driver.descriptor(0, u64::MAX - 100, u32::MAX, NEXT, 0);
        let mut bytes = [0; 5];
        assert!(buffers.read(0, &mut bytes));
        assert_eq!((&bytes, buffers.size()), (b"first", 5));
        // Beyond what was walked there is nothing.
        assert!(!buffers.read(1, &mut bytes) && !buffers.write(5, &[0]) && !buffers.read(usize::MAX, &mut bytes));
    }
}
