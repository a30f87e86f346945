//! `bulkhead check --jail POD`: what the processes of a running pod may do on this node, thread by thread, as the kernel says
//! it (proc_pid_status(5), namespaces(7), proc_pid_fd(5)), and whether that is what the jail promises.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cli::pods;
use bulkhead_protocol::node::{FILE_SERVER_CAPABILITIES, NODE_CAPABILITIES, ProcessRecord, SHIM_RECORD, VMM_RECORD};

/// Namespaces that a VMM must not share with the node.
const NAMESPACES: [&str; 6] = ["mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// Capabilities by number (capabilities(7), include/uapi/linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// The only thread of a VMM with capabilities.
const FILE_SERVER: &str = "fs";

/// Options of `bulkhead check`.
#[derive(clap::Args)]
pub struct CheckArguments {
    /// A running pod's sandbox id, or the beginning of it
    #[arg(long, value_name = "POD")]
    jail: String,
}

/// Prints what it finds; fails if a promise of the jail does not hold.
pub fn run(arguments: &CheckArguments) -> Result<()> {
    let pod = pods::find(&arguments.jail)?;
    let (vmm, shim) = (pid(&pod.join(VMM_RECORD))?, pid(&pod.join(SHIM_RECORD))?);
    let mut gaps = Vec::new();
    println!("pod {}", pod.file_name().unwrap_or_default().display());
    println!("\nVMM, process {vmm}");
    namespaces(vmm, &mut gaps)?;
    root(vmm, &mut gaps)?;
    let filters = filters(vmm)?;
    let of_shim = threads(shim)?;
    let inherited = of_shim.iter().map(|thread| thread.filters).max().unwrap_or(0);
    for thread in threads(vmm)? {
        println!("  {}", thread.describe(&filters));
        thread.judge(&Promise::of_vmm(&thread, inherited), &mut gaps);
    }
    descriptors(vmm)?;
    println!("\nshim, process {shim}");
    for thread in of_shim {
        println!("  {}", thread.describe(&[]));
        thread.judge(&Promise::OF_SHIM, &mut gaps);
    }
    descriptors(shim)?;
    if gaps.is_empty() {
        println!("\nthe jail is closed");
        return Ok(());
    }
    bail!("the jail has gaps:\n  {}", gaps.join("\n  "))
}

/// The process that a shim has noted.
fn pid(file: &Path) -> Result<u32> {
    let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let record: ProcessRecord = text.parse().with_context(|| format!("cannot read {}", file.display()))?;
    Ok(record.pid)
}

fn namespaces(pid: u32, gaps: &mut Vec<String>) -> Result<()> {
    let mut words = Vec::new();
    for name in NAMESPACES {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{name}"));
        let own = of(&pid.to_string()).context("the VMM has ended")? != of("self")?;
        words.push(format!("{name} {}", if own { "own" } else { "THE NODE'S" }));
        if !own {
            gaps.push(format!("the VMM is in the node's {name} namespace"));
        }
    }
    println!("  namespaces    {}", words.join(", "));
    Ok(())
}

/// Mounts that the process sees; each must be data and nothing else.
fn root(pid: u32, gaps: &mut Vec<String>) -> Result<()> {
    let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).context("cannot read the VMM's mounts")?;
    for line in table.lines() {
        let fields: Vec<_> = line.split(' ').collect();
        let (at, options) = (fields.get(4).copied().unwrap_or("?"), fields.get(5).copied().unwrap_or_default());
        println!("  mount         {at} ({options})");
        let has = |option| options.split(',').any(|one| one == option);
        if !["nosuid", "nodev", "noexec"].into_iter().all(has) {
            gaps.push(format!("the VMM's mount {at} is not nosuid, nodev and noexec"));
        }
    }
    Ok(())
}

/// Names of the system calls that a VMM's threads may make, by kind, as its own binary has them.
fn filters(pid: u32) -> Result<Vec<(String, Vec<String>)>> {
    let output = Command::new(format!("/proc/{pid}/exe")).arg("filters").output();
    let output = output.context("cannot ask the VMM's program for its filters")?;
    ensure!(output.status.success(), "the VMM's program does not print its filters");
    let text = String::from_utf8(output.stdout).context(
        "the VMM's program does not print its filters as text; are bulkhead and bulkhead-vmm of the same release?",
    )?;
    let kind = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        let kind = words.next().unwrap_or_default();
        (kind, words.skip(1).collect())
    };
    Ok(text.lines().map(kind).collect())
}

/// A thread, as /proc has it.
struct Thread {
    name: String,
    tid: String,
    permitted: u64,
    bounding: u64,
    no_new_privs: bool,
    filters: u32,
}

impl Thread {
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find(|line| line.split(':').next() == Some(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        Some(Self {
            name: field("Name")?,
            tid: field("Pid")?,
            permitted: u64::from_str_radix(&field("CapPrm")?, 16).ok()?,
            bounding: u64::from_str_radix(&field("CapBnd")?, 16).ok()?,
            no_new_privs: field("NoNewPrivs")? == "1",
            filters: field("Seccomp_filters")?.parse().ok()?,
        })
    }

    /// The kind of a VMM's thread: its name without a number; the main thread has the program's.
    fn kind(&self) -> &str {
        if self.name == "bulkhead-vmm" { "main" } else { self.name.trim_end_matches(|c: char| c.is_ascii_digit()) }
    }

    fn describe(&self, filters: &[(String, Vec<String>)]) -> String {
        let calls = filters.iter().find(|(kind, _)| kind == self.kind()).map(|(_, calls)| calls);
        let calls = calls.map(|calls| format!("; {} system calls: {}", calls.len(), calls.join(" ")));
        format!(
            "thread {:<10} {:<14} {}{}; {} filters{}",
            self.tid,
            self.name,
            capabilities(self.permitted),
            if self.no_new_privs { "; no new privileges" } else { "; MAY GAIN PRIVILEGES" },
            self.filters,
            calls.unwrap_or_default()
        )
    }

    fn judge(&self, promise: &Promise, gaps: &mut Vec<String>) {
        let who = format!("thread {} ({})", self.tid, self.name);
        if self.filters < promise.filters {
            gaps.push(format!("{who} has no system call filter of its own"));
        }
        if !self.no_new_privs {
            gaps.push(format!("{who} may gain privileges"));
        }
        let beyond = self.permitted & !promise.permitted;
        if beyond != 0 {
            gaps.push(format!("{who} has capabilities: {}", capabilities(beyond)));
        }
        let beyond = self.bounding & !promise.bounding;
        if beyond != 0 {
            gaps.push(format!("{who} could be given capabilities: {}", capabilities(beyond)));
        }
    }
}

/// What a thread has at least of filters and at most of capabilities.
struct Promise {
    filters: u32,
    permitted: u64,
    bounding: u64,
}

impl Promise {
    /// Without new privileges a bounding set gives nothing, and the shim starts what has a bounding set of its own.
    const OF_SHIM: Self = Self { filters: 1, permitted: !NODE_CAPABILITIES, bounding: u64::MAX };

    /// The VMM inherits the shim's filters, and a thread's own comes on top of them.
    fn of_vmm(thread: &Thread, inherited: u32) -> Self {
        let permitted = if thread.name == FILE_SERVER { FILE_SERVER_CAPABILITIES } else { 0 };
        Self { filters: inherited + 1, permitted, bounding: FILE_SERVER_CAPABILITIES }
    }
}

fn capabilities(set: u64) -> String {
    let names: Vec<_> =
        CAPABILITIES.iter().enumerate().filter(|(bit, _)| set >> bit & 1 == 1).map(|(_, name)| *name).collect();
    if names.is_empty() { "no capabilities".to_owned() } else { names.join(" ") }
}

/// Threads of a process. KVM's worker of the kernel's, in which no code of the process ever runs, is none.
fn threads(pid: u32) -> Result<Vec<Thread>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).context("the process has ended")?.flatten();
    let threads = tasks.filter_map(|task| Thread::parse(&fs::read_to_string(task.path().join("status")).ok()?));
    Ok(threads.filter(|thread| !thread.name.starts_with("kvm-")).collect())
}

fn descriptors(pid: u32) -> Result<()> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).context("the process has ended")?.flatten();
    let mut found: Vec<(u32, String)> = entries
        .filter_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?.display().to_string();
            Some((entry.file_name().to_str()?.parse().ok()?, target))
        })
        .collect();
    found.sort();
    let kinds = found.iter().map(|(number, target)| format!("{number} {target}"));
    println!("  descriptors   {}", kinds.collect::<Vec<_>>().join(", "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tvcpu3\nPid:\t12\nCapPrm:\t0000000000000001\nCapBnd:\t00000000800000db\nNoNewPrivs:\t0\n\
                          Seccomp:\t0\nSeccomp_filters:\t0\n";

    #[test]
    fn thread_that_is_not_confined_is_a_gap() {
        let mut thread = Thread::parse(STATUS).unwrap();
        assert_eq!(thread.kind(), "vcpu");
        let mut gaps = Vec::new();
        thread.judge(&Promise::of_vmm(&thread, 0), &mut gaps);
        assert_eq!(gaps.len(), 3, "{gaps:?}");
        gaps.clear();
        thread = Thread { permitted: 0, no_new_privs: true, filters: 1, ..thread };
        thread.judge(&Promise::of_vmm(&thread, 1), &mut gaps);
        assert!(gaps.len() == 1 && gaps[0].contains("filter"), "the shim's filter is not the thread's: {gaps:?}");
        assert!(thread.describe(&[("vcpu".into(), vec!["ioctl".into()])]).contains("1 system calls: ioctl"));
    }

    #[test]
    fn shim_that_is_not_confined_is_a_gap() {
        let mut thread = Thread::parse(STATUS).unwrap();
        thread.permitted = u64::MAX;
        let mut gaps = Vec::new();
        thread.judge(&Promise::OF_SHIM, &mut gaps);
        assert_eq!(gaps.len(), 3, "{gaps:?}");
        assert!(gaps[2].contains("sys_module") && !gaps[2].contains("sys_admin"), "{gaps:?}");
        thread = Thread { permitted: !NODE_CAPABILITIES, no_new_privs: true, filters: 1, ..thread };
        gaps.clear();
        thread.judge(&Promise::OF_SHIM, &mut gaps);
        assert!(gaps.is_empty(), "{gaps:?}");
    }

    #[test]
    fn promises_are_those_of_the_jail() {
        assert_eq!(capabilities(FILE_SERVER_CAPABILITIES), "chown dac_override fowner fsetid setgid setuid setfcap");
        assert_eq!(
            capabilities(NODE_CAPABILITIES),
            "linux_immutable net_broadcast ipc_owner sys_module sys_rawio sys_pacct sys_boot sys_time sys_tty_config lease \
             audit_write audit_control mac_override mac_admin syslog wake_alarm block_suspend audit_read checkpoint_restore"
        );
    }

    #[test]
    fn capabilities_have_names() {
        assert_eq!(capabilities(0), "no capabilities");
        assert_eq!(capabilities(1 << 21 | 1), "chown sys_admin");
        assert_eq!(capabilities(1 << 40), "checkpoint_restore");
    }
}
