//! Programs that the kernel runs at a hook (bpf(2), linux/bpf.h): writing one, loading it, attaching it to a control group or to
//! a network namespace. Only what shim and agent need of it: programs of a page, written by hand, and a library in C less.

mod instruction;
mod syscall;

pub use instruction::{Instruction, Register, opcode};
pub use syscall::{ProgramType, SocketMap, attach_to_cgroup, attach_to_netns, load};
