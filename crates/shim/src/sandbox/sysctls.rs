//! Kernel parameters that hold for a whole node, no pod can set, and workloads depend on: the guest takes the node's values,
//! as a container on runc lives with them. Those of namespaces are no such: a new namespace has the kernel's own.

use std::collections::HashMap;
use std::path::Path;

/// Longest value in bytes: all are single numbers.
const MAX_VALUE: usize = 32;

/// Parameters that bound or allow what the pod does to itself alone. Left out are those that follow from the size of memory
/// and reserve it, or judge by it what a guest that grows can have (`vm.min_free_kbytes`, `net.ipv4.tcp_mem`, huge pages,
/// `vm.overcommit_memory`, which the agent sets), that name something of the host (`kernel.core_pattern`),
/// or that are about what a guest does not have (swap, disks, power).
const FOLLOWED: [&str; 27] = [
    "fs.aio-max-nr",
    "fs.epoll.max_user_watches",
    "fs.file-max",
    "fs.inotify.max_queued_events",
    "fs.inotify.max_user_instances",
    "fs.inotify.max_user_watches",
    "fs.nr_open",
    "fs.pipe-max-size",
    "fs.pipe-user-pages-hard",
    "fs.pipe-user-pages-soft",
    "fs.protected_fifos",
    "fs.protected_hardlinks",
    "fs.protected_regular",
    "fs.protected_symlinks",
    "kernel.keys.maxbytes",
    "kernel.keys.maxkeys",
    "kernel.keys.root_maxbytes",
    "kernel.keys.root_maxkeys",
    "kernel.pid_max",
    "kernel.threads-max",
    "net.core.netdev_max_backlog",
    "net.core.rmem_default",
    "net.core.rmem_max",
    "net.core.wmem_default",
    "net.core.wmem_max",
    "net.netfilter.nf_conntrack_max",
    "vm.max_map_count",
];

/// What the node has of them. One that its kernel does not have is left to the guest's.
pub fn of_node() -> HashMap<String, String> {
    read(Path::new("/proc/sys"))
}

fn read(root: &Path) -> HashMap<String, String> {
    let value = |name: &&str| {
        let value = std::fs::read_to_string(root.join(name.replace('.', "/"))).ok()?;
        let value = value.trim();
        (!value.is_empty() && value.len() <= MAX_VALUE).then(|| (name.to_string(), value.to_owned()))
    };
    FOLLOWED.iter().filter_map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_the_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, value: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value).unwrap();
        };
        write("vm/max_map_count", "262144\n");
        write("fs/pipe-max-size", "1048576\n");
        write("fs/file-max", &"9".repeat(100));
        write("vm/swappiness", "60\n");
        let wanted = [("vm.max_map_count", "262144"), ("fs.pipe-max-size", "1048576")];
        assert_eq!(read(dir.path()), wanted.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    }
}
