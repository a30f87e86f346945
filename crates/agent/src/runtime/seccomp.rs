//! A container's seccomp filter, from its profile to the program that the kernel takes (seccomp(2)).
//!
//! libcontainer 0.7 has this too, with two faults. It takes the mask of a masked comparison for the value: what the default
//! profiles of container engines say of clone(2), no new namespaces, then allows them all. And a system call that is younger
//! than a profile gets the profile's error, while C libraries fall back to an older call on ENOSYS only. As runc does, this
//! puts a few instructions for that before those of libseccomp, and others for calls that libseccomp is too old to name.

use std::io::{self, Read, Seek};

use libc::{c_ulong, sock_filter};
use libseccomp::error::SeccompError;
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSyscall};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::sys;

/// Architectures as the kernel tells them to a filter (linux/audit.h).
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// In the number of a system call of the x32 ABI, whose architecture is x86_64.
const X32_BIT: u32 = 1 << 30;

/// Number of a call that a tracer skips: no call of x32's, although it has the bit.
const SKIPPED_CALL: u32 = u32::MAX;

/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NUMBER_OFFSET: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;

/// The instructions that are needed here (linux/bpf_common.h): load a word, jump, jump if equal, greater or a bit is set, return.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;

/// Most instructions that the kernel takes (BPF_MAXINSNS, linux/bpf_common.h).
const MAX_INSTRUCTIONS: usize = 4096;

/// Calls of the guest's kernel that libseccomp 2.5.4 has no names for. They have one number everywhere
/// (scripts/syscall.tbl of Linux), x32's with its bit.
const NOT_IN_LIBSECCOMP: [(&str, u32); 6] = [
    ("statmount", 457),
    ("listmount", 458),
    ("lsm_get_self_attr", 459),
    ("lsm_set_self_attr", 460),
    ("lsm_list_modules", 461),
    ("mseal", 462),
];

/// A filter, ready to be installed.
#[derive(Clone)]
pub struct Filter {
    program: Vec<sock_filter>,
    flags: c_ulong,
}

impl Filter {
    /// Compiles a profile.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self, FilterError> {
        let architectures = architectures(profile)?;
        let mut program = if answers_unknown(profile) { stub(profile, &architectures) } else { Vec::new() };
        program.extend(young(profile, &architectures)?);
        // libseccomp's time grows with the square of a filter, so each architecture has one by itself. This machine's own is
        // last: it also answers for architectures that the profile does not name.
        for architecture in architectures.iter().rev() {
            let own = rules(profile, *architecture)?;
            program.extend(guard(*architecture, own.len()));
            program.extend(own);
        }
        if program.len() > MAX_INSTRUCTIONS {
            return Err(FilterError::Long { instructions: program.len() });
        }
        Ok(Self { program, flags: flags(profile) })
    }

    /// As bytes: the flags, then the instructions as the kernel has them. To compile a profile of some hundred calls takes longer
    /// than all else that an exec takes, so a container's execs read what its creation has compiled.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.flags.to_le_bytes().to_vec();
        for sock_filter { code, jt, jf, k } in &self.program {
            bytes.extend(code.to_le_bytes());
            bytes.extend([*jt, *jf]);
            bytes.extend(k.to_le_bytes());
        }
        bytes
    }

    /// From bytes that [`Self::to_bytes`] has made; `None` from others.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (flags, program) = bytes.split_first_chunk()?;
        let (instructions, rest) = program.as_chunks::<8>();
        let instruction = |[code0, code1, jt, jf, k0, k1, k2, k3]: [u8; 8]| sock_filter {
            code: u16::from_le_bytes([code0, code1]),
            jt,
            jf,
            k: u32::from_le_bytes([k0, k1, k2, k3]),
        };
        let program = instructions.iter().copied().map(instruction).collect();
        rest.is_empty().then(|| Self { program, flags: c_ulong::from_le_bytes(*flags) })
    }

    /// Puts this thread under the filter, which takes CAP_SYS_ADMIN or no_new_privs.
    pub fn install(&self) -> io::Result<()> {
        sys::install_filter(&self.program, self.flags)
    }
}

/// An action; its number is an error's, EPERM unless told otherwise.
fn action(action: LinuxSeccompAction, number: Option<u32>) -> Result<ScmpAction, FilterError> {
    if action == LinuxSeccompAction::ScmpActNotify {
        return Err(FilterError::Listener);
    }
    let number = number.map_or(libc::EPERM, |number| i32::from(u16::try_from(number).unwrap_or(u16::MAX)));
    Ok(ScmpAction::from_str(&action.to_string(), Some(number))?)
}

/// This machine's architecture, and those of the profile whose programs can run here.
fn architectures(profile: &LinuxSeccomp) -> Result<Vec<ScmpArch>, SeccompError> {
    let mut list = vec![ScmpArch::native()];
    for name in profile.architectures().iter().flatten() {
        let architecture = name.to_string().parse()?;
        if audit(architecture).is_some() && !list.contains(&architecture) {
            list.push(architecture);
        }
    }
    Ok(list)
}

/// libseccomp's program for calls of one architecture.
fn rules(profile: &LinuxSeccomp, architecture: ScmpArch) -> Result<Vec<sock_filter>, FilterError> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default)?;
    if architecture != ScmpArch::native() {
        context.add_arch(architecture)?;
        context.remove_arch(ScmpArch::native())?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        // libseccomp refuses rules that say what the default says.
        if action != default {
            add_rule(&mut context, rule, action)?;
        }
    }
    export(&context).map_err(FilterError::Export)
}

/// Jumps over the next instructions, which are for the calls of this architecture, if the call is another's.
fn guard(architecture: ScmpArch, instructions: usize) -> Vec<sock_filter> {
    let over = instruction(JUMP, u32::try_from(instructions).unwrap_or(u32::MAX), 0, 0);
    match architecture {
        ScmpArch::X86 => {
            vec![instruction(LOAD, ARCHITECTURE_OFFSET, 0, 0), instruction(JUMP_EQUAL, AUDIT_ARCH_I386, 1, 0), over]
        }
        ScmpArch::X32 => vec![
            instruction(LOAD, ARCHITECTURE_OFFSET, 0, 0),
            instruction(JUMP_EQUAL, AUDIT_ARCH_X86_64, 0, 3),
            instruction(LOAD, NUMBER_OFFSET, 0, 0),
            instruction(JUMP_EQUAL, SKIPPED_CALL, 1, 0),
            instruction(JUMP_SET, X32_BIT, 1, 0),
            over,
        ],
        _ => Vec::new(),
    }
}

fn add_rule(context: &mut ScmpFilterContext, rule: &LinuxSyscall, action: ScmpAction) -> Result<(), FilterError> {
    let arguments: Vec<LinuxSeccompArg> = rule.args().clone().unwrap_or_default();
    let conditions = arguments.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    let indices: std::collections::HashSet<usize> = arguments.iter().map(LinuxSeccompArg::index).collect();
    for name in rule.names() {
        // Profiles name calls of other architectures. For those that libseccomp is too old for see `young`.
        let Ok(call) = ScmpSyscall::from_name(name) else { continue };
        if indices.len() == conditions.len() {
            context.add_rule_conditional(action, call, &conditions)?;
            continue;
        }
        // A rule compares an argument once. Several conditions on one are alternatives, as runc reads them.
        for condition in &conditions {
            context.add_rule_conditional(action, call, std::slice::from_ref(condition))?;
        }
    }
    Ok(())
}

/// A condition. Of a masked comparison OCI's first value is the mask.
fn condition(argument: &LinuxSeccompArg) -> Result<ScmpArgCompare, FilterError> {
    let index = u32::try_from(argument.index()).map_err(|_| FilterError::Argument { index: argument.index() })?;
    let (op, value) = match argument.op().to_string().parse()? {
        ScmpCompareOp::MaskedEqual(_) => {
            (ScmpCompareOp::MaskedEqual(argument.value()), argument.value_two().unwrap_or_default())
        }
        op => (op, argument.value()),
    };
    Ok(ScmpArgCompare::new(index, op, value))
}

/// Those of the profile's flags that mean something to a single thread whose filter has no listener.
fn flags(profile: &LinuxSeccomp) -> c_ulong {
    profile.flags().iter().flatten().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                _ => 0,
            }
    })
}

/// Whether calls that are younger than the profile need an answer of their own: not where the default is to let them
/// through (a tracer has its own answer), nor where it is the same.
fn answers_unknown(profile: &LinuxSeccomp) -> bool {
    use LinuxSeccompAction::{ScmpActAllow, ScmpActLog, ScmpActTrace};
    !matches!(profile.default_action(), ScmpActAllow | ScmpActLog | ScmpActTrace)
        && profile.default_errno_ret() != Some(libc::ENOSYS.unsigned_abs())
}

/// The number of a call on an architecture, if it has it.
fn number(name: &str, architecture: ScmpArch) -> Option<u32> {
    match ScmpSyscall::from_name_by_arch(name, architecture) {
        // Calls that an architecture does not have have negative numbers.
        Ok(call) => u32::try_from(i32::from(call)).ok(),
        Err(_) => {
            let bit = if architecture == ScmpArch::X32 { X32_BIT } else { 0 };
            NOT_IN_LIBSECCOMP.iter().find(|(young, _)| *young == name).map(|(_, number)| number | bit)
        }
    }
}

/// Answers ENOSYS to every call with a higher number than any that the profile names, and otherwise goes on to what follows.
fn stub(profile: &LinuxSeccomp, architectures: &[ScmpArch]) -> Vec<sock_filter> {
    let mut program = Vec::new();
    for architecture in architectures {
        // Where x86_64 jumps if the number is one of x32.
        let x32 = match architecture {
            ScmpArch::X8664 => Some((2, 0)),
            ScmpArch::X32 => Some((0, 2)),
            _ => None,
        };
        let Some(audit) = audit(*architecture) else { continue };
        let names = profile.syscalls().iter().flatten().flat_map(LinuxSyscall::names);
        let Some(last) = names.filter_map(|name| number(name, *architecture)).max() else { continue };
        program.extend([instruction(LOAD, ARCHITECTURE_OFFSET, 0, 0)]);
        program.extend([instruction(JUMP_EQUAL, audit, 0, if x32.is_some() { 4 } else { 3 })]);
        program.extend([instruction(LOAD, NUMBER_OFFSET, 0, 0)]);
        program.extend(x32.map(|(set, clear)| instruction(JUMP_SET, X32_BIT, set, clear)));
        program.extend([instruction(JUMP_GREATER, last, 0, 1)]);
        program.extend([instruction(RETURN, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs(), 0, 0)]);
    }
    program
}

/// Answers the calls that the profile names and libseccomp does not know.
fn young(profile: &LinuxSeccomp, architectures: &[ScmpArch]) -> Result<Vec<sock_filter>, FilterError> {
    let mut answers = Vec::new();
    for (name, _) in NOT_IN_LIBSECCOMP.iter().filter(|(name, _)| ScmpSyscall::from_name(name).is_err()) {
        if let Some(answer) = young_answer(profile, name)? {
            answers.push((name, answer));
        }
    }
    let mut program = Vec::new();
    for architecture in architectures {
        let (Some(audit), Ok(skip)) = (audit(*architecture), u8::try_from(1 + 2 * answers.len())) else { continue };
        program.extend([instruction(LOAD, ARCHITECTURE_OFFSET, 0, 0), instruction(JUMP_EQUAL, audit, 0, skip)]);
        program.extend([instruction(LOAD, NUMBER_OFFSET, 0, 0)]);
        for (name, answer) in &answers {
            let number = number(name, *architecture).unwrap_or(u32::MAX);
            program.extend([instruction(JUMP_EQUAL, number, 0, 1), instruction(RETURN, *answer, 0, 0)]);
        }
    }
    Ok(if answers.is_empty() { Vec::new() } else { program })
}

/// What the first rule that names a call says of it. Conditions are not looked at: a call that is refused with some arguments
/// is refused with all, and one that is let through with some is left to the default.
fn young_answer(profile: &LinuxSeccomp, name: &str) -> Result<Option<u32>, FilterError> {
    for rule in profile.syscalls().iter().flatten().filter(|rule| rule.names().iter().any(|named| named == name)) {
        let conditional = rule.args().as_ref().is_some_and(|arguments| !arguments.is_empty());
        let action = action(rule.action(), rule.errno_ret())?;
        if !(conditional && matches!(action, ScmpAction::Allow | ScmpAction::Log)) {
            return Ok(Some(returned(action)));
        }
    }
    Ok(None)
}

/// An action as a filter returns it (seccomp(2)).
fn returned(action: ScmpAction) -> u32 {
    let data = |number: i32| number.unsigned_abs() & libc::SECCOMP_RET_DATA;
    match action {
        ScmpAction::Allow => libc::SECCOMP_RET_ALLOW,
        ScmpAction::Log => libc::SECCOMP_RET_LOG,
        ScmpAction::Trace(number) => libc::SECCOMP_RET_TRACE | data(number.into()),
        ScmpAction::Errno(number) => libc::SECCOMP_RET_ERRNO | data(number),
        ScmpAction::Trap => libc::SECCOMP_RET_TRAP,
        ScmpAction::KillThread => libc::SECCOMP_RET_KILL_THREAD,
        // Of those that are not refused before there is no other.
        _ => libc::SECCOMP_RET_KILL_PROCESS,
    }
}

/// How the kernel tells an architecture. Programs of no other run here.
fn audit(architecture: ScmpArch) -> Option<u32> {
    match architecture {
        ScmpArch::X8664 | ScmpArch::X32 => Some(AUDIT_ARCH_X86_64),
        ScmpArch::X86 => Some(AUDIT_ARCH_I386),
        _ => None,
    }
}

fn instruction(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// libseccomp's program.
fn export(context: &ScmpFilterContext) -> io::Result<Vec<sock_filter>> {
    let mut file = std::fs::File::from(memfd_create("filter", MemfdFlags::CLOEXEC)?);
    context.export_bpf(&file).map_err(io::Error::other)?;
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let (instructions, _) = bytes.as_chunks::<8>();
    Ok(instructions
        .iter()
        .map(|&[c0, c1, jt, jf, k0, k1, k2, k3]| {
            instruction(u16::from_ne_bytes([c0, c1]), u32::from_ne_bytes([k0, k1, k2, k3]), jt, jf)
        })
        .collect())
}

/// A profile makes no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// libseccomp's words.
    #[error("the seccomp profile cannot be compiled")]
    Compile(#[from] SeccompError),
    /// It needs a program beside the container.
    #[error("seccomp profiles that notify a listener are not supported")]
    Listener,
    /// System calls have six.
    #[error("the seccomp profile has a condition on argument {index}")]
    Argument { index: usize },
    /// The kernel would refuse it when the container is started.
    #[error(
        "the seccomp profile makes a filter of {instructions} instructions, more than the 4096 that the kernel takes"
    )]
    Long { instructions: usize },
    /// The way out of libseccomp.
    #[error("cannot read the compiled seccomp filter")]
    Export(#[source] io::Error),
}

#[cfg(test)]
mod tests;
