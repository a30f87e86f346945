//! The few system calls that have no safe wrapper.
#![allow(
    unsafe_code,
    reason = "random(4), loop(4), partitions, adjtimex(2), real-time signals, waitid(2) with its pid, dispositions, clone(2) and seccomp(2) have no safe wrapper"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::signal::{SigHandler, Signal};
use rustix::ioctl::{self, IntegerSetter, NoArg, Setter, opcode};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Most bytes that [`add_entropy`] takes at once.
pub const MAX_ENTROPY: usize = 512;

/// The signal that nothing survives (signal(7)).
pub const SIGKILL: u32 = 9;

/// `struct rand_pool_info` of `linux/random.h` with a buffer of fixed size.
#[repr(C)]
struct RandPoolInfo {
    entropy_count: libc::c_int,
    buf_size: libc::c_int,
    buf: [u8; MAX_ENTROPY],
}

/// RNDADDENTROPY is `_IOW('R', 3, int[2])`: the size in the number is not that of the structure.
const RNDADDENTROPY: ioctl::Opcode = opcode::write::<[libc::c_int; 2]>(b'R', 0x03);
const RNDRESEEDCRNG: ioctl::Opcode = opcode::none(b'R', 0x07);

/// Adds bytes to the kernel's entropy pool, credited in full, and makes every generator use them (random(4)).
/// Bytes beyond [`MAX_ENTROPY`] are left out.
pub fn add_entropy(device: impl AsFd, bytes: &[u8]) -> rustix::io::Result<()> {
    let mut info = RandPoolInfo { entropy_count: 0, buf_size: 0, buf: [0; MAX_ENTROPY] };
    let mut count = 0;
    for (to, from) in info.buf.iter_mut().zip(bytes) {
        *to = *from;
        count += 1;
    }
    info.buf_size = count;
    info.entropy_count = count * 8;
    // SAFETY: the kernel reads the two integers and `buf_size` bytes after them, all inside `info`.
    unsafe { ioctl::ioctl(&device, Setter::<RNDADDENTROPY, RandPoolInfo>::new(info)) }?;
    // SAFETY: the request takes no argument.
    unsafe { ioctl::ioctl(&device, NoArg::<RNDRESEEDCRNG>::new()) }
}

/// LOOP_CTL_ADD of `linux/loop.h`, whose argument is a number.
const LOOP_CTL_ADD: ioctl::Opcode = 0x4c80;

/// Makes the first loop devices, with their nodes in /dev. Those that are there already stay as they are (loop(4)).
pub fn add_loop_devices(count: u32) -> io::Result<()> {
    let control = std::fs::File::options().read(true).write(true).open("/dev/loop-control")?;
    for number in 0..count {
        let number = usize::try_from(number).unwrap_or_default();
        // SAFETY: the request takes a number and no pointer.
        let added = unsafe { ioctl::ioctl(&control, IntegerSetter::<LOOP_CTL_ADD>::new_usize(number)) };
        match added {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// BLKROSET of `linux/fs.h` and BLKPG of `linux/blkpg.h`.
const BLKROSET: ioctl::Opcode = opcode::none(0x12, 93);
const BLKPG: ioctl::Opcode = opcode::none(0x12, 105);
const BLKPG_ADD_PARTITION: libc::c_int = 1;

/// `struct blkpg_partition`.
#[repr(C)]
struct Partition {
    start: i64,
    length: i64,
    number: libc::c_int,
    names: [u8; 128],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct PartitionChange {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *const Partition,
}

/// Lets nobody write to a disk, nor to its partitions.
pub fn make_disk_read_only(disk: impl AsFd) -> rustix::io::Result<()> {
    // SAFETY: the kernel reads one integer.
    unsafe { ioctl::ioctl(disk, Setter::<BLKROSET, libc::c_int>::new(1)) }
}

/// Makes a part of a disk a disk of its own. All in bytes.
pub fn add_partition(disk: impl AsFd, number: u32, start: u64, length: u64) -> rustix::io::Result<()> {
    let invalid = |_| rustix::io::Errno::INVAL;
    let partition = Partition {
        start: start.try_into().map_err(invalid)?,
        length: length.try_into().map_err(invalid)?,
        number: number.try_into().map_err(invalid)?,
        names: [0; 128],
    };
    let length = libc::c_int::try_from(size_of::<Partition>()).map_err(invalid)?;
    let change = PartitionChange { operation: BLKPG_ADD_PARTITION, flags: 0, length, data: &raw const partition };
    // SAFETY: the kernel reads the structure, and the one that it points to, which lives until then.
    unsafe { ioctl::ioctl(disk, Setter::<BLKPG, PartitionChange>::new(change)) }
}

/// How long the kernel has run (CLOCK_BOOTTIME).
pub fn since_boot() -> std::time::Duration {
    std::time::Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Boottime)).unwrap_or_default()
}

/// Sets CLOCK_REALTIME forward by so many nanoseconds, backward if negative.
pub fn step_clock(nanoseconds: i64) -> io::Result<()> {
    const NS_PER_S: i64 = 1_000_000_000;
    // With ADJ_NANO `tv_usec` counts nanoseconds; it is never negative.
    let time = libc::timeval { tv_sec: nanoseconds.div_euclid(NS_PER_S), tv_usec: nanoseconds.rem_euclid(NS_PER_S) };
    adjtimex(libc::ADJ_SETOFFSET | libc::ADJ_NANO, |request| request.time = time)
}

/// Makes CLOCK_REALTIME gain so many microseconds, by 500 in a second; negative ones are lost. Replaces what is left of earlier ones.
pub fn slew_clock(microseconds: i64) -> io::Result<()> {
    adjtimex(libc::ADJ_OFFSET_SINGLESHOT, |request| request.offset = microseconds)
}

/// Sets the speed of CLOCK_REALTIME, in units of 1/65536 ppm that it gains beside what the processor's clock counts.
pub fn set_clock_frequency(frequency: i64) -> io::Result<()> {
    adjtimex(libc::ADJ_FREQUENCY, |request| request.freq = frequency)
}

fn adjtimex(modes: libc::c_uint, fill: impl FnOnce(&mut libc::timex)) -> io::Result<()> {
    // SAFETY: the structure holds integers alone, for which zero is a value.
    let mut request: libc::timex = unsafe { std::mem::zeroed() };
    request.modes = modes;
    fill(&mut request);
    // SAFETY: the kernel reads and writes the structure and nothing else.
    if unsafe { libc::adjtimex(&raw mut request) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Writing to a closed pipe or socket becomes an error (EPIPE) instead of this process's end.
pub fn ignore_sigpipe() {
    // SAFETY: no handler runs; SIG_IGN replaces whatever there was.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigIgn) };
}

/// Gives every signal that a runtime may have ignored its default action back; ignored signals survive execve(2).
pub fn default_signals() {
    for signal in [Signal::SIGPIPE, Signal::SIGCHLD] {
        // SAFETY: SIG_DFL runs no code of this process.
        let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
    }
}

/// A child that has ended and is not reaped yet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct EndedChild {
    /// Its pid.
    pub pid: i32,
    /// Exit status, or 128 + the signal that ended it: the shell's convention.
    pub code: u32,
}

/// A child that has ended, left unreaped (waitid(2), WNOWAIT). `None` if there is none now, or no child at all.
pub fn peek_ended_child() -> Option<EndedChild> {
    let info = waitid(libc::P_ALL, 0, libc::WEXITED | libc::WNOWAIT | libc::WNOHANG).ok()?;
    // SAFETY: waitid(2) succeeded, so these fields are filled; they are zero when no child has ended.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    let status = if info.si_code == libc::CLD_EXITED { status & 0xff } else { 128 + status };
    (pid > 0).then(|| EndedChild { pid, code: u32::try_from(status).unwrap_or(255) })
}

/// Reaps a child that [`peek_ended_child`] has shown.
pub fn reap(child: EndedChild) -> io::Result<()> {
    let pid = libc::id_t::try_from(child.pid).map_err(io::Error::other)?;
    waitid(libc::P_PID, pid, libc::WEXITED | libc::WNOHANG).map(drop)
}

fn waitid(kind: libc::idtype_t, id: libc::id_t, options: libc::c_int) -> io::Result<libc::siginfo_t> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: the kernel writes at most a siginfo_t there.
    if unsafe { libc::waitid(kind, id, info.as_mut_ptr(), options) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed before and perhaps filled by the kernel; every bit pattern of the structure is valid.
    Ok(unsafe { info.assume_init() })
}

/// kill(2), real-time signals included. The pid must be positive: this never signals a group.
pub fn kill(pid: u32, signal: u32) -> io::Result<()> {
    let (Ok(pid @ 1..), Ok(signal)) = (libc::pid_t::try_from(pid), libc::c_int::try_from(signal)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: a plain system call on two integers.
    if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whose child a forked process is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Parent {
    /// That of who forks.
    Caller,
    /// A sibling of who forks (CLONE_PARENT).
    CallersParent,
}

/// Which of the two processes returns.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Forked {
    /// The new one.
    Child,
    /// The old one, and the new one's pid.
    Parent { pid: i32 },
}

/// fork(2). Refused where there is another thread: what that holds, a lock of the allocator's for one, the child would wait for
/// for ever.
pub fn fork(parent: Parent) -> io::Result<Forked> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with threads does not fork"));
    }
    let flags = match parent {
        Parent::Caller => libc::SIGCHLD,
        Parent::CallersParent => libc::SIGCHLD | libc::CLONE_PARENT,
    };
    // SAFETY: without CLONE_VM the child has memory of its own and goes on with a copy of this stack. There is no other thread, so
    // every lock and every structure is as whole in the copy as here.
    match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
        0 => Ok(Forked::Child),
        pid @ 1.. => Ok(Forked::Parent { pid: i32::try_from(pid).map_err(io::Error::other)? }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts this thread under a filter (seccomp(2), SECCOMP_SET_MODE_FILTER). The flags must not ask for a listener.
pub fn install_filter(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    let len = libc::c_ushort::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads the structure and as many instructions as it counts, and writes neither.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes the event loop watch a descriptor.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd owns one descriptor, the same for as long as it lives.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

/// The same for one that others may look at.
pub fn watch_shared(fd: Arc<OwnedFd>, interest: Interest) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: as above, and it lives as long as the event loop has its share of it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_those_of_random_4() {
        assert_eq!((RNDADDENTROPY, RNDRESEEDCRNG), (0x4008_5203, 0x5207));
    }

    #[test]
    fn requests_about_disks_are_those_of_the_kernels_headers() {
        assert_eq!((BLKROSET, BLKPG), (0x125d, 0x1269));
        assert_eq!((size_of::<Partition>(), size_of::<PartitionChange>()), (152, 24));
    }
}
