//! The little of bpf(2) that a device program takes: a handful of instructions, loading, attaching.
#![allow(unsafe_code, reason = "bpf(2) has no safe wrapper")]

use std::ffi::c_uint;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const BPF_PROG_LOAD: c_uint = 5;
const BPF_PROG_ATTACH: c_uint = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Programs of groups above and below count as well.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Opcodes, from `linux/bpf.h` and `linux/bpf_common.h`.
const LOAD_WORD: u8 = 0x61;
const MOVE_VALUE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const AND_VALUE: u8 = 0x57;
const SHIFT_RIGHT_VALUE: u8 = 0x77;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const EXIT: u8 = 0x95;
/// The register that a program's argument is in.
const CONTEXT: u8 = 1;

/// The registers of a device program. The kernel fixes the first; the others are those that it leaves alone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Register {
    /// The answer: 1 allows.
    Result = 0,
    /// Kind of the device.
    Kind = 2,
    /// Kinds of access asked for.
    Access = 3,
    /// Major number.
    Major = 4,
    /// Minor number.
    Minor = 5,
    /// For computing.
    Scratch = 6,
}

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    value: i32,
}

impl Instruction {
    fn new(code: u8, register: Register, value: i32) -> Self {
        Self { code, registers: register as u8, offset: 0, value }
    }

    /// Loads a word of the program's argument.
    pub fn load(register: Register, offset: i16) -> Self {
        Self { code: LOAD_WORD, registers: CONTEXT << 4 | register as u8, offset, value: 0 }
    }

    /// Sets a register.
    pub fn set(register: Register, value: i32) -> Self {
        Self::new(MOVE_VALUE, register, value)
    }

    /// Copies a register.
    pub fn copy(to: Register, from: Register) -> Self {
        Self { code: MOVE_REGISTER, registers: (from as u8) << 4 | to as u8, offset: 0, value: 0 }
    }

    /// Clears the bits that a value does not have.
    pub fn and(register: Register, value: i32) -> Self {
        Self::new(AND_VALUE, register, value)
    }

    /// Shifts a register.
    pub fn shift_right(register: Register, bits: i32) -> Self {
        Self::new(SHIFT_RIGHT_VALUE, register, bits)
    }

    /// Jumps if a register has a value; how far is set by [`Self::jump_over`].
    pub fn jump_if_equal(register: Register, value: i32) -> Self {
        Self::new(JUMP_IF_EQUAL, register, value)
    }

    /// Jumps unless a register has a value; how far is set by [`Self::jump_over`].
    pub fn jump_unless_equal(register: Register, value: i32) -> Self {
        Self::new(JUMP_UNLESS_EQUAL, register, value)
    }

    /// Ends the program.
    pub fn exit() -> Self {
        Self::new(EXIT, Register::Result, 0)
    }

    /// Sets how many instructions a jump skips. No other instruction changes.
    pub fn jump_over(&mut self, count: i16) {
        if matches!(self.code, JUMP_IF_EQUAL | JUMP_UNLESS_EQUAL) {
            self.offset = count;
        }
    }

    /// What the instruction does to the registers of an interpreter: the next instruction's index, `None` at the end.
    #[cfg(test)]
    pub fn step(self, at: usize, context: &[u64; 3], registers: &mut [u64; 16]) -> Option<usize> {
        let (to, from) = (usize::from(self.registers & 15), usize::from(self.registers >> 4));
        let value = u64::from(self.value.unsigned_abs());
        let mut next = at + 1;
        match self.code {
            LOAD_WORD => registers[to] = context[usize::try_from(self.offset).unwrap() / 4],
            MOVE_VALUE => registers[to] = value,
            MOVE_REGISTER => registers[to] = registers[from],
            AND_VALUE => registers[to] &= value,
            SHIFT_RIGHT_VALUE => registers[to] >>= value,
            JUMP_IF_EQUAL if registers[to] == value => next += usize::try_from(self.offset).unwrap(),
            JUMP_UNLESS_EQUAL if registers[to] != value => next += usize::try_from(self.offset).unwrap(),
            JUMP_IF_EQUAL | JUMP_UNLESS_EQUAL => {}
            EXIT => return None,
            code => panic!("opcode {code:#x}"),
        }
        Some(next)
    }
}

/// The head of `union bpf_attr` for loading.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

/// The head of `union bpf_attr` for attaching.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// The verifier gives up with EAGAIN when a signal is pending, and children that end send many.
const LOAD_ATTEMPTS: u32 = 5;

/// Loads a device program.
pub fn load_device_program(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr().addr() as u64,
        license: c"Apache-2.0".as_ptr().addr() as u64,
        ..Default::default()
    };
    let mut loaded = bpf(BPF_PROG_LOAD, &attributes);
    for _ in 1..LOAD_ATTEMPTS {
        match &loaded {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => loaded = bpf(BPF_PROG_LOAD, &attributes),
            _ => break,
        }
    }
    let fd = loaded?;
    // SAFETY: the call succeeded, so the number is a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Attaches a device program to a control group. The group keeps it.
pub fn attach_device_program(group: impl AsFd, program: impl AsFd) -> io::Result<()> {
    let number = |fd: i32| u32::try_from(fd).map_err(io::Error::other);
    let attributes = AttachAttributes {
        target: number(group.as_fd().as_raw_fd())?,
        program: number(program.as_fd().as_raw_fd())?,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(drop)
}

/// bpf(2) with a structure that is a head of `union bpf_attr`; the kernel takes what it leaves out for zero.
fn bpf<T>(command: c_uint, attributes: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of the structure, and from there the program and its license, which
    // outlive the call; it writes nothing, since no log was asked for.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), std::mem::size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { i32::try_from(result).map_err(io::Error::other) }
}
