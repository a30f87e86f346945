//! What a pod's shim gives up before it serves. It mounts, enters network namespaces, makes cgroups and starts the VMM, so it
//! stays a privileged process in the node's namespaces; but it loads no kernel modules, sets no clock and traces nobody, and
//! neither does anything that it starts, OCI hooks included.
#![allow(unsafe_code)] // reason: close_range(2)

use std::collections::BTreeMap;

use bulkhead_protocol::node::NODE_CAPABILITIES;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{BackendError, SeccompAction, SeccompFilter, TargetArch};

/// Capabilities that are dropped.
const DROPPED: CapabilitySet = CapabilitySet::from_bits_retain(NODE_CAPABILITIES);

/// System calls that are refused with EPERM: the node's kernel, clock and swap, other processes' memory, files by handle, and
/// interfaces that a filter cannot look into.
const REFUSED: [libc::c_long; 36] = [
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_fanotify_init,
    libc::SYS_finit_module,
    libc::SYS_init_module,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kcmp,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_lookup_dcookie,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_process_madvise,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_userfaultfd,
];

/// Closes what the process was started with beside its standard streams: a daemon of a pod's life must not hold what
/// containerd, or who started that, has left open. To be called before anything has been opened.
pub fn close_inherited() -> Result<(), ConfineError> {
    // SAFETY: nothing in the process owns a descriptor beyond the standard ones yet.
    match unsafe { libc::close_range(3, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(ConfineError::Inherited(std::io::Error::last_os_error())),
    }
}

/// Confines the calling thread and all that it starts; to be called before it has started any.
pub fn confine() -> Result<(), ConfineError> {
    rustix::thread::set_no_new_privs(true).map_err(ConfineError::Privileges)?;
    let CapabilitySets { effective, permitted, .. } =
        rustix::thread::capabilities(None).map_err(ConfineError::Privileges)?;
    let kept = CapabilitySets {
        effective: effective.difference(DROPPED),
        permitted: permitted.difference(DROPPED),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, kept).map_err(ConfineError::Privileges)?;
    let refused = u32::try_from(libc::EPERM).unwrap_or(1);
    let rules: BTreeMap<_, _> = REFUSED.into_iter().map(|call| (call, Vec::new())).collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(refused), TargetArch::x86_64)
        .and_then(TryInto::try_into);
    let program: seccompiler::BpfProgram = filter.map_err(ConfineError::Compile)?;
    seccompiler::apply_filter(&program).map_err(ConfineError::Install)
}

/// The shim cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// close_range(2).
    #[error("cannot close the descriptors that the shim has inherited")]
    Inherited(#[source] std::io::Error),
    /// prctl(2) or capset(2).
    #[error("cannot drop the shim's privileges")]
    Privileges(#[source] Errno),
    /// Our own table is wrong.
    #[error("the shim's system call filter is not valid")]
    Compile(#[source] BackendError),
    /// seccomp(2).
    #[error("the kernel refuses the shim's system call filter; is it built with CONFIG_SECCOMP_FILTER?")]
    Install(#[source] seccompiler::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_19_confined_shim_and_its_children_cannot_touch_the_nodes_kernel() {
        // A thread's confinement is its own.
        let thread = std::thread::spawn(|| {
            let before = rustix::thread::capabilities(None).unwrap().permitted.bits();
            confine().unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let field = |name: &str| {
                status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned()).unwrap()
            };
            let permitted = u64::from_str_radix(&field("CapPrm:"), 16).unwrap();
            assert_eq!(permitted, before & !NODE_CAPABILITIES, "what `bulkhead check --jail` goes by");
            assert_eq!((&*field("NoNewPrivs:"), &*field("Seccomp:")), ("1", "2"));
            let child = std::process::Command::new("grep").args(["CapPrm", "/proc/self/status"]).output().unwrap();
            let inherited = String::from_utf8(child.stdout).unwrap();
            let inherited = u64::from_str_radix(inherited.trim_start_matches("CapPrm:").trim(), 16).unwrap();
            assert_eq!(inherited & NODE_CAPABILITIES, 0, "an exec gives nothing back");
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
            assert_eq!(rustix::time::clock_settime(rustix::time::ClockId::Realtime, now), Err(Errno::PERM));
        });
        thread.join().unwrap();
    }
}
