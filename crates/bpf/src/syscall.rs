//! bpf(2).
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::ffi::c_uint;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::Instruction;

/// Commands, types and flags of `linux/bpf.h`.
const BPF_MAP_CREATE: c_uint = 0;
const BPF_MAP_UPDATE_ELEM: c_uint = 2;
const BPF_PROG_LOAD: c_uint = 5;
const BPF_PROG_ATTACH: c_uint = 8;
const BPF_LINK_CREATE: c_uint = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_SK_LOOKUP: u32 = 36;
/// Programs of groups above and below count as well.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The verifier gives up with EAGAIN when a signal is pending, and children that end send many.
const LOAD_ATTEMPTS: u32 = 5;

/// Where a program runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ProgramType {
    /// When a process of a control group uses a device (Linux: admin-guide/cgroup-v2.rst, "Device controller").
    CgroupDevice,
    /// When a connection looks for its listener (Linux: Documentation/bpf/prog_sk_lookup.rst; 5.9).
    SocketLookup,
}

impl ProgramType {
    /// The type's number, and that of the place where it is going to be attached, of those types whose load wants to know it.
    const fn numbers(self) -> (u32, u32) {
        match self {
            Self::CgroupDevice => (BPF_PROG_TYPE_CGROUP_DEVICE, 0),
            Self::SocketLookup => (BPF_PROG_TYPE_SK_LOOKUP, BPF_SK_LOOKUP),
        }
    }
}

/// Heads of `union bpf_attr`, one for each command. What is left out the kernel takes for zero.
#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

#[repr(C)]
struct UpdateAttributes {
    map: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[derive(Default)]
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_kind: u32,
}

#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_kind: u32,
    flags: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_kind: u32,
    flags: u32,
}

/// Loads a program. Fails with EINVAL or EACCES if the kernel's verifier does not accept it.
pub fn load(kind: ProgramType, program: &[Instruction]) -> io::Result<OwnedFd> {
    let (kind, attach_kind) = kind.numbers();
    let attributes = LoadAttributes {
        kind,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        attach_kind,
        ..LoadAttributes::default()
    };
    // SAFETY: the kernel reads the program and its license, which outlive the call; it writes nothing, since no log was
    // asked for.
    let load = || unsafe { bpf(BPF_PROG_LOAD, &attributes) };
    let mut loaded = load();
    for _ in 1..LOAD_ATTEMPTS {
        match &loaded {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => loaded = load(),
            _ => break,
        }
    }
    own(loaded?)
}

/// Attaches a device program to a control group. The group keeps it.
pub fn attach_to_cgroup(program: &impl AsFd, group: &impl AsFd) -> io::Result<()> {
    let attributes = AttachAttributes {
        target: number(group)?,
        program: number(program)?,
        attach_kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the command reads the attributes alone.
    unsafe { bpf(BPF_PROG_ATTACH, &attributes) }.map(drop)
}

/// Attaches a program of the socket lookup to a network namespace, until the answer is dropped.
pub fn attach_to_netns(program: &impl AsFd, netns: &impl AsFd) -> io::Result<OwnedFd> {
    let attributes =
        LinkAttributes { program: number(program)?, target: number(netns)?, attach_kind: BPF_SK_LOOKUP, flags: 0 };
    // SAFETY: the command reads the attributes alone.
    own(unsafe { bpf(BPF_LINK_CREATE, &attributes) }?)
}

/// A map from numbers to sockets (BPF_MAP_TYPE_SOCKMAP), because that is how a program can name a socket.
#[derive(Debug)]
pub struct SocketMap(OwnedFd);

impl SocketMap {
    /// An empty one, for the keys from 0 to below `size`.
    pub fn new(size: u32) -> io::Result<Self> {
        let attributes = MapAttributes { kind: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: size };
        // SAFETY: the command reads the attributes alone.
        own(unsafe { bpf(BPF_MAP_CREATE, &attributes) }?).map(Self)
    }

    /// Enters a socket. The map does not keep it open.
    pub fn put(&self, key: u32, socket: &impl AsFd) -> io::Result<()> {
        let value = u64::from(number(socket)?);
        let attributes = UpdateAttributes {
            map: number(&self.0)?,
            _padding: 0,
            key: (&raw const key).addr() as u64,
            value: (&raw const value).addr() as u64,
            flags: 0,
        };
        // SAFETY: the kernel reads four bytes at `key` and eight at `value`, the sizes of the map, and both outlive the call.
        unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }.map(drop)
    }
}

impl AsFd for SocketMap {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn number(fd: &impl AsFd) -> io::Result<u32> {
    u32::try_from(fd.as_fd().as_raw_fd()).map_err(io::Error::other)
}

fn own(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call succeeded, so the number is a new descriptor, close-on-exec, that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2). Answers with the new descriptor of commands that make one.
///
/// # Safety
///
/// `attributes` is a head of `union bpf_attr` as the command reads it, and what it points to is as the command wants it.
unsafe fn bpf<T>(command: c_uint, attributes: &T) -> io::Result<i32> {
    let attributes = (std::ptr::from_ref(attributes), size_of::<T>());
    // SAFETY: by the caller's promise; the kernel reads as many bytes of the attributes as it is told.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.0, attributes.1) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}
