//! Between a file and the guest's memory without a copy: preadv(2) and pwritev(2).
//!
//! They take an offset, so that several machines can share one open image, and the file's own position plays no part.
#![allow(unsafe_code)] // the kernel is given addresses in the guest's memory

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{GuestMemory, GuestMemoryMmap};

use super::request::Segment;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// preadv(2).
    FromFile,
    /// pwritev(2).
    ToFile,
}

/// Transfers all of the segments, or fails.
pub fn transfer(
    file: &File,
    offset: u64,
    data: &[Segment],
    memory: &GuestMemoryMmap,
    direction: Direction,
) -> io::Result<()> {
    let mut vectors = vectors(data, memory)?;
    let mut rest = vectors.as_mut_slice();
    let mut offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    while !rest.is_empty() {
        let count = libc::c_int::try_from(rest.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: each vector is a range of the guest's memory, which `memory` keeps mapped. It is memory that is shared
        // with the guest: nothing in this process holds a reference into it, and any bytes may be in it.
        let done = unsafe {
            match direction {
                Direction::FromFile => libc::preadv64(file.as_raw_fd(), rest.as_ptr(), count, offset),
                Direction::ToFile => libc::pwritev64(file.as_raw_fd(), rest.as_ptr(), count, offset),
            }
        };
        match usize::try_from(done) {
            // The file has become shorter, or the device is full without saying so.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => {
                offset = offset
                    .checked_add(libc::off64_t::try_from(done).unwrap_or(0))
                    .ok_or(io::ErrorKind::InvalidInput)?;
                rest = advance(rest, done);
            }
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// The segments' places in this process. One that crosses memory regions becomes several vectors.
fn vectors(data: &[Segment], memory: &GuestMemoryMmap) -> io::Result<Vec<libc::iovec>> {
    let outside =
        |_| io::Error::new(io::ErrorKind::InvalidInput, "the request's data is outside of the guest's memory");
    let mut vectors = Vec::with_capacity(data.len());
    for segment in data {
        let len = usize::try_from(segment.len).map_err(|_| io::ErrorKind::InvalidInput)?;
        for slice in memory.get_slices(segment.address, len) {
            let slice = slice.map_err(outside)?;
            vectors.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
    }
    Ok(vectors)
}

/// What is left after `done` bytes.
fn advance(vectors: &mut [libc::iovec], mut done: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    for vector in &*vectors {
        if done < vector.iov_len {
            break;
        }
        done -= vector.iov_len;
        whole += 1;
    }
    let rest = vectors.get_mut(whole..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        // SAFETY: `done` is less than the vector's length, so the result is within the same mapping.
        first.iov_base = unsafe { first.iov_base.cast::<u8>().add(done) }.cast();
        first.iov_len -= done;
    }
    rest
}
