//! Service mode: the binary, its control socket, and machines of a few bytes.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command as Process, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use bulkhead_protocol::control::{self, Command, ExitReason, Reply, Request};
use bulkhead_protocol::vmspec::{DeviceSpec, VmSpec};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::common::{kernel, kvm, spec, start_second_vcpu};

/// `ud2` without an interrupt table.
const TRIPLE_FAULT: [u8; 2] = [0x0f, 0x0b];
/// `jmp .`
pub const SPIN: [u8; 2] = [0xeb, 0xfe];

/// A VMM process and the shim's end of its control socket.
pub struct Vmm {
    socket: OwnedFd,
    process: Child,
}

impl Vmm {
    /// Starts the process.
    pub fn start() -> Self {
        Self::start_with(Stdio::inherit())
    }

    /// Starts the process with its standard error somewhere.
    pub fn start_with(stderr: Stdio) -> Self {
        // Held from the moment when the descriptor can be inherited until it is closed here, so that only one child gets it.
        static INHERITING: Mutex<()> = Mutex::new(());
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let guard = INHERITING.lock().unwrap();
        fcntl_setfd(&theirs, FdFlags::empty()).unwrap();
        let process = Process::new(env!("CARGO_BIN_EXE_bulkhead-vmm"))
            .args(["--control-fd", &theirs.as_raw_fd().to_string()])
            .stderr(stderr)
            .spawn()
            .unwrap();
        drop(theirs);
        drop(guard);
        Self { socket: ours, process }
    }

    /// Sends a command.
    pub fn send(&self, id: u64, command: Command, fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        control::send(&self.socket, &Request { id, command }, &fds).unwrap();
    }

    /// Sends Boot for a spec whose serial port goes nowhere.
    pub fn boot(&self, id: u64, spec: VmSpec, code: &[u8]) {
        let fds = [kvm(), kernel(code, &[]).into()];
        self.send(id, Command::Boot(VmSpec { serial: None, ..spec }), &fds);
    }

    /// The next message; `None` at the end.
    pub fn reply(&self) -> Option<Reply> {
        control::receive(&self.socket).unwrap().map(|(reply, _)| reply)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Makes [`Self::reply`] fail when nothing comes for this long.
    pub fn limit_waiting(&self, limit: Duration) {
        set_socket_timeout(&self.socket, Timeout::Recv, Some(limit)).unwrap();
    }

    /// Waits for the process, which ends by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }

    /// Closes the socket and waits; whether the process ended well.
    pub fn end(mut self) -> bool {
        drop(self.socket);
        self.process.wait().unwrap().success()
    }
}

#[test]
fn guest_that_ends_is_reported_and_the_process_ends_well() {
    let vmm = Vmm::start();
    vmm.boot(7, spec(), &TRIPLE_FAULT);
    let mut replies = [vmm.reply().unwrap(), vmm.reply().unwrap()];
    // The guest may be faster than the reply.
    replies.sort_by_key(|reply| !matches!(reply, Reply::Done { .. }));
    assert_eq!(replies, [Reply::Done { id: 7 }, Reply::GuestExited { reason: ExitReason::Reset }]);
    assert_eq!(vmm.reply(), None);
    assert!(vmm.end());
}

/// A thread of a process's that does nothing, until it is dropped.
struct Stopped(libc::pid_t);

impl Stopped {
    fn new(pid: u32, thread: &str) -> Self {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let named = |path: &Path| std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == thread);
        let task = tasks.map(|task| task.path()).find(|path| named(path)).unwrap();
        let stopped = Self(task.file_name().unwrap().to_str().unwrap().parse().unwrap());
        stopped.trace(libc::PTRACE_SEIZE);
        stopped.trace(libc::PTRACE_INTERRUPT);
        let mut status = 0;
        // SAFETY: the status is where the call is told to put it.
        #[allow(unsafe_code)]
        let waited = unsafe { libc::waitpid(stopped.0, &raw mut status, libc::__WALL) };
        assert!(waited == stopped.0 && libc::WIFSTOPPED(status), "{waited} {status:#x}");
        stopped
    }

    fn trace(&self, request: libc::c_uint) {
        // SAFETY: none of the requests made here reads or writes memory.
        #[allow(unsafe_code)]
        let outcome = unsafe { libc::ptrace(request, self.0, 0, 0) };
        assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.trace(libc::PTRACE_DETACH);
    }
}

#[test]
fn hostile_07_end_of_a_guest_is_reported_before_its_vcpus_have_ended() {
    let vmm = Vmm::start();
    // Longer than any of it takes, on a machine under heavy load too.
    vmm.limit_waiting(Duration::from_secs(20));
    let mut first = start_second_vcpu();
    first.extend([0xa1, 0xa4, 0x0f, 0, 0xd0, 0x85, 0xc0, 0x74, 0xf7]); // mov eax, [DeviceID of slot 0]; test eax, eax; je back
    first.extend(TRIPLE_FAULT);
    let mut second = vec![0xba, 0xf8, 0x03, 0xb0, b'2', 0xee]; // mov dx, 0x3f8; mov al, '2'; out dx, al
    second.extend(SPIN);
    let (mut serial, theirs) = std::io::pipe().unwrap();
    let fds = [kvm(), kernel(&first, &second).into(), theirs.into()];
    vmm.send(1, Command::Boot(VmSpec { vcpus: 2, boot_vcpus: 2, ..spec() }), &fds);
    drop(fds);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    // Its thread runs.
    serial.read_exact(&mut [0]).unwrap();
    let stopped = Stopped::new(vmm.pid(), "vcpu1");
    // The guest ends when it sees the device.
    vmm.send(2, Command::AddDevice(DeviceSpec::Rng), &[]);
    assert_eq!(vmm.reply(), Some(Reply::Added { id: 2, slot: 0 }));
    assert_eq!(vmm.reply(), Some(Reply::GuestExited { reason: ExitReason::Reset }));
    drop(stopped);
    assert_eq!(vmm.reply(), None);
    assert!(vmm.end());
}

#[test]
fn vmm_ends_when_the_shim_does() {
    let vmm = Vmm::start();
    vmm.boot(1, VmSpec { vcpus: 2, ..spec() }, &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    assert!(vmm.end());
}

#[test]
fn machine_that_cannot_be_built_is_reported_and_ends_the_process() {
    let vmm = Vmm::start();
    vmm.boot(3, VmSpec { memory_mib: 1, ..spec() }, &SPIN);
    match vmm.reply() {
        Some(Reply::Failed { id: 3, message }) => assert!(message.contains("1 MiB"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(vmm.reply(), None);
    assert!(!vmm.end());
}

#[test]
fn vsock_connections_need_a_machine_with_the_device() {
    let vmm = Vmm::start();
    let stream = || OwnedFd::from(std::io::pipe().unwrap().0);
    vmm.send(1, Command::ConnectVsock { port: 1024 }, &[stream()]);
    assert!(matches!(vmm.reply(), Some(Reply::Failed { id: 1, .. })));
    vmm.boot(2, VmSpec { devices: vec![DeviceSpec::Vsock], ..spec() }, &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 2 }));
    vmm.send(3, Command::ConnectVsock { port: 1024 }, &[]);
    assert!(matches!(vmm.reply(), Some(Reply::Failed { id: 3, .. })));
    assert!(vmm.end());
}

#[test]
fn counters_are_told_device_by_device() {
    let vmm = Vmm::start();
    vmm.send(1, Command::Counters, &[]);
    assert!(matches!(vmm.reply(), Some(Reply::Failed { id: 1, .. })), "there is no machine yet");
    vmm.boot(2, VmSpec { devices: vec![DeviceSpec::Rng, DeviceSpec::Vsock], ..spec() }, &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 2 }));
    vmm.send(3, Command::Counters, &[]);
    let Some(Reply::Counters { id: 3, devices }) = vmm.reply() else { panic!("no counters") };
    let kinds: Vec<_> = devices.iter().map(|device| (device.slot, device.device, device.kicks)).collect();
    assert_eq!(kinds, [(0, 4, 0), (1, 19, 0)]);
    assert!(vmm.end());
}

#[test]
fn second_boot_is_refused_and_the_machine_goes_on() {
    let vmm = Vmm::start();
    vmm.boot(1, spec(), &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    vmm.boot(2, spec(), &SPIN);
    assert!(matches!(vmm.reply(), Some(Reply::Failed { id: 2, .. })));
    assert!(vmm.end());
}

#[test]
fn control_fd_that_is_not_open_gives_one_sentence() {
    let output = Process::new(env!("CARGO_BIN_EXE_bulkhead-vmm")).args(["--control-fd", "99"]).output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("--control-fd"), "{text}");
}
