//! Socket options that the system call crates do not know, with values of any length.
#![allow(unsafe_code, reason = "getsockopt(2) and setsockopt(2) with options of x_tables and netlink")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Fills `value` with an option's value, which also says what is asked for; returns how many bytes of it.
pub fn get(socket: impl AsFd, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    let (fd, pointer) = (socket.as_fd().as_raw_fd(), value.as_mut_ptr().cast());
    // SAFETY: `pointer` is to `length` bytes that may be written, and `length` to itself; the kernel keeps neither.
    let got = unsafe { libc::getsockopt(fd, level, name, pointer, &raw mut length) };
    if got >= 0 { Ok(usize::try_from(length).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// Sets an option. The value may hold no pointer; see [`replace`].
pub fn set(socket: impl AsFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    let (fd, pointer) = (socket.as_fd().as_raw_fd(), value.as_ptr().cast());
    // SAFETY: `pointer` is to `length` bytes, which the kernel reads and does not keep a pointer to.
    let set = unsafe { libc::setsockopt(fd, level, name, pointer, length) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `IPT_SO_SET_REPLACE` of linux/netfilter_ipv4/ip_tables.h: writes the address of `counters` at `place` of `value`, for the
/// kernel fills them with those of the rules that are replaced.
pub fn replace(
    socket: impl AsFd,
    level: i32,
    name: i32,
    value: &mut [u8],
    place: usize,
    counters: &mut [[u64; 2]],
) -> io::Result<()> {
    let address = counters.as_mut_ptr().expose_provenance();
    let field = value.get_mut(place..place + size_of::<usize>()).ok_or(io::ErrorKind::InvalidInput)?;
    field.copy_from_slice(&address.to_ne_bytes());
    set(socket, level, name, value)
}
