//! The agent's containers, without a machine: the agent serves on Unix sockets in namespaces of its own on this host.
//!
//! Needs root, cgroup v2 in the kernel and a static busybox (Debian's busybox-static), and fails without them.

mod fixture;

use bulkhead_protocol::agent::PidNamespace;
use bulkhead_protocol::stdio::Stream;
use fixture::{Guest, code_of, message_of, streams};
use ttrpc::Code;

#[tokio::test]
async fn container_runs_its_program_and_tells_how_it_ended() {
    let guest = Guest::start().await;
    guest.create("c1", &["sh", "-c", "echo out; echo err >&2; exit 7"], streams("oe")).await.unwrap();
    guest.start_container("c1").await.unwrap();
    let exit = guest.wait("c1", "").await.unwrap();
    assert_eq!(exit.code, 7);
    assert!(exit.exited_at_ns > 1_600_000_000_000_000_000);
    assert_eq!(guest.read("c1", "", Stream::Stdout).await, "out\n");
    assert_eq!(guest.read("c1", "", Stream::Stderr).await, "err\n");
    guest.delete("c1").await.unwrap();
    assert_eq!(code_of(guest.wait("c1", "").await), Code::NOT_FOUND);
    // The id is free again, and nothing is left of the first one.
    guest.create("c1", &["true"], streams("")).await.unwrap();
}

#[tokio::test]
async fn input_reaches_the_program_and_its_end_too() {
    let guest = Guest::start().await;
    guest.create("c", &["wc", "-c"], streams("io")).await.unwrap();
    guest.start_container("c").await.unwrap();
    guest.write("c", "", &vec![b'x'; 200_000]).await;
    assert_eq!(guest.read("c", "", Stream::Stdout).await, "200000\n");
    assert_eq!(guest.wait("c", "").await.unwrap().code, 0);
}

#[tokio::test]
async fn container_is_alone_and_is_what_its_spec_says() {
    let guest = Guest::start().await;
    let script = "echo $$ $HOME $FOO; id -u; hostname >/dev/null; ls /proc | grep -c '^[0-9]'; echo x > /dev/stdout; pwd";
    guest.create("c", &["sh", "-c", script], streams("o")).await.unwrap();
    guest.start_container("c").await.unwrap();
    guest.wait("c", "").await.unwrap();
    let output = guest.read("c", "", Stream::Stdout).await;
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines, ["1 /home/web bar", "33", "3", "x", "/tmp"], "{output}");
}

#[tokio::test]
async fn exec_joins_a_running_container() {
    let guest = Guest::start().await;
    guest.create("c", &["sleep", "100"], streams("")).await.unwrap();
    assert_eq!(code_of(guest.exec("c", "e0", &["true"], streams("")).await), Code::FAILED_PRECONDITION);
    guest.start_container("c").await.unwrap();
    guest.exec("c", "e1", &["sh", "-c", "cat; tr '\\0' ' ' < /proc/1/cmdline; exit 3"], streams("io")).await.unwrap();
    assert_eq!(code_of(guest.exec("c", "e1", &["true"], streams("")).await), Code::ALREADY_EXISTS);
    guest.write("c", "e1", b"hello ").await;
    assert_eq!(guest.wait("c", "e1").await.unwrap().code, 3);
    assert_eq!(guest.read("c", "e1", Stream::Stdout).await, "hello sleep 100 ");
    guest.delete_process("c", "e1").await.unwrap();
    let error = message_of(guest.exec("c", "e2", &["nonesuch"], streams("")).await);
    assert!(error.contains("exec: \"nonesuch\": executable file not found in $PATH"), "{error}");
    assert_eq!(guest.pids("c").await.len(), 1);
    guest.signal("c", "", 15, false).await.unwrap();
    // sleep is PID 1 of its namespace, which the kernel protects from signals that it does not handle.
    guest.signal("c", "", 9, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().code, 137);
    assert_eq!(code_of(guest.signal("c", "", 9, false).await), Code::NOT_FOUND);
}

#[tokio::test]
async fn exec_is_under_the_seccomp_filter_of_its_container() {
    let guest = Guest::start().await;
    let seccomp = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
    });
    let spec = fixture::spec(&guest, "c", &["sh", "-c", "mkdir /tmp/a; sleep 100"], |spec| {
        spec["linux"]["seccomp"] = seccomp;
    });
    guest.create_with("c", spec, streams("e"), PidNamespace::PID_NAMESPACE_OWN, "").await.unwrap();
    guest.start_container("c").await.unwrap();
    let script = "grep -E 'Seccomp:|CapEff|CapBnd' /proc/self/status; mkdir /tmp/b";
    guest.exec("c", "e", &["sh", "-c", script], streams("oe")).await.unwrap();
    assert_eq!(guest.wait("c", "e").await.unwrap().code, 1);
    let status = guest.read("c", "e", Stream::Stdout).await;
    assert!(status.contains("Seccomp:\t2"), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    assert!(status.contains("CapBnd:\t0000000000000001"), "{status}");
    let error = guest.read("c", "e", Stream::Stderr).await;
    assert!(error.contains("Function not implemented"), "{error}");
}

#[tokio::test]
async fn terminal_has_a_size_that_changes() {
    let guest = Guest::start().await;
    let mut terminal = streams("iot");
    (terminal.width, terminal.height) = (91, 23);
    guest.create("c", &["sh", "-c", "stty size; read x; stty size; tty"], terminal).await.unwrap();
    guest.start_container("c").await.unwrap();
    let mut output = guest.attach("c", "", Stream::Stdout).await;
    assert_eq!(fixture::read_until(&mut output, "\n").await, "23 91\r\n");
    guest.resize("c", "", 100, 50).await.unwrap();
    let _keyboard = guest.type_in("c", "", b"go\n").await;
    let rest = fixture::read_to_end(&mut output).await;
    assert!(rest.contains("50 100") && rest.contains("/dev/"), "{rest}");
    assert_eq!(guest.wait("c", "").await.unwrap().code, 0);
}

#[tokio::test]
async fn exec_with_a_terminal_ends_with_its_shell() {
    let guest = Guest::start().await;
    guest.create("c", &["sleep", "100"], streams("")).await.unwrap();
    guest.start_container("c").await.unwrap();
    guest.exec("c", "e", &["sh"], streams("iot")).await.unwrap();
    let mut output = guest.attach("c", "e", Stream::Stdout).await;
    let _keyboard = guest.type_in("c", "e", b"test -t 0 && echo is-a-$((40+2))-tty; exit 4\n").await;
    let text = fixture::read_to_end(&mut output).await;
    assert!(text.contains("is-a-42-tty"), "{text}");
    assert_eq!(guest.wait("c", "e").await.unwrap().code, 4);
    assert_eq!(code_of(guest.resize("c", "", 1, 1).await), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn pod_shares_a_pid_namespace_and_dead_containers_leave_it() {
    let guest = Guest::start().await;
    let pod = PidNamespace::PID_NAMESPACE_POD;
    let spec = |id: &str, args: &[&str]| fixture::spec(&guest, id, args, |_| {});
    guest.create_with("a", spec("a", &["sh", "-c", "sleep 77 & exec sleep 78"]), streams(""), pod, "").await.unwrap();
    guest.start_container("a").await.unwrap();
    guest.create_with("b", spec("b", &["sleep", "79"]), streams(""), pod, "").await.unwrap();
    guest.start_container("b").await.unwrap();
    guest.exec("b", "e", &["sh", "-c", "cat /proc/*/cmdline | tr '\\0' ' '"], streams("o")).await.unwrap();
    guest.wait("b", "e").await.unwrap();
    let seen = guest.read("b", "e", Stream::Stdout).await;
    assert!(["sleep 78", "sleep 79", "pid-namespace"].iter().all(|line| seen.contains(line)), "{seen}");
    guest.signal("a", "", 9, false).await.unwrap();
    assert_eq!(guest.wait("a", "").await.unwrap().code, 137);
    guest.delete("a").await.unwrap();
    assert_eq!(guest.pids("b").await.len(), 1);

    let target = PidNamespace::PID_NAMESPACE_TARGET;
    guest.create_with("d", spec("d", &["sh", "-c", "ls -d /proc/[0-9]* | wc -l"]), streams("o"), target, "b").await.unwrap();
    guest.start_container("d").await.unwrap();
    guest.wait("d", "").await.unwrap();
    let count: usize = guest.read("d", "", Stream::Stdout).await.trim().parse().unwrap();
    assert!(count >= 4, "{count}");
}

#[tokio::test]
async fn paused_container_stands_still() {
    let guest = Guest::start().await;
    guest.create("c", &["sh", "-c", "while :; do :; done"], streams("")).await.unwrap();
    guest.start_container("c").await.unwrap();
    guest.pause("c").await.unwrap();
    let before = guest.stats("c").await.cpu.usage_usec;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert_eq!(guest.stats("c").await.cpu.usage_usec, before);
    guest.resume("c").await.unwrap();
    guest.signal("c", "", 9, true).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().code, 137);
}

#[tokio::test]
async fn what_cannot_be_created_leaves_nothing() {
    let guest = Guest::start().await;
    let error = message_of(guest.create("c", &["nonesuch"], streams("o")).await);
    assert!(error.contains("\"nonesuch\": executable file not found in $PATH"), "{error}");
    assert_eq!(code_of(guest.start_container("c").await), Code::NOT_FOUND);
    guest.create("c", &["sleep", "100"], streams("")).await.unwrap();
    assert_eq!(code_of(guest.create("c", &["true"], streams("")).await), Code::ALREADY_EXISTS);
    assert_eq!(code_of(guest.delete("c").await), Code::FAILED_PRECONDITION);
    // Killed before it was started.
    guest.signal("c", "", 9, false).await.unwrap();
    assert_eq!(guest.wait("c", "").await.unwrap().code, 137);
    guest.delete("c").await.unwrap();
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn output_waits_for_its_reader_without_being_lost() {
    let guest = Guest::start().await;
    guest.create("c", &["sh", "-c", "yes | head -c 3000000"], streams("o")).await.unwrap();
    guest.start_container("c").await.unwrap();
    assert_eq!(guest.read("c", "", Stream::Stdout).await.len(), 3_000_000);
    assert_eq!(guest.wait("c", "").await.unwrap().code, 0);
    assert!(guest.try_attach("c", "", Stream::Stdout).await.is_none(), "a stream is attached once");
    assert!(guest.try_attach("c", "", Stream::Stderr).await.is_none());
}
