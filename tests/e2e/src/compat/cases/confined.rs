//! Containers with a security context of their own.

use bulkhead_cli::cri::v1;

use super::plain::STATUS;
use crate::compat::Area::Security;
use crate::compat::{Probe, security};

/// One container for each context.
pub fn probes() -> Vec<Probe> {
    vec![
        user_by_id(),
        user_by_name(),
        unknown_user(),
        capabilities(),
        capabilities_by_exec(),
        no_capabilities(),
        all_capabilities(),
        read_only_root(),
        unmasked(),
        unconfined(),
        runtime_default(),
        runtime_default_by_exec(),
        localhost_profile(),
        profile_of_the_programs_calls(),
        passwd_volume(Probe::new("passwd-volume"), "home of a volume's passwd file"),
        passwd_volume(Probe::by_exec("passwd-volume-by-exec"), "home of a volume's passwd file in an exec"),
        limits(),
        environment(),
    ]
}

fn id(value: i64) -> Option<v1::Int64Value> {
    Some(v1::Int64Value { value })
}

fn user_by_id() -> Probe {
    Probe::new("user-by-id")
        .security(|security| {
            security.run_as_user = id(1000);
            security.supplemental_groups = vec![4321, 5432];
        })
        .case(Security, "user by id", STATUS)
        .case(Security, "environment of a user", "env | sort; id; touch /x; touch /tmp/x && stat -c '%u %g %a' /tmp/x")
        .case(
            Security,
            "standard streams of a user",
            "echo again > /dev/stdout; echo more > /proc/self/fd/1; stat -Lc '%u %a' /dev/stdout",
        )
        .case(Security, "system calls of a user", "probe calls")
        .case(
            Security,
            "ping by a user",
            "ping -c 1 -W 10 127.0.0.1 | tail -2 | head -1; ping -c 1 -W 10 ::1 | tail -2 | head -1",
        )
        .case(Security, "low port by a user", "nc -l -p 80 -e true & sleep 1; nc 127.0.0.1 80 && echo connected")
}

fn user_by_name() -> Probe {
    Probe::by_exec("user-by-name")
        .security(|security| {
            security.run_as_username = "app".into();
            security.run_as_group = id(3000);
            security.no_new_privs = true;
        })
        .case(Security, "exec as a user by name, with a group and no_new_privs", STATUS)
        .case(Security, "groups of a user by name", "id; cat /proc/1/status | grep -E '^(Uid|Gid|Groups|NoNew)'")
}

fn unknown_user() -> Probe {
    Probe::new("unknown-user").security(|security| security.run_as_user = id(4_000_000)).case(
        Security,
        "user whom the image does not know",
        "id; env | sort; cd; pwd",
    )
}

fn with(
    add: &'static [&'static str],
    drop: &'static [&'static str],
) -> impl Fn(&mut v1::LinuxContainerSecurityContext) {
    let words = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect();
    move |security| {
        security.capabilities =
            Some(v1::Capability { add_capabilities: words(add), drop_capabilities: words(drop), ..Default::default() });
    }
}

fn capabilities() -> Probe {
    Probe::new("capabilities")
        .security(with(&["NET_ADMIN", "SYS_TIME", "SYS_PTRACE"], &["CHOWN", "NET_RAW"]))
        .case(Security, "capabilities added and dropped", STATUS)
        .case(Security, "what the capabilities allow", "chown 1 /tmp; ping -c 1 -W 10 127.0.0.1 | tail -2 | head -1; ip link add dummy9 type bridge && ip link del dummy9 && echo bridge; probe calls | grep -E 'clock|raw|trace|kcmp|packet'")
}

fn capabilities_by_exec() -> Probe {
    Probe::by_exec("capabilities-by-exec")
        .security(with(&["SYS_ADMIN"], &["ALL"]))
        .case(Security, "capabilities of an exec", STATUS)
        .case(Security, "mount with SYS_ADMIN", "mkdir -p /mnt; mount -t tmpfs x /mnt && df /mnt | tail -1 | awk '{ print $1, $NF }'; umount /mnt && echo gone; hostname $(hostname) && echo named")
}

fn no_capabilities() -> Probe {
    Probe::new("no-capabilities").security(with(&[], &["ALL"])).case(Security, "no capabilities", STATUS).case(
        Security,
        "system calls without capabilities",
        "probe calls",
    )
}

fn all_capabilities() -> Probe {
    Probe::new("all-capabilities").security(with(&["ALL"], &[])).case(Security, "all capabilities", STATUS)
}

fn read_only_root() -> Probe {
    Probe::new("read-only-root")
        .security(|security| security.readonly_rootfs = true)
        .case(Security, "read-only root", "touch /x /tmp/x /etc/x; mkdir /y; touch /dev/shm/x && echo shm; touch /dev/x && echo dev; rm /bin/sh; awk '$5 == \"/\" { print substr($6, 1, 2) }' /proc/self/mountinfo; rm -f /dev/shm/x")
}

fn unmasked() -> Probe {
    Probe::new("unmasked")
        .security(|security| {
            security.masked_paths.clear();
            security.readonly_paths.clear();
        })
        .case(Security, "unmasked proc", "for p in /proc/keys /proc/timer_list /proc/sys /proc/irq; do stat -c '%A %n' $p; [ -n \"$(cat $p 2>/dev/null | head -c 1; ls $p | head -1)\" ] && echo full; done; cat /proc/sys/vm/swappiness > /tmp/x; cat /tmp/x > /proc/sys/vm/swappiness && echo written")
}

fn profile(kind: v1::security_profile::ProfileType, file: &str) -> Option<v1::SecurityProfile> {
    Some(v1::SecurityProfile { profile_type: kind.into(), localhost_ref: file.into() })
}

fn unconfined() -> Probe {
    use v1::security_profile::ProfileType::Unconfined;
    Probe::new("unconfined")
        .security(|security| security.seccomp = profile(Unconfined, ""))
        .case(Security, "unconfined by seccomp", STATUS)
        .case(Security, "system calls without a filter", "probe calls | grep -vE '^(mknod of|open of that)'")
        .case(Security, "system calls that the guest kernel is built without", "probe options")
        .differs("the guest kernel leaves out what containers may not use under the default filter: what is missing cannot be attacked")
}

fn runtime_default() -> Probe {
    use v1::security_profile::ProfileType::RuntimeDefault;
    Probe::new("runtime-default").security(|security| security.seccomp = profile(RuntimeDefault, "")).case(
        Security,
        "seccomp RuntimeDefault",
        "grep -E '^(Seccomp|NoNewPrivs)' /proc/self/status; probe calls | grep -vE '^(mknod of|open of that)'; probe options | grep -v ^socket",
    )
}

fn runtime_default_by_exec() -> Probe {
    use v1::security_profile::ProfileType::RuntimeDefault;
    Probe::by_exec("runtime-default-by-exec")
        .security(|security| {
            security.seccomp = profile(RuntimeDefault, "");
            security.run_as_user = id(1000);
        })
        .case(Security, "seccomp RuntimeDefault in an exec", "grep -E '^(Seccomp|NoNewPrivs|Cap)' /proc/self/status; probe calls | grep -vE '^(mknod of|open of that)'; probe options | grep -v ^socket")
}

/// A profile of the node: mkdir is refused with an error of its own.
const PROFILE: &str = r#"{
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
        {"names": ["symlink", "symlinkat"], "action": "SCMP_ACT_KILL_PROCESS"},
        {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
         "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"}]}
    ]
}"#;

fn localhost_profile() -> Probe {
    use v1::security_profile::ProfileType::Localhost;
    Probe::new("localhost-profile")
        .config(|config, place| {
            let file = place.path("profile.json");
            // A failure shows in the container's creation.
            let _ = std::fs::write(&file, PROFILE);
            security(config).seccomp = profile(Localhost, &file.to_string_lossy());
        })
        .case(Security, "seccomp profile of the node", "grep Seccomp /proc/self/status; mkdir /tmp/x; sh -c 'ln -s a /tmp/b'; echo $?; sleep 60 & kill -USR1 $! 2>/dev/null; echo $?; kill -TERM $! && echo killed")
}

/// A profile without calls that a runtime may want on its way to the program, but the program does not make.
const WITHOUT_THE_RUNTIME: &str = r#"{
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{"names": ["faccessat2", "sendmsg", "recvmsg", "accept4"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
}"#;

fn profile_of_the_programs_calls() -> Probe {
    use v1::security_profile::ProfileType::Localhost;
    Probe::new("programs-calls")
        .config(|config, place| {
            let file = place.path("programs-calls.json");
            // A failure shows in the container's creation.
            let _ = std::fs::write(&file, WITHOUT_THE_RUNTIME);
            security(config).seccomp = profile(Localhost, &file.to_string_lossy());
        })
        .case(Security, "seccomp profile without what a runtime calls", "grep Seccomp /proc/self/status")
}

fn passwd_volume(probe: Probe, name: &'static str) -> Probe {
    probe
        .config(|config, place| {
            // A failure shows in the case.
            let _ = std::fs::write(place.path("passwd"), "known:x:1001:1001::/home/of-the-volume:/bin/sh\n");
            config.mounts = vec![place.mount("passwd", "/etc/passwd")];
            security(config).run_as_user = id(1001);
        })
        .case(Security, name, "echo $HOME; id -un")
}

fn limits() -> Probe {
    Probe::new("limits")
        .config(|config, _| {
            config.linux.get_or_insert_default().resources = Some(v1::LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 50_000,
                cpu_shares: 512,
                memory_limit_in_bytes: 64 << 20,
                memory_swap_limit_in_bytes: 64 << 20,
                oom_score_adj: -998,
                ..Default::default()
            });
        })
        .case(Security, "limits as the container sees them", "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight memory.swap.max memory.low memory.high pids.max cpuset.cpus memory.oom.group; cat /proc/self/oom_score_adj")
}

fn environment() -> Probe {
    Probe::new("environment")
        .config(|config, _| {
            let pairs = [("PLAIN", "value"), ("SPACES", "a  b"), ("EMPTY", ""), ("EQUALS", "a=b=c"), ("UNICODE", "gr\u{fc}n \u{2713}"), ("LINES", "a\nb"), ("HOME", "/elsewhere"), ("PATH", "/bin")];
            config.envs = pairs.map(|(key, value)| v1::KeyValue { key: key.into(), value: value.into() }).to_vec();
            config.working_dir = "/made/by/runtime".into();
            config.args = vec!["zero".into(), "one two".into(), String::new(), "*".into()];
        })
        .case(Security, "environment, arguments and working directory", "env | grep -v '^_' | sort; pwd; stat -c '%a %u' /made /made/by/runtime; tr '\\0' '|' < /proc/1/cmdline | tail -c 20")
}
