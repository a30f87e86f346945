use bulkhead_bpf::opcode;
use oci_spec::runtime::LinuxDeviceCgroupBuilder;

use super::*;

fn rule(allow: bool, kind: LinuxDeviceType, numbers: Option<(i64, i64)>, access: &str) -> LinuxDeviceCgroup {
    let builder = LinuxDeviceCgroupBuilder::default().allow(allow).typ(kind).access(access);
    match numbers {
        Some((major, minor)) => builder.major(major).minor(minor).build().unwrap(),
        None => builder.build().unwrap(),
    }
}

/// Interprets the program as the kernel would.
fn allows(rules: &[LinuxDeviceCgroup], kind: i32, access: i32, major: u64, minor: u64) -> bool {
    let program = program(rules).unwrap();
    let context = [u64::try_from(access << 16 | kind).unwrap(), major, minor];
    let (mut registers, mut at) = ([0; 16], 0);
    while let Some(next) = step(program[at], at, &context, &mut registers) {
        at = next;
    }
    registers[0] == 1
}

/// What an instruction does to the registers: the next instruction's index, `None` at the end.
fn step(instruction: Instruction, at: usize, context: &[u64; 3], registers: &mut [u64; 16]) -> Option<usize> {
    let (to, from) = (usize::from(instruction.registers & 15), usize::from(instruction.registers >> 4));
    let value = u64::from(instruction.value.unsigned_abs());
    let offset = usize::try_from(instruction.offset).unwrap();
    let mut next = at + 1;
    match instruction.code {
        opcode::LOAD_WORD => registers[to] = context[offset / 4],
        opcode::MOVE_VALUE => registers[to] = value,
        opcode::MOVE_REGISTER => registers[to] = registers[from],
        opcode::AND_VALUE => registers[to] &= value,
        opcode::SHIFT_RIGHT_VALUE => registers[to] >>= value,
        opcode::JUMP_IF_EQUAL if registers[to] == value => next += offset,
        opcode::JUMP_UNLESS_EQUAL if registers[to] != value => next += offset,
        opcode::JUMP_IF_EQUAL | opcode::JUMP_UNLESS_EQUAL => {}
        opcode::EXIT => return None,
        code => panic!("opcode {code:#x}"),
    }
    Some(next)
}

#[test]
fn default_devices_are_allowed_whatever_the_rules_say() {
    let deny_all = [rule(false, LinuxDeviceType::A, None, "rwm")];
    assert!(allows(&deny_all, CHAR, READ | WRITE, 1, 3));
    assert!(allows(&deny_all, CHAR, READ | WRITE, 136, 7));
    assert!(allows(&deny_all, BLOCK, MKNOD, 254, 0));
    assert!(!allows(&deny_all, BLOCK, READ, 254, 0));
    assert!(!allows(&deny_all, BLOCK, MKNOD | READ, 254, 0));
    assert!(!allows(&[], CHAR, READ, 10, 229));
}

#[test]
fn later_rules_win() {
    let rules = [
        rule(false, LinuxDeviceType::A, None, "rwm"),
        rule(true, LinuxDeviceType::C, Some((10, 229)), "rwm"),
        rule(true, LinuxDeviceType::B, Some((254, -1)), "r"),
        rule(false, LinuxDeviceType::B, Some((254, 1)), "r"),
    ];
    assert!(allows(&rules, CHAR, READ | WRITE, 10, 229));
    assert!(!allows(&rules, BLOCK, READ, 10, 229));
    assert!(!allows(&rules, CHAR, READ, 10, 228));
    assert!(allows(&rules, BLOCK, READ, 254, 0));
    assert!(!allows(&rules, BLOCK, READ | WRITE, 254, 0));
    assert!(!allows(&rules, BLOCK, READ, 254, 1));
}

#[test]
fn privileged_container_may_use_everything() {
    let rules = [rule(true, LinuxDeviceType::A, None, "rwm")];
    assert!(allows(&rules, BLOCK, READ | WRITE, 254, 0));
}

#[test]
fn nothing_follows_a_rule_for_everything() {
    let rules = [rule(true, LinuxDeviceType::C, Some((1, 1)), "r"), rule(false, LinuxDeviceType::A, None, "rwm")];
    assert_eq!(program(&rules), program(&rules[1..]));
}

#[test]
fn nonsense_is_refused() {
    assert!(program(&[rule(true, LinuxDeviceType::C, Some((1, 1)), "x")]).is_none());
    assert!(program(&[rule(true, LinuxDeviceType::C, Some((-7, 1)), "r")]).is_none());
    assert!(program(&[rule(true, LinuxDeviceType::P, None, "r")]).is_none());
    assert!(program(&vec![rule(true, LinuxDeviceType::A, None, "r"); MAX_RULES + 1]).is_none());
}
