//! The hostile guest's machine: one of every device, each over something real, and what is to be true of all of them
//! when the guest has ended.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, PipeReader, Read, Seek, SeekFrom};
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use bulkhead_protocol::control::{Command, ExitReason, Reply};
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, IdMaps, VmSpec};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use rustix::thread::UnshareFlags;
use tempfile::TempDir;

use crate::common::{file, kvm};
use crate::control::Vmm;
use crate::tap::tap_in_own_namespace;

/// How long nothing happens before a test fails: the payload's own limit, and some.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Boot memory and the blocks of what can be plugged, in MiB: sizes that nothing else in the process has.
pub const GUEST_MIB: [u64; 3] = [40, 128, 128];

/// What the guest is asked to have of the latter; the flood ends when that changes.
pub const REQUESTED_MIB: u64 = 128;

/// Most lines that the VMM may write to its log for what a guest does: five a minute from each place that logs.
const MOST_LOG_LINES: usize = 250;

const DISK_LEN: u64 = 8 << 20;

/// In what circumstances a guest runs.
#[derive(Default)]
pub struct Options {
    /// Nobody reads the serial port and the console.
    pub unread: bool,
    /// The VMM's limit of open files (RLIMIT_NOFILE).
    pub open_files: Option<u64>,
}

/// A VMM with a hostile guest in it.
pub struct HostileGuest {
    vmm: Vmm,
    lines: Receiver<String>,
    report: Vec<String>,
    replies: Vec<Reply>,
    log: File,
    disk: File,
    wire: UdpSocket,
    /// A directory with the share, and beside it what the guest must not reach.
    outside: TempDir,
    /// Counts what comes out of the console.
    printed: Option<JoinHandle<u64>>,
    /// Pipes whose readers are there and do not read.
    _unread: Vec<PipeReader>,
}

/// Boots a guest for one scenario, and checks that it and the VMM come to a good end.
pub fn run(scenario: &str) {
    HostileGuest::boot(scenario).ends_well();
}

impl HostileGuest {
    /// Boots a guest for one scenario.
    pub fn boot(scenario: &str) -> Self {
        Self::boot_with(scenario, &Options::default())
    }

    /// The same, in circumstances.
    pub fn boot_with(scenario: &str, options: &Options) -> Self {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let share = outside.path().join("share");
        let volume = share.join("volume");
        fs::create_dir_all(&volume).unwrap();
        own_mount(&volume);
        fs::write(volume.join("hello"), "hello from the host").unwrap();
        let (tap, wire) = tap_in_own_namespace();
        let disk = file(&[]);
        disk.set_len(DISK_LEN).unwrap();
        let (serial_reader, serial) = std::io::pipe().unwrap();
        let (console_reader, console) = std::io::pipe().unwrap();
        let log = tempfile::tempfile().unwrap();
        let vmm = Vmm::start_with(Stdio::from(log.try_clone().unwrap()));
        vmm.limit_waiting(PATIENCE);
        if let Some(limit) = options.open_files {
            let pid = Pid::from_raw(vmm.pid().try_into().unwrap());
            prlimit(pid, Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) }).unwrap();
        }

        let fds: Vec<OwnedFd> = vec![
            kvm(),
            file(payload()).into(),
            serial.into(),
            console.into(),
            disk.try_clone().unwrap().into(),
            file(&[7; 4096]).into(),
            File::open(&share).unwrap().into(),
            tap.into(),
        ];
        vmm.send(1, Command::Boot(spec(scenario)), &fds);
        drop(fds);
        let (mut unread, mut printed) = (vec![], None);
        let lines = if options.unread {
            unread.extend([serial_reader, console_reader]);
            channel().1
        } else {
            printed =
                Some(thread::spawn(move || std::io::copy(&mut { console_reader }, &mut std::io::sink()).unwrap()));
            read_lines(serial_reader)
        };
        let mut guest =
            Self { vmm, lines, report: vec![], replies: vec![], log, disk, wire, outside, printed, _unread: unread };
        guest.wait_for_reply(&Reply::Done { id: 1 });
        guest
    }

    /// The process.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// What the VMM has said so far.
    pub fn replies(&self) -> &[Reply] {
        &self.replies
    }

    /// A socket whose broadcasts go to the guest.
    pub fn wire(&self) -> &UdpSocket {
        &self.wire
    }

    /// The first bytes of the disk.
    pub fn disk(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.disk.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Waits for a line of the report.
    pub fn wait_for(&mut self, wanted: &str) {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|error| self.give_up(&error.to_string()));
            self.report.push(line);
            if self.report.last().is_some_and(|line| line == wanted) {
                return;
            }
        }
    }

    /// Waits for the guest's end, which has to be an orderly one.
    pub fn wait_for_exit(&mut self) {
        self.wait_for_reply(&Reply::GuestExited { reason: ExitReason::Reset });
    }

    fn wait_for_reply(&mut self, wanted: &Reply) {
        while !self.replies.contains(wanted) {
            match self.vmm.reply() {
                Some(reply @ Reply::Failed { .. }) => panic!("{reply:?}"),
                Some(reply) => self.replies.push(reply),
                None => self.give_up("the VMM is gone"),
            }
        }
    }

    fn give_up(&self, why: &str) -> ! {
        panic!("{why}; the guest said {:#?}, the VMM {:?} and\n{}", self.report, self.replies, self.read_log());
    }

    /// Lines that the VMM has logged.
    pub fn log_lines(&self) -> usize {
        self.read_log().lines().count()
    }

    fn read_log(&self) -> String {
        let mut text = String::new();
        let mut log = &self.log;
        log.seek(SeekFrom::Start(0)).unwrap();
        log.read_to_string(&mut text).unwrap();
        text
    }

    /// Waits for the end of guest and VMM, and checks everything. Returns the guest's report.
    pub fn ends_well(&mut self) -> Vec<String> {
        self.wait_for("done");
        let bad: Vec<_> = self.report.iter().filter(|line| line.starts_with("bad")).collect();
        assert!(bad.is_empty(), "{bad:#?}\nof {:#?}\nVMM: {}", self.report, self.read_log());
        let good = self.report.iter().filter(|line| line.starts_with("ok")).count();
        assert!(good > 1, "{:#?}", self.report);
        self.wait_for_exit();
        self.process_ends_well();
        std::mem::take(&mut self.report)
    }

    /// The guest has ended and has left traces: its requests were no mere noise.
    pub fn has_used_its_devices(&mut self) {
        let printed = self.printed.take().unwrap().join().unwrap();
        assert!(printed > 1000, "the guest has printed {printed} bytes");
        assert_eq!(self.disk.metadata().unwrap().len(), DISK_LEN);
    }

    /// The VMM has reported the guest's end: so it ends too, has logged little, and has touched nothing that is not the
    /// guest's.
    pub fn process_ends_well(&mut self) {
        assert_eq!(self.vmm.reply(), None);
        assert!(self.vmm.wait().success(), "{}", self.read_log());
        let log = self.read_log();
        assert!(log.lines().count() <= MOST_LOG_LINES && log.len() <= MOST_LOG_LINES * 200, "{log}");
        assert!(!log.contains("panicked"), "{log}");
        let mut names: Vec<OsString> =
            fs::read_dir(self.outside.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["secret", "share"]);
        assert_eq!(fs::read_to_string(self.outside.path().join("secret")).unwrap(), "secret");
        for place in ["/escaped", "/tmp/escaped"] {
            assert!(!Path::new(place).exists(), "{place}");
        }
    }
}

/// Makes a directory a mount, as volumes of the share are, which only this thread and the processes that it starts see.
#[allow(unsafe_code)] // unshare(2)
fn own_mount(directory: &Path) {
    // SAFETY: of what unshare_unsafe warns about (shared descriptor tables) NEWNS changes nothing.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.expect("no mount namespace; run as root");
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("tmpfs", directory, "tmpfs", MountFlags::empty(), None).unwrap();
}

fn spec(scenario: &str) -> VmSpec {
    let disk = |file, read_only| DeviceSpec::Block { file: FdIndex(file), read_only, serial: "hostile".into() };
    VmSpec {
        kvm: FdIndex(0),
        kernel: FdIndex(1),
        initramfs: None,
        cmdline: format!("hostile={scenario}"),
        vcpus: 1,
        boot_vcpus: 1,
        memory_mib: GUEST_MIB[0],
        hotplug_mib: GUEST_MIB[1] + GUEST_MIB[2],
        devices: vec![
            DeviceSpec::Console { output: FdIndex(3) },
            disk(4, false),
            disk(5, true),
            DeviceSpec::Fs { tag: "share".into(), root: FdIndex(6), ids: IdMaps::default(), private_roots: true },
            DeviceSpec::Net { tap: FdIndex(7), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 },
            DeviceSpec::Vsock,
            DeviceSpec::Rng,
            DeviceSpec::Balloon,
            DeviceSpec::Memory { requested_mib: REQUESTED_MIB },
        ],
        serial: Some(FdIndex(2)),
    }
}

/// The lines that come out of a pipe, as they come.
fn read_lines(pipe: PipeReader) -> Receiver<String> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).split(b'\n') {
            let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// The payload, compiled once for all tests of a run.
fn payload() -> &'static [u8] {
    static ELF: OnceLock<Vec<u8>> = OnceLock::new();
    ELF.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let output = directory.path().join("payload");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vmm/hostile_guest");
        let is_source = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "c");
        let files = fs::read_dir(&sources).unwrap().map(|entry| entry.unwrap().path()).filter(is_source);
        let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let mut command = Process::new(&compiler);
        command.args(COMPILER_FLAGS).arg("-T").arg(sources.join("payload.ld")).arg("-o").arg(&output).args(files);
        let result = command.output().unwrap_or_else(|error| panic!("no C compiler ({}): {error}", compiler.display()));
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        fs::read(output).unwrap()
    })
}

/// A kernel: no library, no stack below the stack pointer, no vector registers, nothing that must be relocated. String
/// instructions are left out because an emulating KVM exits for each turn of one.
const COMPILER_FLAGS: &[&str] = &[
    "-std=gnu11",
    "-O1",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-fno-pic",
    "-no-pie",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-mstringop-strategy=libcall",
    "-fno-tree-loop-distribute-patterns",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
];
