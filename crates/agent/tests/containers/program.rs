//! The last step to a container's program: what it is given, and what is said where it cannot be executed.

use std::os::unix::fs::PermissionsExt;

use bulkhead_protocol::agent::PidNamespace;
use bulkhead_protocol::stdio::Stream;
use serde_json::{Value, json};

use crate::fixture::{self, Guest, message_of, streams};

/// Errors, as programs say them by their exit status here.
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

const OWN: PidNamespace = PidNamespace::PID_NAMESPACE_OWN;

/// Puts a program into a container's image.
fn install(guest: &Guest, id: &str, name: &str, bytes: &[u8]) {
    let rootfs = guest.dir().join(id).join("rootfs");
    fixture::make_rootfs(&rootfs);
    let path = rootfs.join("bin").join(name);
    std::fs::write(&path, bytes).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// A static program of these instructions and nothing else: an ELF header, one program header, the code.
fn elf(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + u64::try_from(code.len()).unwrap();
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    // Entry, program headers, no sections; flags and sizes of the headers.
    image.extend([BASE + HEADERS, 64, 0].map(u64::to_le_bytes).concat());
    image.extend(b"\0\0\0\0\x40\0\x38\0\x01\0\x40\0\0\0\0\0");
    // PT_LOAD, readable and executable.
    image.extend(b"\x01\0\0\0\x05\0\0\0");
    image.extend([0, BASE, BASE, size, size, 0x1000].map(u64::to_le_bytes).concat());
    image.extend(code);
    image
}

/// A program that makes one system call without arguments and exits with the error's number, or 0.
fn caller(number: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(number.to_le_bytes());
    // xor edi, edi; xor esi, esi; xor edx, edx; syscall; mov edi, eax; neg edi
    code.extend(b"\x31\xff\x31\xf6\x31\xd2\x0f\x05\x89\xc7\xf7\xdf");
    // mov eax, 60 (exit); syscall
    code.extend(b"\xb8\x3c\0\0\0\x0f\x05");
    elf(&code)
}

/// A profile that refuses everything but these calls.
fn allow(names: &[&str]) -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}]
    })
}

/// What it takes to drop capabilities under a filter.
const DROP: [&str; 3] = ["prctl", "capget", "capset"];

/// Runs a container to its end; answers its exit status, its output and its errors.
async fn run(guest: &Guest, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> (u32, String, String) {
    let spec = fixture::spec(guest, id, args, change);
    guest.create_with(id, spec, streams("oe"), OWN, "").await.unwrap();
    guest.start_container(id).await.unwrap();
    let code = guest.wait(id, "").await.unwrap().code;
    (code, guest.read(id, "", Stream::Stdout).await, guest.read(id, "", Stream::Stderr).await)
}

#[tokio::test]
async fn program_that_cannot_be_executed_is_named_in_the_log() {
    let guest = Guest::start().await;
    install(&guest, "a", "other-machine", b"\x7fELF");
    let ended = run(&guest, "a", &["/bin/other-machine"], |_| {}).await;
    assert_eq!(ended, (1, String::new(), "exec /bin/other-machine: exec format error\n".into()));
    install(&guest, "b", "script", b"#!/bin/sh\r\necho hello\r\n");
    let ended = run(&guest, "b", &["script"], |_| {}).await;
    assert_eq!(ended, (1, String::new(), "exec /bin/script: no such file or directory\n".into()));

    // Of an exec it is told to whoever wants it.
    install(&guest, "c", "other-machine", b"\x7fELF");
    guest.create("c", &["sleep", "100"], streams("")).await.unwrap();
    guest.start_container("c").await.unwrap();
    let error = message_of(guest.exec("c", "e", &["other-machine"], streams("e")).await);
    assert!(error.contains("exec /bin/other-machine: exec format error"), "{error}");
}

#[tokio::test]
async fn profile_needs_to_allow_only_what_the_program_calls() {
    let guest = Guest::start().await;
    // close(0) is refused with EPERM, the default.
    for (id, no_new_privileges, names) in
        [("a", true, vec!["execve", "exit"]), ("b", false, [&["execve", "exit"], DROP.as_slice()].concat())]
    {
        install(&guest, id, "caller", &caller(3));
        let (code, _, error) = run(&guest, id, &["caller"], |spec| {
            spec["process"]["noNewPrivileges"] = no_new_privileges.into();
            spec["linux"]["seccomp"] = allow(&names);
        })
        .await;
        assert_eq!((code, error.as_str()), (EPERM, ""), "{id}");
    }
}

#[tokio::test]
async fn calls_that_the_profile_does_not_know_of_do_not_exist() {
    let guest = Guest::start().await;
    // fchmodat2, which C libraries do without on ENOSYS only; the number is above all that the profile names.
    for (id, default, number, expected) in [
        ("a", "SCMP_ACT_ERRNO", 452, ENOSYS),
        ("b", "SCMP_ACT_ERRNO", 3, EPERM),
        ("c", "SCMP_ACT_KILL_PROCESS", 452, ENOSYS),
        ("d", "SCMP_ACT_KILL_PROCESS", 3, 128 + 31),
    ] {
        install(&guest, id, "caller", &caller(number));
        let mut profile = allow(&[&["execve", "exit"], DROP.as_slice()].concat());
        profile["defaultAction"] = default.into();
        let ended = run(&guest, id, &["caller"], |spec| spec["linux"]["seccomp"] = profile).await;
        assert_eq!(ended, (expected, String::new(), String::new()), "{id}");
    }
}

#[tokio::test]
async fn init_and_hooks_are_under_the_filter_with_the_capabilities_of_the_spec() {
    let guest = Guest::start().await;
    let status = "grep -E '^(Seccomp|CapEff|CapBnd|CapPrm|NoNewPrivs)' /proc/self/status";
    let (code, output, error) = run(&guest, "c", &["sh", "-c", &format!("cat /tmp/hook; {status}")], |spec| {
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", format!("{status} >/tmp/hook")]});
        spec["hooks"] = json!({"startContainer": [hook]});
        spec["process"]["user"] = json!({"uid": 0, "gid": 0});
        let one = ["CAP_CHOWN"];
        spec["process"]["capabilities"] = json!({"bounding": one, "effective": one, "permitted": one});
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]
        });
    })
    .await;
    assert_eq!((code, error.as_str()), (0, ""));
    let one = "CapPrm:\t0000000000000001\nCapEff:\t0000000000000001\nCapBnd:\t0000000000000001\n\
               NoNewPrivs:\t0\nSeccomp:\t2\nSeccomp_filters:\t1\n";
    assert_eq!(output, format!("{one}{one}"));
}

#[tokio::test]
async fn failure_of_a_hook_is_told_in_the_log() {
    let guest = Guest::start().await;
    let (code, output, error) = run(&guest, "c", &["echo", "never"], |spec| {
        spec["hooks"] = json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "exit 3"]}]});
    })
    .await;
    assert_eq!((code, output.as_str()), (1, ""));
    assert_eq!(error, "startContainer hook: hook command exited with non-zero exit code: 3\n");
}

#[tokio::test]
async fn what_the_spec_does_not_grant_is_not_granted() {
    let guest = Guest::start().await;
    let sets = "grep ^Cap /proc/self/status";
    let script = format!("{sets}; head -c 4 /dev/zero | wc -c; : < /dev/other");
    let (code, output, error) = run(&guest, "a", &["sh", "-c", &script], |spec| {
        spec["process"]["user"] = json!({"uid": 0, "gid": 0});
        spec["process"].as_object_mut().unwrap().remove("capabilities");
        spec["linux"]["devices"] = json!([{"path": "/dev/other", "type": "c", "major": 10, "minor": 229}]);
    })
    .await;
    let set = |name: &str, bits: u64| format!("Cap{name}:\t{bits:016x}\n");
    let none: String = ["Inh", "Prm", "Eff", "Bnd", "Amb"].map(|name| set(name, 0)).concat();
    assert_eq!((code, output), (1, format!("{none}4\n")));
    assert!(error.contains("/dev/other: Operation not permitted"), "{error}");

    // An exec that says nothing has what its container has.
    guest.create("b", &["sleep", "100"], streams("")).await.unwrap();
    guest.start_container("b").await.unwrap();
    let mut process = fixture::process(&["sh", "-c", sets]);
    process["user"] = json!({"uid": 0, "gid": 0});
    process.as_object_mut().unwrap().remove("capabilities");
    guest.exec_with("b", "e", &process, streams("o")).await.unwrap();
    assert_eq!(guest.wait("b", "e").await.unwrap().code, 0);
    let bounded = [set("Inh", 0), set("Prm", 1), set("Eff", 1), set("Bnd", 1), set("Amb", 0)].concat();
    assert_eq!(guest.read("b", "e", Stream::Stdout).await, bounded);
}

#[tokio::test]
async fn home_is_that_of_the_containers_own_passwd_file() {
    let guest = Guest::start().await;
    let volume = guest.dir().join("passwd");
    std::fs::write(&volume, "web:x:33:33::/volume/web:/bin/sh\n").unwrap();
    let spec = fixture::spec(&guest, "c", &["sh", "-c", "cat /tmp/hook; echo $HOME; exec sleep 100"], |spec| {
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", "echo hook $HOME >/tmp/hook"]});
        spec["hooks"] = json!({"startContainer": [hook]});
        let mount = json!({"destination": "/etc/passwd", "type": "bind", "source": volume, "options": ["bind", "ro"]});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    });
    guest.create_with("c", spec, streams("o"), OWN, "").await.unwrap();
    guest.start_container("c").await.unwrap();
    let mut output = guest.attach("c", "", Stream::Stdout).await;
    assert_eq!(fixture::read_until(&mut output, "web\n").await, "hook /volume/web\n");
    assert_eq!(fixture::read_until(&mut output, "web\n").await, "/volume/web\n");
    for (exec, env, home) in [
        ("a", json!(["PATH=/bin"]), "/volume/web\n"),
        ("b", json!(["HOME=", "PATH=/bin"]), "/volume/web\n"),
        ("c", json!(["HOME=/own", "PATH=/bin"]), "/own\n"),
    ] {
        let mut process = fixture::process(&["sh", "-c", "echo $HOME"]);
        process["env"] = env;
        guest.exec_with("c", exec, &process, streams("o")).await.unwrap();
        assert_eq!(guest.read("c", exec, Stream::Stdout).await, home);
    }
}

#[tokio::test]
async fn passwd_file_that_is_none_holds_nothing_up() {
    let guest = Guest::start().await;
    for (id, make) in [("fifo", "mkfifo passwd"), ("link", "ln -s /proc/1/root/etc/group passwd")] {
        let rootfs = guest.dir().join(id).join("rootfs");
        fixture::make_rootfs(&rootfs);
        std::fs::write(rootfs.join("etc/group"), "web:x:33:33::/elsewhere:/bin/sh\n").unwrap();
        let script = format!("cd {}/etc && rm passwd && {make}", rootfs.display());
        assert!(std::process::Command::new("sh").args(["-c", &script]).status().unwrap().success());
        let (code, output, _) = run(&guest, id, &["sh", "-c", "echo $HOME"], |_| {}).await;
        assert_eq!((code, output.as_str()), (0, "/\n"), "{id}");
    }
}

#[tokio::test]
async fn streams_that_nobody_wants_can_be_written_to() {
    let guest = Guest::start().await;
    let script = "echo lost && echo lost >&2 && [ $(readlink /proc/self/fd/0) = /dev/null ] && ! read x && exit 5";
    guest.create("c", &["sh", "-c", script], streams("")).await.unwrap();
    guest.start_container("c").await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().code, 5);
}
