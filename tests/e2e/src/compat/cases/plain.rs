//! What an ordinary container in an ordinary pod sees of itself and of its kernel.

use crate::compat::Area::{Lifecycle, Security};
use crate::compat::Probe;

/// Identity, privileges and confinement of a process.
pub const STATUS: &str = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|Umask)' /proc/self/status";

/// An init and an exec of an ordinary container.
pub fn probes() -> Vec<Probe> {
    vec![kernel(identity(Probe::new("init"), INIT)), identity(Probe::by_exec("exec"), EXEC)]
}

const INIT: [&str; 8] = [
    "status of init",
    "limits of init",
    "pending signals of init",
    "environment of init",
    "oom_score_adj of init",
    "descriptors of init",
    "cgroup of init",
    "identity of init",
];

const EXEC: [&str; 8] = [
    "status of an exec",
    "limits of an exec",
    "pending signals of an exec",
    "environment of an exec",
    "oom_score_adj of an exec",
    "descriptors of an exec",
    "cgroup of an exec",
    "identity of an exec",
];

/// What every process is asked.
fn identity(probe: Probe, names: [&'static str; 8]) -> Probe {
    let [status, limits, pending, env, adjustment, fds, cgroup, id] = names;
    probe
        .case(Security, status, STATUS)
        .case(Security, limits, "grep -v 'pending signals' /proc/self/limits")
        // The kernel's default depends on the memory it has: enough of them is what matters.
        .case(Security, pending, "[ $(awk '/pending signals/ { print $4 }' /proc/self/limits) -ge 16384 ] && echo enough")
        .case(Security, env, "env | sort; pwd; umask; stat -c '%a %u %n' .")
        .case(Security, adjustment, "cat /proc/self/oom_score_adj")
        .case(Security, fds, "ls /proc/self/fd | wc -l; tty; stat -Lc '%F %U %a' /dev/stdout")
        .case(Security, cgroup, "cat /proc/self/cgroup; ls -l /proc/self/ns | awk '{ print $9 }'")
        .case(Security, id, "id; cat /proc/self/comm; cat /proc/self/uid_map /proc/self/coredump_filter /proc/self/timerslack_ns; awk '{ print $7, $19, $20 }' /proc/self/stat")
}

fn kernel(probe: Probe) -> Probe {
    mounts(probe)
        .case(Security, "process list", "ps -o user,comm; cat /proc/1/comm; tr '\\0' ' ' < /proc/1/cmdline | wc -w; readlink /proc/1/exe /proc/1/root /proc/1/cwd")
        .case(Security, "host name and files of the kubelet", "hostname; cat /etc/hostname; cat /etc/hosts; cat /etc/resolv.conf; stat -c '%a %u %g %n' /etc/hostname /etc/hosts /etc/resolv.conf")
        .case(Security, "domain name", "cat /proc/sys/kernel/domainname; dnsdomainname")
        .case(Security, "uname", "uname -s -n -m -o")
        .case(Security, "kernel release", "uname -r -v")
        .differs("the guest has a kernel of its own")
        .case(Lifecycle, "number of CPUs", "nproc; grep -c ^processor /proc/cpuinfo")
        .case(Security, "clock and time zone", "date +%Z; [ $(date +%Y) -ge 2024 ] && echo sane; awk '{ exit !($1 > 0) }' /proc/uptime && echo up")
        .case(Security, "times of new files beside the clock", "probe clock /tmp 2>/dev/null")
        .case(Security, "kernel parameters of the pod's namespaces", "cd /proc/sys; for f in kernel/shmmax kernel/shmall kernel/shmmni kernel/msgmax kernel/msgmnb kernel/sem fs/mqueue/msg_max net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range net/ipv4/ip_local_port_range net/ipv4/tcp_syncookies net/ipv6/conf/all/disable_ipv6 net/ipv4/conf/all/rp_filter net/core/somaxconn; do echo $f $(cat $f); done")
        .case(Security, "kernel parameters of the node that pods depend on", "cd /proc/sys; for f in fs/aio-max-nr fs/epoll/max_user_watches fs/file-max fs/inotify/max_queued_events fs/inotify/max_user_instances fs/inotify/max_user_watches fs/nr_open fs/pipe-max-size fs/pipe-user-pages-hard fs/pipe-user-pages-soft fs/protected_fifos fs/protected_hardlinks fs/protected_regular fs/protected_symlinks kernel/keys/maxbytes kernel/keys/maxkeys kernel/keys/root_maxbytes kernel/keys/root_maxkeys kernel/pid_max kernel/threads-max vm/max_map_count kernel/randomize_va_space; do echo $f $(cat $f); done")
        .case(Security, "overcommitting of memory", "cat /proc/sys/vm/overcommit_memory")
        .differs("it is always 1, as the kubelet sets it on a node: the kernel's default goes by the memory that there is, and a guest gets more memory only when it needs it")
        .case(Security, "kernel parameters that applications read", "cd /proc/sys; for f in vm/swappiness kernel/core_pattern kernel/yama/ptrace_scope kernel/perf_event_paranoid kernel/unprivileged_bpf_disabled kernel/dmesg_restrict kernel/kptr_restrict; do echo $f $([ -e $f ] && cat $f || echo missing); done")
        .differs("the guest's kernel has its own defaults: these parameters are about things that a guest does not have, or about who may look at the guest's kernel")
        .case(Security, "device access", "for d in null zero full random urandom tty; do head -c 1 /dev/$d | wc -c; done; echo x > /dev/null && echo ok; echo x > /dev/full; head -c 4 /dev/zero | od")
        .case(Security, "masked paths", "for p in /proc/keys /proc/timer_list /proc/scsi /proc/asound /proc/timer_stats /proc/latency_stats; do ls -ldn $p | cut -c1-10; cat $p 2>&1 | wc -c; done; ls /sys/firmware; head -c 1 /proc/kcore 2>/dev/null | wc -c")
        .case(Security, "read-only paths", "for p in /proc/bus /proc/fs /proc/irq /proc/sys; do touch $p/x $p; done; echo 1 > /proc/sys/vm/overcommit_memory; echo x > /proc/sys/kernel/core_pattern")
        .case(Security, "sysrq-trigger", "ls /proc/sysrq-trigger; echo h > /proc/sysrq-trigger")
        .differs("the guest kernel has no magic SysRq; without it the file is missing instead of read-only")
        .case(Security, "files of proc that are masked or read-only", "ls -d /proc/acpi /proc/kcore /proc/self/loginuid /proc/self/sched /proc/asound /proc/latency_stats")
        .differs("the guest kernel has no ACPI, kcore, audit and scheduler debugging; what is missing needs no mask")
        .case(Security, "forwarding", "cat /proc/sys/net/ipv4/ip_forward")
        .case(Security, "cgroup file system", "ls -ld /sys/fs/cgroup | cut -c1-10; cd /sys/fs/cgroup; cat memory.max cpu.max pids.max cpu.weight memory.swap.max cgroup.type; wc -l < cgroup.procs; mkdir x; echo 1 > memory.max")
        .case(Security, "cgroup controllers", "cat /sys/fs/cgroup/cgroup.controllers")
        .differs("the guest kernel has no rdma controller: a guest has no such device")
        .case(Security, "kubernetes' cgroup files", "cd /sys/fs/cgroup; ls | grep -vE '^(rdma|memory.zswap|memory.numa|hugetlb|misc)'")
        .case(Security, "shared memory", "df -k /dev/shm | tail -1 | awk '{print $2}'; stat -c '%a %u %g %F' /dev/shm; touch /dev/shm/x && rm /dev/shm/x")
        .case(Security, "kernel's refusals", "mkdir -p /mnt; mount -t tmpfs x /mnt; unshare -U true; unshare -n true; chroot / true && echo chroot; hostname x; date -s 2000-01-01 >/dev/null; dmesg | wc -l; kill -0 1 && echo kill; renice -n -5 $$ 2>&1 | sed 's/[0-9]*//g'")
        .case(Security, "device nodes made by the container", "mknod /tmp/null c 1 3 && stat -c '%F %t %T' /tmp/null; mknod /tmp/disk b 8 0")
        .differs("the root file system is a share of the host, on which a guest may not make device nodes; in a tmpfs it may")
        .case(Security, "device nodes made in a tmpfs", "cd /dev; mknod null2 c 1 3 && echo x > null2 && echo usable; mknod disk b 8 0 && head -c 1 disk; mknod mem c 1 1 && head -c 1 mem; rm -f null2 disk mem")
        .case(Security, "system calls of root", "probe calls | grep -vE '^(mknod of|open of that)'")
}

fn mounts(probe: Probe) -> Probe {
    probe
        .case(Security, "mount points", "awk '{ print $5 }' /proc/self/mountinfo | grep -vE '^/proc/(acpi|kcore|sysrq-trigger|asound|latency_stats|sched_debug)'")
        .case(Security, "mounts of the kernel's file systems", "awk '{ n = 6; while ($(++n) != \"-\"); print $5, $6, $(n + 1) }' /proc/self/mountinfo | grep -E '^/(dev|proc|sys)' | grep -vE '^/proc/(acpi|kcore|sysrq-trigger|asound|latency_stats|sched_debug)'")
        .case(Security, "sizes and modes of the tmpfs mounts", "awk '{ n = 6; while ($(++n) != \"-\"); if ($(n+1) == \"tmpfs\") print $5, $(n + 3) }' /proc/self/mountinfo | grep -E '^/(dev|proc|sys)' | sed 's/,inode64//' | grep -vE '^/proc/(acpi|kcore|sysrq-trigger|asound|latency_stats|sched_debug)'")
        .case(Security, "propagation of mounts", "awk '{ print $5, $7 == \"-\" ? \"private\" : $7 }' /proc/self/mountinfo | grep -vE '^/proc/(acpi|kcore|sysrq-trigger|asound|latency_stats|sched_debug)'")
        .case(Security, "type of the root file system", "awk '$5 == \"/\" { n = 6; while ($(++n) != \"-\"); print $6, $(n + 1) }' /proc/self/mountinfo")
        .differs("root file systems come over virtio-fs, mounted without device nodes; the guest does not see which file system the host has below it")
        .case(Security, "type of the kubelet's files", "awk '$5 ~ \"^/etc/\" { n = 6; while ($(++n) != \"-\"); print $5, $6, $(n + 1) }' /proc/self/mountinfo")
        .differs("these files come over virtio-fs, mounted without device nodes")
        .case(Security, "devices", "cd /dev; ls -lan . | awk 'NR > 1 { print $1, $3, $4, $(NF-2), $(NF-1), $NF }' | grep -vE ' (\\.|\\.\\.)$| core '| sed -E 's/(Nov|Dec|Jan|[0-9]+:[0-9]+)//g'")
        .case(Security, "device numbers", "stat -c '%n %F %t:%T %a %u:%g' /dev/* | grep -v /dev/core")
        .case(Security, "link to kcore", "readlink /dev/core")
        .differs("the guest kernel has no /proc/kcore, to which the link would lead")
}
