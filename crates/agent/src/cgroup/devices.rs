//! Which devices a container may use: cgroup v2 has no files for that, it asks a BPF program (cgroup-v2.rst, "Device
//! controller"). libcontainer would bring a library in C for this; the program is a page of assembly, so it is made here.
//!
//! The first rule that matches decides: what every container has, then OCI's `linux.resources.devices`, later ones before
//! earlier ones.

use bulkhead_bpf::{Instruction, Register};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// Kinds of device and of access, as `linux/bpf.h` numbers them (BPF_DEVCG_*).
const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// The answer: 1 allows.
const RESULT: Register = Register::R0;
/// The program's argument.
const CONTEXT: Register = Register::R1;
/// What the request is about: kind of the device, kinds of access, major and minor number.
const REQUEST_KIND: Register = Register::R2;
const REQUEST_ACCESS: Register = Register::R3;
const REQUEST_MAJOR: Register = Register::R4;
const REQUEST_MINOR: Register = Register::R5;
/// For computing.
const SCRATCH: Register = Register::R6;

/// How far a jump goes that is set when all of its rule is there.
const TO_BE_SET: i16 = 0;

/// Most rules that are taken: the kernel's verifier has a limit too, and a spec has a dozen.
const MAX_RULES: usize = 512;

/// One rule. A missing part matches everything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    access: i32,
    major: Option<i32>,
    minor: Option<i32>,
}

/// What every container may do, as runc has it: make any node, and use the memory devices and terminals.
const DEFAULTS: [Rule; 9] = [
    Rule { allow: true, kind: None, access: MKNOD, major: None, minor: None },
    Rule { allow: true, kind: Some(CHAR), access: ALL, major: Some(1), minor: Some(3) }, // null
    Rule { allow: true, kind: Some(CHAR), access: ALL, major: Some(1), minor: Some(5) }, // zero
    Rule { allow: true, kind: Some(CHAR), access: ALL, major: Some(1), minor: Some(7) }, // full
    Rule { allow: true, kind: Some(CHAR), access: ALL, major: Some(1), minor: Some(8) }, // random
    Rule { allow: true, kind: Some(CHAR), access: ALL, major: Some(1), minor: Some(9) }, // urandom
    Rule { allow: true, kind: Some(CHAR), access: ALL, major: Some(5), minor: Some(0) }, // tty
    Rule { allow: true, kind: Some(CHAR), access: ALL, major: Some(5), minor: Some(2) }, // ptmx
    Rule { allow: true, kind: Some(CHAR), access: ALL, major: Some(136), minor: None },  // pts
];

/// The program for a container's rules. `None` if a rule is none or there are too many.
pub fn program(rules: &[LinuxDeviceCgroup]) -> Option<Vec<Instruction>> {
    if rules.len() > MAX_RULES {
        return None;
    }
    let rules: Option<Vec<Rule>> = rules.iter().rev().map(Rule::from_spec).collect();
    let mut program = prologue();
    for rule in DEFAULTS.iter().chain(&rules?) {
        rule.assemble(&mut program)?;
        // The verifier refuses instructions that cannot be reached.
        if rule.matches_everything() {
            return Some(program);
        }
    }
    // Version 1 starts with everything allowed; specs start with a rule that denies it all, so this is for those without.
    program.extend([Instruction::set(RESULT, 0), Instruction::exit()]);
    Some(program)
}

/// Loads the request, a `struct bpf_cgroup_dev_ctx`: access and kind in one word, major, minor.
fn prologue() -> Vec<Instruction> {
    vec![
        Instruction::load_word(REQUEST_KIND, CONTEXT, 0),
        Instruction::and(REQUEST_KIND, 0xffff),
        Instruction::load_word(REQUEST_ACCESS, CONTEXT, 0),
        Instruction::shift_right(REQUEST_ACCESS, 16),
        Instruction::load_word(REQUEST_MAJOR, CONTEXT, 4),
        Instruction::load_word(REQUEST_MINOR, CONTEXT, 8),
    ]
}

impl Rule {
    fn from_spec(rule: &LinuxDeviceCgroup) -> Option<Self> {
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
            Some(LinuxDeviceType::P) => return None,
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return None,
            };
        }
        // -1 is an old way to write "any".
        let number = |number: Option<i64>| match number {
            None | Some(-1) => Some(None),
            Some(number) => i32::try_from(number).ok().filter(|number| *number >= 0).map(Some),
        };
        Some(Self { allow: rule.allow(), kind, access, major: number(rule.major())?, minor: number(rule.minor())? })
    }

    fn matches_everything(&self) -> bool {
        self.kind.is_none() && self.access == ALL && self.major.is_none() && self.minor.is_none()
    }

    /// Appends "if the request matches, answer": conditions that jump over the rest of the rule.
    fn assemble(&self, program: &mut Vec<Instruction>) -> Option<()> {
        let mut conditions = Vec::new();
        if let Some(kind) = self.kind {
            conditions.push((REQUEST_KIND, kind));
        }
        let mut body = Vec::new();
        if self.access != ALL {
            // A permission covers a request whose every access it names, a prohibition one of which it names any.
            let mask = if self.allow { ALL & !self.access } else { self.access };
            body.extend([Instruction::copy(SCRATCH, REQUEST_ACCESS), Instruction::and(SCRATCH, mask)]);
            body.push(if self.allow {
                Instruction::jump_unless_equal(SCRATCH, 0, TO_BE_SET)
            } else {
                Instruction::jump_if_equal(SCRATCH, 0, TO_BE_SET)
            });
        }
        conditions.extend(self.major.map(|major| (REQUEST_MAJOR, major)));
        conditions.extend(self.minor.map(|minor| (REQUEST_MINOR, minor)));
        let unmet = |(register, value)| Instruction::jump_unless_equal(register, value, TO_BE_SET);
        body.extend(conditions.into_iter().map(unmet));
        body.extend([Instruction::set(RESULT, i32::from(self.allow)), Instruction::exit()]);
        let end = body.len();
        for (at, instruction) in body.iter_mut().enumerate() {
            instruction.jump_over(i16::try_from(end - at - 1).ok()?);
        }
        program.extend(body);
        Some(())
    }
}

#[cfg(test)]
mod tests;
