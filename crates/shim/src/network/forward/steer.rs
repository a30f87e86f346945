//! A program of the socket lookup (Linux: Documentation/bpf/prog_sk_lookup.rst): it runs when a TCP connection arrives in
//! a network namespace and says which listener gets it, whatever its address and port.
//!
//! What is in it, in words: TCP to 127.0.0.0/8 goes to the IPv4 listener, TCP to ::1 to the IPv6 one, all else is none of
//! its business. The listeners are in a map, because that is how a program can name a socket.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_bpf::{Instruction, ProgramType, Register, SocketMap};

/// Helpers of the kernel's, and what the program answers (linux/bpf.h).
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
const IPV4: u8 = 0;
const IPV6: u8 = 1;

/// Registers: a call's answer and its arguments, two that calls leave alone, the end of the stack.
const R0: Register = Register::R0;
const R1: Register = Register::R1;
const R2: Register = Register::R2;
const R3: Register = Register::R3;
const CONTEXT: Register = Register::R6;
const SOCKET: Register = Register::R7;
const FRAME: Register = Register::R10;

/// Where on the stack the key of the map is.
const KEY: i16 = -4;

/// The program. A jump counts from the instruction behind it.
fn program(map: &SocketMap) -> [Instruction; 33] {
    let [load_map, other_half] = Instruction::load_map(R1, map);
    [
        Instruction::copy(CONTEXT, R1),
        Instruction::load_word(R0, CONTEXT, PROTOCOL),
        Instruction::jump_unless_equal(R0, IPPROTO_TCP, 28), // to "pass"
        Instruction::load_word(R0, CONTEXT, FAMILY),
        Instruction::jump_if_equal(R0, AF_INET6, 4), // to "IPv6"
        Instruction::load_byte(R0, CONTEXT, LOCAL_IP4),
        Instruction::jump_unless_equal(R0, LOOPBACK_NET, 24), // to "pass"
        Instruction::store_word(FRAME, KEY, IPV4.into()),
        Instruction::jump(9), // to "steer"
        // IPv6
        Instruction::load_word(R0, CONTEXT, LOCAL_IP6[0]),
        Instruction::jump_unless_equal(R0, 0, 20), // to "pass"
        Instruction::load_word(R0, CONTEXT, LOCAL_IP6[1]),
        Instruction::jump_unless_equal(R0, 0, 18), // to "pass"
        Instruction::load_word(R0, CONTEXT, LOCAL_IP6[2]),
        Instruction::jump_unless_equal(R0, 0, 16), // to "pass"
        Instruction::load_word(R0, CONTEXT, LOCAL_IP6[3]),
        Instruction::jump_unless_equal(R0, IPV6_LAST, 14), // to "pass"
        Instruction::store_word(FRAME, KEY, IPV6.into()),
        // steer: socket = lookup(map, &key)
        Instruction::copy(R2, FRAME),
        Instruction::add(R2, KEY.into()),
        load_map,
        other_half,
        Instruction::call(MAP_LOOKUP_ELEM),
        Instruction::jump_if_equal(R0, 0, 7), // to "pass"
        // assign(context, socket, no flags); release(socket)
        Instruction::copy(SOCKET, R0),
        Instruction::copy(R1, CONTEXT),
        Instruction::copy(R2, SOCKET),
        Instruction::set(R3, 0),
        Instruction::call(SK_ASSIGN),
        Instruction::copy(R1, SOCKET),
        Instruction::call(SK_RELEASE),
        // pass: the lookup goes on, with the socket that was assigned if one was
        Instruction::set(R0, SK_PASS),
        Instruction::exit(),
    ]
}

/// Steers the calling thread's network namespace to the listeners. The steering ends when the answer is dropped.
pub fn attach(ipv4: BorrowedFd<'_>, ipv6: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let map = SocketMap::new(2)?;
    for (key, listener) in [(IPV4, Some(ipv4)), (IPV6, ipv6)] {
        if let Some(listener) = listener {
            map.put(key.into(), &listener)?;
        }
    }
    let program = bulkhead_bpf::load(ProgramType::SocketLookup, &program(&map))?;
    let netns = std::fs::File::open("/proc/thread-self/ns/net")?;
    bulkhead_bpf::attach_to_netns(&program, &netns)
}
