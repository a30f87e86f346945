//! The system call filters at work. Each call is made by a process that has entered the jail and confined its thread as one
//! of a kind; it either passes, whatever the kernel then makes of the arguments, or is the last one that the process makes.
#![allow(unsafe_code)] // reason: system calls by number, the 32-bit entry

use std::os::unix::process::ExitStatusExt;
use std::process::Output;

use bulkhead_vmm::jail::{self, Kind, seccomp};

use super::child::{self, CAME_THROUGH};

/// The exit status after a violation.
const VIOLATION: i32 = 128 + libc::SIGSYS;

/// No descriptor, or all bits.
const NONE: u64 = u64::MAX;
/// An address for arguments that must not be null. Nothing is there.
const SOMEWHERE: u64 = 1;

/// KVM's, include/uapi/linux/kvm.h.
const KVM_CREATE_VM: u64 = 0xae01;
const KVM_RUN: u64 = 0xae80;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_IRQ_LINE: u64 = 0x4008_ae61;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;

/// Numbers of system calls of the x32 ABI have this bit; filters see them under the same architecture.
const X32: i64 = 0x4000_0000;

/// A system call, and its arguments from the first on; the others are zero.
type Call = (i64, Vec<u64>);

fn number(constant: libc::c_int) -> u64 {
    u64::try_from(constant).unwrap()
}

fn ioctl(request: u64) -> Call {
    (libc::SYS_ioctl, vec![NONE, request])
}

fn fcntl(command: libc::c_int) -> Call {
    (libc::SYS_fcntl, vec![NONE, number(command)])
}

fn prctl(arguments: &[libc::c_int]) -> Call {
    (libc::SYS_prctl, arguments.iter().map(|argument| number(*argument)).collect())
}

fn mmap(protection: libc::c_int) -> Call {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    (libc::SYS_mmap, vec![0, 4096, number(protection), number(flags), NONE])
}

fn mprotect(protection: libc::c_int) -> Call {
    (libc::SYS_mprotect, vec![0, 0, number(protection)])
}

fn sendto(address: u64) -> Call {
    (libc::SYS_sendto, vec![NONE, 0, 0, 0, address, 16])
}

fn knows(kind: Kind, call: &str) -> bool {
    kind.calls().contains(&call)
}

/// Requests that a kind may make of devices: the tables', said once more.
fn ioctls(kind: Kind) -> &'static [u64] {
    match kind {
        Kind::Main => &[KVM_IRQ_LINE, KVM_IOEVENTFD, libc::FIONBIO],
        Kind::Vcpu => &[KVM_IRQ_LINE, KVM_RUN, KVM_GET_MP_STATE, libc::TUNSETOFFLOAD],
        Kind::Devices => &[KVM_IRQ_LINE, libc::FIONBIO],
        Kind::Memory => &[KVM_IRQ_LINE, KVM_SET_USER_MEMORY_REGION],
        Kind::Disks | Kind::FileServer => &[KVM_IRQ_LINE],
        Kind::Locks => &[],
    }
}

/// A process with a thread of this kind that makes the calls, one after the other.
fn confined(kind: Kind, how: &str, calls: &[Call]) -> Output {
    let mut input = vec![kind.name().to_owned(), how.to_owned()];
    for (call, arguments) in calls {
        let words = arguments.iter().map(u64::to_string).collect::<Vec<_>>();
        input.push(format!("{call} {}", words.join(" ")));
    }
    child::run("jail::filters::confined_process", &input.join("\n"))
}

#[test]
#[ignore = "the process that the tests of the filters look at"]
fn confined_process() {
    let Some(input) = child::input() else { return };
    let mut lines = input.lines();
    let name = lines.next().unwrap();
    let kind = Kind::ALL.into_iter().find(|kind| kind.name() == name).unwrap();
    let how = lines.next().unwrap();
    let calls: Vec<(i64, [u64; 6])> = lines.map(parse).collect();

    jail::enter(None).unwrap();
    if how == "blocked" {
        vmm_sys_util::signal::block_signal(libc::SIGSYS).unwrap();
    }
    jail::confine_thread(kind);
    // From here on nothing but what is asked for: a test's thread is not one that the filters are made for.
    if how == "32-bit" {
        call_32_bit_getpid();
    }
    for (call, [a, b, c, d, e, f]) in calls {
        // SAFETY: none of the calls is given an address of this process; one that is not stopped fails, or maps a new page.
        unsafe { libc::syscall(call, a, b, c, d, e, f) };
    }
    // SAFETY: it takes a number.
    unsafe { libc::_exit(CAME_THROUGH) }
}

fn parse(line: &str) -> (i64, [u64; 6]) {
    let (call, words) = line.split_once(' ').unwrap();
    let mut arguments = [0; 6];
    for (argument, word) in arguments.iter_mut().zip(words.split_ascii_whitespace()) {
        *argument = word.parse().unwrap();
    }
    (call.parse().unwrap(), arguments)
}

/// The entry that 32-bit programs use has numbers of its own: 20 is getpid(2) there, and writev(2) here.
fn call_32_bit_getpid() {
    // SAFETY: the call takes nothing and changes no register but these.
    unsafe {
        std::arch::asm!("int 0x80", inout("rax") 20_u64 => _, out("r8") _, out("r9") _, out("r10") _, out("r11") _)
    };
}

/// Each of the calls ends a process of its own, which says what it was.
fn assert_ends(kind: Kind, calls: impl IntoIterator<Item = Call>) {
    for call in calls {
        let output = confined(kind, "plain", std::slice::from_ref(&call));
        let text = String::from_utf8_lossy(&output.stderr);
        let (number, arguments) = call;
        assert_eq!(output.status.code(), Some(VIOLATION), "{}: {number} {arguments:?}: {text}", kind.name());
        let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
        let line = format!(
            "bulkhead-vmm: thread `{}` made system call {number} ({}, {}, ...), which its filter does not allow; the VM ends",
            kind.name(),
            argument(0),
            argument(1)
        );
        assert!(text.lines().any(|said| said == line), "{line:?} is not in {text:?}");
    }
}

/// All of the calls pass, in one process.
fn assert_pass(kind: Kind, calls: &[Call]) {
    let output = confined(kind, "plain", calls);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(CAME_THROUGH), "{}: {text}", kind.name());
}

#[test]
fn hostile_19_call_outside_of_its_threads_table_ends_the_process_and_is_named() {
    for kind in Kind::ALL {
        let never = [
            (libc::SYS_socket, vec![1, 1]),
            (libc::SYS_execve, vec![]),
            (libc::SYS_clone, vec![]),
            (libc::SYS_ptrace, vec![0]),
            (libc::SYS_open_by_handle_at, vec![NONE]),
            (libc::SYS_pkey_mprotect, vec![0, 0, number(libc::PROT_EXEC)]),
            (libc::SYS_rt_sigaction, vec![number(libc::SIGSYS)]),
            // write(2), which all may make.
            (X32 | libc::SYS_write, vec![NONE]),
            // More than there are.
            (1 << 20, vec![]),
        ];
        assert_ends(kind, never);
    }
}

#[test]
fn hostile_19_call_of_another_threads_table_ends_the_process_and_is_named() {
    let own = [
        ("tgkill", libc::SYS_tgkill),
        ("eventfd2", libc::SYS_eventfd2),
        ("recvmsg", libc::SYS_recvmsg),
        ("sendto", libc::SYS_sendto),
        ("pread64", libc::SYS_pread64),
        ("sendmsg", libc::SYS_sendmsg),
        ("ioctl", libc::SYS_ioctl),
        ("fcntl", libc::SYS_fcntl),
        ("prctl", libc::SYS_prctl),
        ("openat", libc::SYS_openat),
    ];
    for kind in Kind::ALL {
        let others = own.iter().filter(|(name, _)| !knows(kind, name));
        assert_ends(kind, others.map(|(_, call)| (*call, vec![NONE])));
    }
}

#[test]
fn hostile_19_ioctl_that_its_thread_does_not_need_ends_the_process() {
    for kind in Kind::ALL {
        let others = Kind::ALL.into_iter().flat_map(ioctls).copied();
        let never = [KVM_CREATE_VM, libc::TIOCSTI, libc::SIOCGIFCONF, 0, NONE];
        let mut requests: Vec<_> = others.chain(never).filter(|request| !ioctls(kind).contains(request)).collect();
        requests.sort_unstable();
        requests.dedup();
        assert_ends(kind, requests.into_iter().map(ioctl));
    }
}

#[test]
fn hostile_19_executable_memory_ends_the_process() {
    let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    for kind in Kind::ALL {
        assert_ends(kind, [mmap(libc::PROT_EXEC), mmap(all), mprotect(libc::PROT_EXEC), mprotect(all)]);
    }
}

#[test]
fn hostile_19_message_to_an_address_ends_the_process() {
    let senders: Vec<_> = Kind::ALL.into_iter().filter(|kind| knows(*kind, "sendto")).collect();
    assert_eq!(senders, [Kind::Main, Kind::Devices, Kind::Memory]);
    for kind in senders {
        // One with nothing in its lower half too.
        assert_ends(kind, [sendto(SOMEWHERE), sendto(1 << 32), sendto(NONE)]);
    }
}

#[test]
fn hostile_19_fcntl_command_that_no_thread_needs_ends_the_process() {
    for kind in Kind::ALL.into_iter().filter(|kind| knows(*kind, "fcntl")) {
        let never = [
            libc::F_DUPFD,
            libc::F_SETFD,
            libc::F_SETLK,
            libc::F_SETLKW,
            libc::F_SETOWN,
            libc::F_ADD_SEALS,
            libc::F_SETLEASE,
        ];
        assert_ends(kind, never.map(fcntl));
        let of_the_file_server = [libc::F_OFD_GETLK, libc::F_OFD_SETLK].map(fcntl);
        assert_ends(kind, of_the_file_server.into_iter().filter(|_| kind != Kind::FileServer));
        assert_ends(kind, [fcntl(libc::F_OFD_SETLKW)].into_iter().filter(|_| kind != Kind::Locks));
    }
}

/// It may end a wait, and nothing else.
#[test]
fn hostile_19_other_signal_of_the_file_server_ends_the_process() {
    let signals =
        [libc::SIGKILL, libc::SIGSTOP, libc::SIGSYS, seccomp::lock_signal() - 1, seccomp::lock_signal() + 1, 0];
    assert_ends(Kind::FileServer, signals.map(|signal| (libc::SYS_tgkill, vec![NONE, NONE, number(signal)])));
}

#[test]
fn hostile_19_prctl_that_changes_more_than_a_name_ends_the_process() {
    let callers: Vec<_> = Kind::ALL.into_iter().filter(|kind| knows(*kind, "prctl")).collect();
    assert_eq!(callers, [Kind::FileServer]);
    let never = [
        prctl(&[libc::PR_SET_DUMPABLE, 1]),
        prctl(&[libc::PR_SET_SECCOMP, 2]),
        prctl(&[libc::PR_SET_MM, libc::PR_SET_MM_EXE_FILE]),
        prctl(&[libc::PR_CAPBSET_DROP, 0]),
        prctl(&[libc::PR_SET_SECUREBITS, 0]),
        prctl(&[libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE]),
        prctl(&[libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL]),
    ];
    assert_ends(Kind::FileServer, never);
}

/// The other side of all that: the calls above end the process for what they are, and not for being made here.
#[test]
fn calls_that_a_thread_needs_pass() {
    for kind in Kind::ALL {
        let memory = libc::PROT_READ | libc::PROT_WRITE;
        let mut calls = vec![
            mmap(memory),
            mprotect(memory),
            (libc::SYS_sched_yield, vec![]),
            (libc::SYS_write, vec![NONE]),
            (libc::SYS_futex, vec![]),
        ];
        calls.extend(ioctls(kind).iter().copied().map(ioctl));
        if knows(kind, "fcntl") {
            calls.extend([libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_SETFL].map(fcntl));
        }
        calls.extend(match kind {
            Kind::Main => vec![(libc::SYS_tgkill, vec![NONE, NONE]), (libc::SYS_recvmsg, vec![NONE]), sendto(0)],
            Kind::Vcpu => vec![(libc::SYS_eventfd2, vec![0, NONE])],
            Kind::Devices => vec![sendto(0), (libc::SYS_timerfd_settime, vec![NONE])],
            Kind::Disks => vec![
                (libc::SYS_pread64, vec![NONE]),
                (libc::SYS_fdatasync, vec![NONE]),
                (libc::SYS_ppoll, vec![0, NONE]),
            ],
            Kind::Memory => vec![sendto(0), (libc::SYS_fstat, vec![NONE])],
            Kind::Locks => vec![(libc::SYS_flock, vec![NONE]), fcntl(libc::F_OFD_SETLKW)],
            Kind::FileServer => vec![
                (libc::SYS_openat, vec![NONE]),
                fcntl(libc::F_OFD_GETLK),
                fcntl(libc::F_OFD_SETLK),
                (libc::SYS_tgkill, vec![NONE, NONE, number(seccomp::lock_signal())]),
                prctl(&[libc::PR_CAPBSET_READ]),
                prctl(&[libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_IS_SET]),
            ],
        });
        assert_pass(kind, &calls);
    }
}

/// A filter holds where it can say nothing: a thread may block signals, and what it calls by another ABI has no name here.
#[test]
fn hostile_19_violation_that_cannot_be_reported_ends_the_process_all_the_same() {
    for kind in Kind::ALL {
        let blocked = confined(kind, "blocked", &[(libc::SYS_socket, vec![1, 1])]);
        assert_eq!(blocked.status.signal(), Some(libc::SIGSYS), "{}: {:?}", kind.name(), blocked.status);
        let other_abi = confined(kind, "32-bit", &[]);
        // A kernel without that ABI has another signal for it.
        assert!(other_abi.status.signal().is_some(), "{}: {:?}", kind.name(), other_abi.status);
    }
}
