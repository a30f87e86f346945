//! System call filters (seccomp(2)), one for each kind of thread: what it calls when it works as it should, and nothing else.
//!
//! A table below is the whole of what a thread of its kind may ask of the host's kernel, whoever has taken it over.
//! `bulkhead-vmm filters` prints them. No thread may make a socket, a thread, a process or executable memory, and only the
//! file server may open anything. A violation ends the process, after a line that names thread and call.
#![allow(unsafe_code)] // reason: the handler of SIGSYS reads what the kernel passes it, and writes and ends without the heap

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// The exit status after a violation, as a shell reports a death by SIGSYS.
const VIOLATION_STATUS: libc::c_int = 128 + libc::SIGSYS;

/// The signal that ends a wait for a lock on a file; the one before it is the vCPUs'.
pub fn lock_signal() -> libc::c_int {
    vmm_sys_util::signal::SIGRTMIN() + 1
}

/// Kinds of threads.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// Serves the shim's commands.
    Main,
    /// Runs the guest. Reads and writes registers of devices; starts and stops their workers.
    Vcpu,
    /// The workers of devices that never block.
    Devices,
    /// The workers of disks.
    Disks,
    /// The workers that give memory to the guest and take it back.
    Memory,
    /// virtio-fs.
    FileServer,
    /// Those that wait for locks on files.
    Locks,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Main, Self::Vcpu, Self::Devices, Self::Disks, Self::Memory, Self::FileServer, Self::Locks];

    /// A name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Vcpu => "vcpu",
            Self::Devices => "devices",
            Self::Disks => "disks",
            Self::Memory => "memory",
            Self::FileServer => "fs",
            Self::Locks => "locks",
        }
    }

    /// Names of the system calls that it may make, some with certain arguments only.
    pub fn calls(self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.table().iter().map(|(name, _)| name.trim_start_matches("SYS_")).collect();
        names.sort_unstable();
        names
    }

    fn table(self) -> Vec<Call> {
        let own: &[&[Call]] = match self {
            Self::Main => &[WORKER, MAIN],
            Self::Vcpu => &[VCPU],
            Self::Devices => &[WORKER, LOOP, DEVICES],
            Self::Disks => &[WORKER, DISKS],
            Self::Memory => &[WORKER, LOOP, MEMORY],
            Self::FileServer => &[WORKER, FILE_SERVER],
            Self::Locks => &[LOCKS],
        };
        [COMMON].iter().chain(own).flat_map(|calls| calls.iter().copied()).collect()
    }

    /// What it may ask of devices of the host.
    fn ioctls(self) -> &'static [libc::Ioctl] {
        match self {
            Self::Main => &[KVM_IRQ_LINE, KVM_IOEVENTFD, libc::FIONBIO, libc::TUNGETIFF, libc::TUNSETVNETHDRSZ],
            Self::Vcpu => &[KVM_IRQ_LINE, KVM_RUN, KVM_GET_MP_STATE, libc::TUNSETOFFLOAD],
            Self::Devices => &[KVM_IRQ_LINE, libc::FIONBIO],
            Self::Memory => &[KVM_IRQ_LINE, KVM_SET_USER_MEMORY_REGION],
            Self::Disks | Self::FileServer => &[KVM_IRQ_LINE],
            Self::Locks => &[],
        }
    }

    /// What it may do with descriptors that is no read, write or request.
    fn descriptor_commands(self) -> Vec<libc::c_int> {
        let own: &[libc::c_int] = match self {
            Self::FileServer => &[libc::F_OFD_GETLK, libc::F_OFD_SETLK],
            Self::Locks => &[libc::F_OFD_SETLKW],
            _ => &[],
        };
        [&[libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_SETFL], own].concat()
    }

    fn rules(self) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
        self.table().into_iter().map(|(_, number)| Ok((number, self.conditions(number)?))).collect()
    }

    /// Arguments that are allowed; any if there is no rule.
    fn conditions(self, call: libc::c_long) -> Result<Vec<SeccompRule>, BackendError> {
        let one = |condition: SeccompCondition| SeccompRule::new(vec![condition]);
        match call {
            libc::SYS_ioctl => self.ioctls().iter().map(|number| one(equals(1, *number)?)).collect(),
            libc::SYS_mmap | libc::SYS_mprotect => Ok(vec![one(without(2, libc::PROT_EXEC)?)?]),
            libc::SYS_fcntl => {
                self.descriptor_commands().into_iter().map(|command| one(equals(1, number(command))?)).collect()
            }
            // To end a wait for a lock. The process has no other to send it to.
            libc::SYS_tgkill if self == Self::FileServer => Ok(vec![one(equals(2, number(lock_signal()))?)?]),
            // On the sockets that it has, to nobody else. What could send descriptors too, sendmsg(2), is in no table.
            libc::SYS_sendto => Ok(vec![one(is_null(4)?)?]),
            // libcap-ng looks for the bounding set, and without /proc it asks for each capability.
            libc::SYS_prctl => Ok(vec![
                one(equals(0, number(libc::PR_SET_NAME))?)?,
                one(equals(0, number(libc::PR_CAPBSET_READ))?)?,
                SeccompRule::new(vec![
                    equals(0, number(libc::PR_CAP_AMBIENT))?,
                    equals(1, number(libc::PR_CAP_AMBIENT_IS_SET))?,
                ])?,
            ]),
            _ => Ok(Vec::new()),
        }
    }

    fn compile(self) -> Result<BpfProgram, FilterError> {
        let compiled = self.rules().and_then(|rules| {
            SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
        });
        compiled.map_err(|source| FilterError::Compile { kind: self.name(), source })
    }
}

/// A constant of a header file's, none of which is negative.
fn number(constant: libc::c_int) -> u64 {
    u64::try_from(constant).unwrap_or(u64::MAX)
}

/// The argument has this value in its lower half, which is all that the kernel looks at.
fn equals(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

/// The argument is a null pointer.
fn is_null(argument: u8) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)
}

/// The argument does not have this flag.
fn without(argument: u8, flag: libc::c_int) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(number(flag)), 0)
}

/// include/uapi/linux/kvm.h.
const KVM_RUN: libc::Ioctl = 0xae80;
const KVM_SET_USER_MEMORY_REGION: libc::Ioctl = 0x4020_ae46;
const KVM_IRQ_LINE: libc::Ioctl = 0x4008_ae61;
const KVM_IOEVENTFD: libc::Ioctl = 0x4040_ae79;
const KVM_GET_MP_STATE: libc::Ioctl = 0x8004_ae98;

type Call = (&'static str, libc::c_long);

macro_rules! calls {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), libc::$name)),*] };
}

/// The heap, locks, and the ends of threads and of the process. Time is read in user space where the host's clock allows it,
/// a channel under contention yields, and a wait that a stop or a freezer has interrupted is restarted by a call of its own.
const COMMON: &[Call] = calls![
    SYS_brk,
    SYS_clock_gettime,
    SYS_close,
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_madvise,
    SYS_mmap,
    SYS_mprotect,
    SYS_mremap,
    SYS_munmap,
    SYS_restart_syscall,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sched_yield,
    SYS_sigaltstack,
    SYS_write,
];

/// KVM_RUN and what it answers by, the kicks of device loops, what starting a worker takes, and the serial port.
const VCPU: &[Call] = calls![SYS_eventfd2, SYS_fcntl, SYS_ioctl, SYS_ppoll];

/// What all threads that wait for descriptors do. (The keys of a thread's first hash map are random.)
const WORKER: &[Call] = calls![SYS_getrandom, SYS_read];

/// epoll(7).
const LOOP: &[Call] = calls![SYS_epoll_ctl, SYS_epoll_wait, SYS_fcntl];

/// Console, network, sockets' streams, timers, and random bytes.
const DEVICES: &[Call] =
    calls![SYS_ioctl, SYS_ppoll, SYS_readv, SYS_recvmsg, SYS_sendto, SYS_shutdown, SYS_timerfd_settime, SYS_writev,];

/// Files and block devices, and the waits for requests.
const DISKS: &[Call] = calls![
    SYS_fcntl,
    SYS_fdatasync,
    SYS_fsync,
    SYS_ioctl,
    SYS_ppoll,
    SYS_pread64,
    SYS_preadv,
    SYS_pwrite64,
    SYS_pwritev,
];

/// KVM's memory slots, what files they are to show, and the shim's socket; the discards are madvise(2).
const MEMORY: &[Call] = calls![SYS_fstat, SYS_ioctl, SYS_sendto];

/// The shim's socket, the slots of devices that come and go, and the kicks that end the vCPUs.
const MAIN: &[Call] = calls![
    SYS_eventfd2,
    SYS_fcntl,
    SYS_fstat,
    SYS_getpid,
    SYS_ioctl,
    SYS_lseek,
    SYS_ppoll,
    SYS_recvmsg,
    SYS_sendto,
    SYS_tgkill,
];

/// A file system. Counted apart from the others: there is nothing like it in a VMM without a share.
const FILE_SERVER: &[Call] = calls![
    SYS_capget,
    SYS_capset,
    SYS_copy_file_range,
    SYS_dup,
    SYS_dup3,
    SYS_fallocate,
    SYS_fchdir,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchownat,
    SYS_fcntl,
    SYS_fdatasync,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_flock,
    SYS_fremovexattr,
    SYS_fsetxattr,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_ftruncate,
    SYS_getdents64,
    SYS_getegid,
    SYS_geteuid,
    SYS_getpid,
    SYS_gettid,
    SYS_getxattr,
    SYS_ioctl,
    SYS_linkat,
    SYS_listxattr,
    SYS_lseek,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_name_to_handle_at,
    SYS_newfstatat,
    SYS_openat,
    SYS_openat2,
    SYS_ppoll,
    SYS_prctl,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_readlinkat,
    SYS_removexattr,
    SYS_renameat,
    SYS_renameat2,
    SYS_setgroups,
    SYS_setresgid,
    SYS_setresuid,
    SYS_setxattr,
    SYS_statx,
    SYS_symlinkat,
    SYS_syncfs,
    SYS_tgkill,
    SYS_umask,
    SYS_unlinkat,
    SYS_utimensat,
    SYS_writev,
];

/// A wait for a lock.
const LOCKS: &[Call] = calls![SYS_fcntl, SYS_flock];

/// The filters of all kinds, ready to be installed.
pub struct Filters(BTreeMap<Kind, BpfProgram>);

impl Filters {
    /// Compiles the tables.
    pub fn compile() -> Result<Self, FilterError> {
        let programs = Kind::ALL.into_iter().map(|kind| Ok((kind, kind.compile()?)));
        programs.collect::<Result<_, _>>().map(Self)
    }

    /// Installs the filter of a kind in the calling thread. Needs no_new_privs.
    pub fn install(&self, kind: Kind) -> Result<(), FilterError> {
        CONFINED_AS.set(kind.name());
        let program = self.0.get(&kind).map(Vec::as_slice).unwrap_or_default();
        seccompiler::apply_filter(program).map_err(|source| FilterError::Install { kind: kind.name(), source })
    }
}

thread_local! {
    /// For the line about a violation.
    static CONFINED_AS: Cell<&'static str> = const { Cell::new("unconfined") };
}

/// Makes a violation say what it was before it ends the process.
pub fn report_violations() -> io::Result<()> {
    vmm_sys_util::signal::register_signal_handler(libc::SIGSYS, violation).map_err(io::Error::from)
}

/// Async-signal-safe: no heap, and two system calls that every filter allows.
extern "C" fn violation(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // The number is behind si_signo, si_errno, si_code, padding and the address of the call (sigaction(2), SIGSYS).
    const NUMBER: usize = 6;
    // SAFETY: the kernel hands every SA_SIGINFO handler a siginfo_t, which is larger than this and made of integers.
    let call = unsafe { info.cast::<libc::c_int>().add(NUMBER).read() };
    // SAFETY: the third argument of such a handler is a ucontext_t (sigaction(2)).
    let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let argument = |register: libc::c_int| {
        let index = usize::try_from(register).unwrap_or(usize::MAX);
        registers.get(index).map_or(0, |value| value.cast_unsigned())
    };
    let mut line = Line::default();
    line.text("bulkhead-vmm: thread `");
    line.text(CONFINED_AS.get());
    line.text("` made system call ");
    line.number(call.unsigned_abs().into());
    line.text(" (");
    line.number(argument(libc::REG_RDI));
    line.text(", ");
    line.number(argument(libc::REG_RSI));
    line.text(", ...), which its filter does not allow; the VM ends\n");
    // SAFETY: the buffer is as long as said; _exit is made for this.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(VIOLATION_STATUS)
    }
}

/// A line without a heap. What does not fit is left out.
struct Line {
    bytes: [u8; 192],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 192], len: 0 }
    }
}

impl Line {
    fn text(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, number: u64) {
        let mut divisor = 10_u64.pow(number.checked_ilog10().unwrap_or(0));
        while divisor > 0 {
            let digit = usize::try_from(number / divisor % 10).unwrap_or(0);
            self.text("0123456789".get(digit..=digit).unwrap_or("?"));
            divisor /= 10;
        }
    }
}

/// A filter that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// Our own table is wrong.
    #[error("the system call filter of `{kind}` threads is not valid")]
    Compile {
        /// Of whom.
        kind: &'static str,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// seccomp(2).
    #[error(
        "the host's kernel refuses the system call filter of `{kind}` threads; is it built with CONFIG_SECCOMP_FILTER?"
    )]
    Install {
        /// Of whom.
        kind: &'static str,
        /// Why.
        #[source]
        source: seccompiler::Error,
    },
}
