//! Instructions (Linux: Documentation/bpf/standardization/instruction-set.rst).

use std::os::fd::{AsFd, AsRawFd};

/// What an instruction does, from `linux/bpf.h` and `linux/bpf_common.h`. Arithmetic is that of 64 bits.
pub mod opcode {
    /// Loads a word from memory.
    pub const LOAD_WORD: u8 = 0x61;
    /// Loads a byte from memory.
    pub const LOAD_BYTE: u8 = 0x71;
    /// Loads what the next instruction is the other half of.
    pub const LOAD_DOUBLE: u8 = 0x18;
    /// Writes a constant word to memory.
    pub const STORE_WORD: u8 = 0x62;
    /// Sets a register.
    pub const MOVE_VALUE: u8 = 0xb7;
    /// Copies a register.
    pub const MOVE_REGISTER: u8 = 0xbf;
    /// Adds a constant.
    pub const ADD_VALUE: u8 = 0x07;
    /// Keeps the bits of a constant.
    pub const AND_VALUE: u8 = 0x57;
    /// Shifts by a constant.
    pub const SHIFT_RIGHT_VALUE: u8 = 0x77;
    /// Jumps.
    pub const JUMP: u8 = 0x05;
    /// Jumps if a register is equal to a constant.
    pub const JUMP_IF_EQUAL: u8 = 0x15;
    /// Jumps if a register is not equal to a constant.
    pub const JUMP_UNLESS_EQUAL: u8 = 0x55;
    /// Calls a helper of the kernel's.
    pub const CALL: u8 = 0x85;
    /// Ends the program.
    pub const EXIT: u8 = 0x95;
}

/// For [`opcode::LOAD_DOUBLE`]: the number is a descriptor of a map, and the kernel puts the map's address in its place.
const BPF_PSEUDO_MAP_FD: u8 = 1;

/// The machine's registers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Register {
    /// The program's result, and that of a call.
    R0 = 0,
    /// The program's argument at its start; the first argument of a call, which leaves nothing of this one to R5.
    R1 = 1,
    /// Second argument.
    R2 = 2,
    /// Third argument.
    R3 = 3,
    /// Fourth argument.
    R4 = 4,
    /// Fifth argument.
    R5 = 5,
    /// Left alone by calls, as are the next three.
    R6 = 6,
    /// See R6.
    R7 = 7,
    /// See R6.
    R8 = 8,
    /// See R6.
    R9 = 9,
    /// The end of the stack. Read-only.
    R10 = 10,
}

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(C)]
pub struct Instruction {
    /// One of [`opcode`].
    pub code: u8,
    /// Destination in the low half, source in the high one.
    pub registers: u8,
    /// Of a memory access in bytes, of a jump in instructions from the one behind it.
    pub offset: i16,
    /// A constant.
    pub value: i32,
}

impl Instruction {
    const fn new(code: u8, to: Register, from: Register, offset: i16, value: i32) -> Self {
        Self { code, registers: (from as u8) << 4 | to as u8, offset, value }
    }

    /// One that has a register and a constant.
    const fn constant(code: u8, register: Register, value: i32) -> Self {
        Self::new(code, register, Register::R0, 0, value)
    }

    /// Loads the word at an address.
    pub const fn load_word(to: Register, address: Register, offset: i16) -> Self {
        Self::new(opcode::LOAD_WORD, to, address, offset, 0)
    }

    /// Loads the byte at an address.
    pub const fn load_byte(to: Register, address: Register, offset: i16) -> Self {
        Self::new(opcode::LOAD_BYTE, to, address, offset, 0)
    }

    /// Loads a map's address. The map must be there until the program is loaded, which holds it from then on.
    pub fn load_map(to: Register, map: &impl AsFd) -> [Self; 2] {
        let number = map.as_fd().as_raw_fd();
        let load =
            Self { code: opcode::LOAD_DOUBLE, registers: BPF_PSEUDO_MAP_FD << 4 | to as u8, offset: 0, value: number };
        [load, Self { code: 0, registers: 0, offset: 0, value: 0 }]
    }

    /// Writes a word to an address.
    pub const fn store_word(address: Register, offset: i16, value: i32) -> Self {
        Self::new(opcode::STORE_WORD, address, Register::R0, offset, value)
    }

    /// Sets a register.
    pub const fn set(register: Register, value: i32) -> Self {
        Self::constant(opcode::MOVE_VALUE, register, value)
    }

    /// Copies a register.
    pub const fn copy(to: Register, from: Register) -> Self {
        Self::new(opcode::MOVE_REGISTER, to, from, 0, 0)
    }

    /// Adds to a register.
    pub const fn add(register: Register, value: i32) -> Self {
        Self::constant(opcode::ADD_VALUE, register, value)
    }

    /// Clears the bits that a value does not have.
    pub const fn and(register: Register, value: i32) -> Self {
        Self::constant(opcode::AND_VALUE, register, value)
    }

    /// Shifts a register.
    pub const fn shift_right(register: Register, bits: i32) -> Self {
        Self::constant(opcode::SHIFT_RIGHT_VALUE, register, bits)
    }

    /// Jumps over so many instructions.
    pub const fn jump(over: i16) -> Self {
        Self::new(opcode::JUMP, Register::R0, Register::R0, over, 0)
    }

    /// Jumps over so many instructions if a register has a value.
    pub const fn jump_if_equal(register: Register, value: i32, over: i16) -> Self {
        Self::new(opcode::JUMP_IF_EQUAL, register, Register::R0, over, value)
    }

    /// Jumps over so many instructions unless a register has a value.
    pub const fn jump_unless_equal(register: Register, value: i32, over: i16) -> Self {
        Self::new(opcode::JUMP_UNLESS_EQUAL, register, Register::R0, over, value)
    }

    /// Calls a helper of the kernel's, by its number in `linux/bpf.h` (BPF_FUNC_*).
    pub const fn call(helper: i32) -> Self {
        Self::constant(opcode::CALL, Register::R0, helper)
    }

    /// Ends the program.
    pub const fn exit() -> Self {
        Self::constant(opcode::EXIT, Register::R0, 0)
    }

    /// Sets how many instructions a jump skips. No other instruction changes.
    pub fn jump_over(&mut self, count: i16) {
        if matches!(self.code, opcode::JUMP | opcode::JUMP_IF_EQUAL | opcode::JUMP_UNLESS_EQUAL) {
            self.offset = count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_laid_out_as_the_kernel_reads_them() {
        let bytes = |one: Instruction| (one.code, one.registers, one.offset, one.value);
        assert_eq!(bytes(Instruction::load_word(Register::R2, Register::R1, 4)), (0x61, 0x12, 4, 0));
        assert_eq!(bytes(Instruction::store_word(Register::R10, -4, 7)), (0x62, 0x0a, -4, 7));
        assert_eq!(bytes(Instruction::copy(Register::R6, Register::R1)), (0xbf, 0x16, 0, 0));
        assert_eq!(bytes(Instruction::exit()), (0x95, 0, 0, 0));
        assert_eq!(size_of::<Instruction>(), 8);
    }

    #[test]
    fn only_jumps_are_told_how_far() {
        let (mut jump, mut exit) = (Instruction::jump_if_equal(Register::R0, 1, 0), Instruction::exit());
        jump.jump_over(3);
        exit.jump_over(3);
        assert_eq!((jump.offset, exit.offset), (3, 0));
    }
}
