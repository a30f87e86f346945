//! The filters' tables. What a filter does to a process is tested with processes, tests/vmm/jail/filters.rs.

use super::*;

/// Firecracker's filters on x86_64: 27 calls for a vCPU's thread, 50 for the VMM's main thread.
#[test]
fn hostile_19_filters_allow_no_more_calls_than_firecrackers() {
    for (kind, most) in [(Kind::Vcpu, 27), (Kind::Main, 50), (Kind::Devices, 50), (Kind::Disks, 50), (Kind::Memory, 50)]
    {
        let calls = kind.calls();
        assert!(calls.len() <= most, "{}: {} calls: {calls:?}", kind.name(), calls.len());
    }
}

#[test]
fn hostile_19_no_thread_may_make_processes_sockets_send_descriptors_or_change_its_confinement() {
    let never = [
        "accept4",
        "bind",
        "bpf",
        "clone",
        "clone3",
        "connect",
        "execve",
        "execveat",
        "fork",
        "io_uring_setup",
        "kill",
        "mount",
        "open_by_handle_at",
        "open_tree",
        "pidfd_getfd",
        "pivot_root",
        "process_vm_writev",
        "ptrace",
        "rt_sigaction",
        "sendmmsg",
        "sendmsg",
        "setns",
        "socket",
        "socketpair",
        "unshare",
        "userfaultfd",
        "vfork",
    ];
    for kind in Kind::ALL {
        let calls = kind.calls();
        assert!(never.iter().all(|call| !calls.contains(call)), "{}: {calls:?}", kind.name());
    }
}

#[test]
fn hostile_19_only_the_file_server_opens_anything() {
    for kind in Kind::ALL {
        let opens = kind.calls().iter().any(|call| call.starts_with("open"));
        assert_eq!(opens, kind == Kind::FileServer, "{}", kind.name());
    }
}

#[test]
fn tables_name_each_call_once_and_compile() {
    for kind in Kind::ALL {
        let calls = kind.calls();
        assert!(calls.windows(2).all(|pair| pair[0] != pair[1]), "{}: {calls:?}", kind.name());
    }
    Filters::compile().unwrap();
}
