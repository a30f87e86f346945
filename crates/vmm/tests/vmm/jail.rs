//! The jail of service mode: what a VMM with a guest has left. These tests take root.

mod child;
mod filters;
mod landlock;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use bulkhead_protocol::control::{Command, Reply};
use bulkhead_protocol::vmspec::{DeviceSpec, FdIndex, IdMaps, VmSpec};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::common::{kernel, kvm, spec};
use crate::control::{SPIN, Vmm};

/// A machine with a share, and what is beside the share.
fn jailed(share: &Path) -> Vmm {
    let vmm = Vmm::start();
    let share = fs::File::open(share).unwrap();
    let devices = vec![
        DeviceSpec::Fs { tag: "share".into(), root: FdIndex(2), ids: IdMaps::default(), private_roots: true },
        DeviceSpec::Vsock,
        DeviceSpec::Balloon,
    ];
    let fds: [OwnedFd; 3] = [kvm(), kernel(&SPIN, &[]).into(), share.into()];
    vmm.send(1, Command::Boot(VmSpec { vcpus: 2, serial: None, devices, ..spec() }), &fds);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    vmm
}

/// Threads of a process by name: the fields of their status (proc_pid_status(5)).
fn threads(pid: u32) -> BTreeMap<String, BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let status = tasks.map(|task| fs::read_to_string(task.path().join("status")).unwrap());
    let fields = |text: String| -> BTreeMap<String, String> {
        text.lines()
            .filter_map(|line| line.split_once(":\t"))
            .map(|(k, v)| (k.to_owned(), v.trim().to_owned()))
            .collect()
    };
    // KVM has a worker of the kernel's among the process's threads, in which no code of the process ever runs.
    let ours = status.map(fields).filter(|fields| !fields["Name"].starts_with("kvm-"));
    ours.map(|fields| (fields["Name"].clone(), fields)).collect()
}

/// The same when each has confined itself, the first thing that it does when it gets a processor.
fn confined_threads(pid: u32) -> BTreeMap<String, BTreeMap<String, String>> {
    let limit = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let now = threads(pid);
        let all = now.len() == 8 && now.values().all(|status| status["Seccomp"] == "2");
        if all || std::time::Instant::now() > limit {
            return now;
        }
        // The kernel has no event for it.
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn hostile_19_jailed_vmm_has_the_share_for_its_root_and_namespaces_of_its_own() {
    let outside = tempfile::tempdir().unwrap();
    let share = outside.path().join("share");
    fs::create_dir(&share).unwrap();
    fs::write(share.join("inside"), "").unwrap();
    let vmm = jailed(&share);
    let proc = format!("/proc/{}", vmm.pid());
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup"] {
        let of = |who: &str| fs::read_link(format!("{who}/ns/{namespace}")).unwrap();
        assert_ne!(of(&proc), of("/proc/self"), "{namespace}");
    }
    let entries: Vec<_> =
        fs::read_dir(format!("{proc}/root")).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(entries, ["inside"]);
    let mounts = fs::read_to_string(format!("{proc}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(mounts.contains("nosuid,nodev,noexec"), "{mounts}");
    assert!(vmm.end());
}

#[test]
fn hostile_19_threads_keep_no_privilege_but_the_file_servers() {
    let share = tempfile::tempdir().unwrap();
    let vmm = jailed(share.path());
    let threads = confined_threads(vmm.pid());
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP.
    let file_server = format!("{:016x}", 0b1101_1011_u64 | 1 << 31);
    for (name, status) in &threads {
        let kept = if name == "fs" { &file_server } else { "0000000000000000" };
        assert_eq!(status["CapPrm"], kept, "{name}");
        assert_eq!(status["CapEff"], kept, "{name}");
        assert_eq!(status["CapBnd"], file_server, "{name}");
        assert_eq!((&*status["CapInh"], &*status["CapAmb"]), ("0000000000000000", "0000000000000000"), "{name}");
        assert_eq!(
            (&*status["NoNewPrivs"], &*status["Seccomp"], &*status["Seccomp_filters"]),
            ("1", "2", "1"),
            "{name}"
        );
    }
    let names: Vec<_> = threads.keys().map(String::as_str).collect();
    assert_eq!(names, ["bulkhead-vmm", "devices", "disks", "fs", "locks", "memory", "vcpu0", "vcpu1"]);
    assert!(vmm.end());
}

#[test]
fn hostile_19_no_descriptor_of_a_jailed_vmm_leads_to_a_directory_outside() {
    let share = tempfile::tempdir().unwrap();
    let vmm = jailed(share.path());
    for entry in fs::read_dir(format!("/proc/{}/fd", vmm.pid())).unwrap().flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let is_directory = fs::metadata(entry.path()).is_ok_and(|meta| meta.is_dir());
        // The share's root from inside, and the directory of descriptors as a mount of its own.
        assert!(!is_directory || target == Path::new("/"), "{target:?}");
    }
    assert!(vmm.end());
}

#[test]
fn hostile_19_descriptors_that_the_parent_left_open_are_closed() {
    let share = tempfile::tempdir().unwrap();
    let secret = fs::File::open("/etc").unwrap();
    rustix::io::fcntl_setfd(&secret, rustix::io::FdFlags::empty()).unwrap();
    let vmm = jailed(share.path());
    let entries = fs::read_dir(format!("/proc/{}/fd", vmm.pid())).unwrap().flatten();
    let targets: Vec<_> = entries.map(|entry| fs::read_link(entry.path()).unwrap_or_default()).collect();
    assert!(!targets.contains(&"/etc".into()), "{targets:?}");
    assert!(vmm.end());
}

/// Soft and hard limits of a process by name (proc_pid_limits(5)).
fn limits(process: &str) -> BTreeMap<String, [String; 2]> {
    let text = fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
    // Columns of words that are parted by two spaces at least.
    let rows = text.lines().skip(1).map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()));
    rows.map(|mut cells| {
        let mut next = || cells.next().unwrap().to_owned();
        (next(), [next(), next()])
    })
    .collect()
}

#[test]
fn hostile_19_core_files_locked_memory_and_message_queues_are_limited_to_nothing() {
    let share = tempfile::tempdir().unwrap();
    let vmm = jailed(share.path());
    let mut expected = limits("self");
    // One byte is no core file, and the limit at which a handler that is a pipe is not started.
    for (nothing, most) in [("Max core file size", "1"), ("Max locked memory", "0"), ("Max msgqueue size", "0")] {
        expected.insert(nothing.to_owned(), [most, most].map(str::to_owned));
    }
    let mut found = limits(&vmm.pid().to_string());
    // The file server raises its soft limit as far as it needs; the hard one stays.
    let [own, jailed] = [&mut expected, &mut found].map(|limits| limits.remove("Max open files").unwrap());
    assert_eq!(own[1], jailed[1]);
    assert_eq!(found, expected);
    assert!(vmm.end());
}

/// Mappings of a process: KiB, and the kernel's flags for them (proc_pid_smaps(5)).
fn mappings(pid: u32) -> Vec<(u64, Vec<String>)> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let sizes = text.lines().filter_map(|line| line.strip_prefix("Size:")?.trim().strip_suffix(" kB")?.parse().ok());
    let flags = text.lines().filter_map(|line| line.strip_prefix("VmFlags:"));
    sizes.zip(flags.map(|flags| flags.split_ascii_whitespace().map(str::to_owned).collect())).collect()
}

#[test]
fn hostile_19_no_memory_of_a_jailed_vmm_is_in_a_core_dump() {
    const BOOT_MIB: u64 = 16;
    const HOTPLUG_MIB: u64 = 256;
    let vmm = Vmm::start();
    vmm.boot(1, VmSpec { memory_mib: BOOT_MIB, hotplug_mib: HOTPLUG_MIB, ..spec() }, &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    let filter = fs::read_to_string(format!("/proc/{}/coredump_filter", vmm.pid())).unwrap();
    assert_eq!(u32::from_str_radix(filter.trim(), 16), Ok(0));
    let mappings = mappings(vmm.pid());
    let left_out = |flags: &[String]| flags.iter().any(|flag| flag == "dd");
    let sum: u64 = mappings.iter().filter(|(_, flags)| left_out(flags)).map(|(size, _)| size).sum();
    assert!(sum >= (BOOT_MIB + HOTPLUG_MIB) << 10, "{sum} KiB");
    // Of the VMM's own mappings none is as large.
    let dumped: Vec<_> = mappings.iter().filter(|(size, flags)| *size >= BOOT_MIB << 10 && !left_out(flags)).collect();
    assert!(dumped.is_empty(), "{dumped:?}");
    assert!(vmm.end());
}

#[test]
fn machine_without_a_share_has_an_empty_root() {
    let vmm = Vmm::start();
    vmm.boot(1, spec(), &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    assert_eq!(fs::read_dir(format!("/proc/{}/root", vmm.pid())).unwrap().count(), 0);
    assert!(vmm.end());
}

#[test]
fn hostile_19_filters_are_printed_with_their_size() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm")).arg("filters").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    for line in text.lines() {
        let words: Vec<_> = line.split(' ').collect();
        assert_eq!(words[1].parse::<usize>().unwrap(), words.len() - 2, "{line}");
    }
    assert_eq!(text.lines().count(), 7, "{text}");
}

#[test]
fn kernel_without_landlock_is_named_once() {
    let absent = SeccompFilter::new(
        [(libc::SYS_landlock_create_ruleset, vec![])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        TargetArch::x86_64,
    );
    let absent: BpfProgram = absent.unwrap().try_into().unwrap();
    let mut log = tempfile::tempfile().unwrap();
    let stderr = Stdio::from(log.try_clone().unwrap());
    // A filter is a thread's, and that of the processes that it starts.
    let start = || {
        seccompiler::apply_filter(&absent).unwrap();
        Vmm::start_with(stderr)
    };
    let vmm = std::thread::scope(|scope| scope.spawn(start).join().unwrap());
    vmm.boot(1, spec(), &SPIN);
    assert_eq!(vmm.reply(), Some(Reply::Done { id: 1 }));
    assert!(vmm.end());
    let mut said = String::new();
    log.seek(SeekFrom::Start(0)).unwrap();
    log.read_to_string(&mut said).unwrap();
    assert_eq!(said.matches("has no Landlock").count(), 1, "{said}");
}
