//! A program of the socket lookup (Linux: Documentation/bpf/prog_sk_lookup.rst): it runs when a TCP connection arrives in
//! a network namespace and says which listener gets it, whatever its address and port.
//!
//! What is in it, in words: TCP to 127.0.0.0/8 goes to the IPv4 listener, TCP to ::1 to the IPv6 one, all else is none of
//! its business. The listeners are in a map, because that is how a program can name a socket.
#![allow(unsafe_code)] // reason: bpf(2) has no safe wrapper

use std::ffi::c_uint;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Commands, types and helpers of linux/bpf.h.
const BPF_MAP_CREATE: c_uint = 0;
const BPF_MAP_UPDATE_ELEM: c_uint = 2;
const BPF_PROG_LOAD: c_uint = 5;
const BPF_LINK_CREATE: c_uint = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_PSEUDO_MAP_FD: u8 = 1;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
const SK_PASS: i32 = 1;

/// Offsets in `struct bpf_sk_lookup`; addresses are in network order.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];

const AF_INET6: i32 = 10;
const IPPROTO_TCP: i32 = 6;
/// The first byte of 127.0.0.0/8.
const LOOPBACK_NET: i32 = 127;
/// The last word of ::1 as the kernel holds it.
const IPV6_LAST: i32 = 1_i32.to_be();

/// The listeners' places in the map.
const IPV4: i32 = 0;
const IPV6: i32 = 1;

/// Opcodes of linux/bpf.h and linux/bpf_common.h.
const LOAD_WORD: u8 = 0x61;
const LOAD_BYTE: u8 = 0x71;
const LOAD_MAP: u8 = 0x18;
const STORE_WORD: u8 = 0x62;
const MOVE_VALUE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD_VALUE: u8 = 0x07;
const JUMP: u8 = 0x05;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Registers: a call's answer and its arguments, two that calls leave alone, the end of the stack.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const FRAME: u8 = 10;

/// Where on the stack the key of the map is.
const KEY: i16 = -4;

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    value: i32,
}

const fn op(code: u8, to: u8, from: u8, offset: i16, value: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, value }
}

/// The program. A jump counts from the instruction behind it.
fn program(map: i32) -> [Instruction; 33] {
    [
        op(MOVE_REGISTER, CONTEXT, R1, 0, 0),
        op(LOAD_WORD, R0, CONTEXT, PROTOCOL, 0),
        op(JUMP_UNLESS_EQUAL, R0, 0, 28, IPPROTO_TCP), // to "pass"
        op(LOAD_WORD, R0, CONTEXT, FAMILY, 0),
        op(JUMP_IF_EQUAL, R0, 0, 4, AF_INET6), // to "IPv6"
        op(LOAD_BYTE, R0, CONTEXT, LOCAL_IP4, 0),
        op(JUMP_UNLESS_EQUAL, R0, 0, 24, LOOPBACK_NET), // to "pass"
        op(STORE_WORD, FRAME, 0, KEY, IPV4),
        op(JUMP, 0, 0, 9, 0), // to "steer"
        // IPv6
        op(LOAD_WORD, R0, CONTEXT, LOCAL_IP6[0], 0),
        op(JUMP_UNLESS_EQUAL, R0, 0, 20, 0), // to "pass"
        op(LOAD_WORD, R0, CONTEXT, LOCAL_IP6[1], 0),
        op(JUMP_UNLESS_EQUAL, R0, 0, 18, 0), // to "pass"
        op(LOAD_WORD, R0, CONTEXT, LOCAL_IP6[2], 0),
        op(JUMP_UNLESS_EQUAL, R0, 0, 16, 0), // to "pass"
        op(LOAD_WORD, R0, CONTEXT, LOCAL_IP6[3], 0),
        op(JUMP_UNLESS_EQUAL, R0, 0, 14, IPV6_LAST), // to "pass"
        op(STORE_WORD, FRAME, 0, KEY, IPV6),
        // steer: socket = lookup(map, &key)
        op(MOVE_REGISTER, R2, FRAME, 0, 0),
        op(ADD_VALUE, R2, 0, 0, KEY as i32),
        op(LOAD_MAP, R1, BPF_PSEUDO_MAP_FD, 0, map),
        op(0, 0, 0, 0, 0), // the load's other half
        op(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        op(JUMP_IF_EQUAL, R0, 0, 7, 0), // to "pass"
        // assign(context, socket, no flags); release(socket)
        op(MOVE_REGISTER, SOCKET, R0, 0, 0),
        op(MOVE_REGISTER, R1, CONTEXT, 0, 0),
        op(MOVE_REGISTER, R2, SOCKET, 0, 0),
        op(MOVE_VALUE, R3, 0, 0, 0),
        op(CALL, 0, 0, 0, SK_ASSIGN),
        op(MOVE_REGISTER, R1, SOCKET, 0, 0),
        op(CALL, 0, 0, 0, SK_RELEASE),
        // pass: the lookup goes on, with the socket that was assigned if one was
        op(MOVE_VALUE, R0, 0, 0, SK_PASS),
        op(EXIT, 0, 0, 0, 0),
    ]
}

/// Steers the calling thread's network namespace to the listeners. The steering ends when the answer is dropped.
pub fn attach(ipv4: BorrowedFd<'_>, ipv6: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let map = create_map()?;
    for (key, listener) in [(IPV4, Some(ipv4)), (IPV6, ipv6)] {
        if let Some(listener) = listener {
            put(&map, key, listener)?;
        }
    }
    let program = load(&program(map.as_raw_fd()))?;
    let netns = std::fs::File::open("/proc/thread-self/ns/net")?;
    link(&program, &netns)
}

/// The head of `union bpf_attr` for each command. What is left out the kernel takes for zero.
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
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_kind: u32,
    flags: u32,
}

fn create_map() -> io::Result<OwnedFd> {
    let attributes = MapAttributes { kind: BPF_MAP_TYPE_SOCKMAP, key_size: 4, value_size: 8, max_entries: 2 };
    // SAFETY: the command reads the attributes alone.
    own(unsafe { bpf(BPF_MAP_CREATE, &attributes) }?)
}

fn put(map: &OwnedFd, key: i32, listener: BorrowedFd<'_>) -> io::Result<()> {
    let value = u64::from(number(&listener)?);
    let attributes = UpdateAttributes {
        map: number(map)?,
        _padding: 0,
        key: (&raw const key).addr() as u64,
        value: (&raw const value).addr() as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads four bytes at `key` and eight at `value`, the sizes of the map, and both outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &attributes) }.map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        attach_kind: BPF_SK_LOOKUP,
        ..LoadAttributes::default()
    };
    // SAFETY: the kernel reads the program and its license, which outlive the call; it writes nothing, since no log was
    // asked for.
    own(unsafe { bpf(BPF_PROG_LOAD, &attributes) }?)
}

fn link(program: &OwnedFd, netns: &std::fs::File) -> io::Result<OwnedFd> {
    let attributes =
        LinkAttributes { program: number(program)?, target: number(netns)?, attach_kind: BPF_SK_LOOKUP, flags: 0 };
    // SAFETY: the command reads the attributes alone.
    own(unsafe { bpf(BPF_LINK_CREATE, &attributes) }?)
}

fn number(fd: &impl AsRawFd) -> io::Result<u32> {
    u32::try_from(fd.as_raw_fd()).map_err(io::Error::other)
}

fn own(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call succeeded, so the number is a new descriptor, close-on-exec, that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// bpf(2).
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
