//! What the spec says of a process, as its program finds it: in a container's init and in an exec, which takes all of it from
//! its own request (containerd sends a copy of the container's with another program).

use bulkhead_protocol::agent::PidNamespace;
use bulkhead_protocol::stdio::Stream;
use serde_json::{Value, json};

use crate::fixture::{self, Guest, streams};

/// What init says last; it stays then.
const END: &str = "end\n";

/// What a script writes in a container's init, and then in an exec of it.
async fn outputs(
    guest: &Guest,
    id: &str,
    script: &str,
    init: impl FnOnce(&mut Value),
    exec: impl FnOnce(&mut Value),
) -> [String; 2] {
    let stays = format!("{script}; echo end; sleep 1000");
    let spec = fixture::spec(guest, id, &["sh", "-c", &stays], init);
    guest.create_with(id, spec, streams("oe"), PidNamespace::PID_NAMESPACE_OWN, "").await.unwrap();
    guest.start_container(id).await.unwrap();
    let first = fixture::read_until(&mut guest.attach(id, "", Stream::Stdout).await, END).await;
    let mut process = fixture::process(&["sh", "-c", script]);
    exec(&mut process);
    guest.exec_with(id, "e", &process, streams("oe")).await.unwrap();
    assert_eq!(guest.wait(id, "e").await.unwrap().code, 0);
    let second = guest.read(id, "e", Stream::Stdout).await;
    guest.signal(id, "", 9, true).await.unwrap();
    guest.wait(id, "").await.unwrap();
    guest.delete(id).await.unwrap();
    [first.trim_end_matches(END).to_owned(), second]
}

/// A line of /proc/self/limits (proc_pid_limits(5)): the soft limit and the hard one.
fn limit<'a>(limits: &'a str, name: &str) -> Vec<&'a str> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {limits}"));
    line.split_whitespace().take(2).collect()
}

#[tokio::test]
async fn resource_limits_are_those_of_the_process() {
    let guest = Guest::start().await;
    let own = guest.run("grep 'Max open files' /proc/1/limits");
    let own = limit(&own, "Max open files");
    let script = "ulimit -Sn; ulimit -Hn; cat /proc/self/limits";
    let [init, exec] = outputs(
        &guest,
        "c",
        script,
        |spec| {
            spec["process"]["rlimits"] = json!([
                {"type": "RLIMIT_NOFILE", "soft": 1000, "hard": 2000},
                {"type": "RLIMIT_CORE", "soft": 0, "hard": 4096}
            ]);
        },
        |process| {
            process["rlimits"] = json!([
                {"type": "RLIMIT_NOFILE", "soft": 300, "hard": 3000},
                {"type": "RLIMIT_CORE", "soft": 512, "hard": u64::MAX}
            ]);
        },
    )
    .await;
    assert!(init.starts_with("1000\n2000\n"), "{init}");
    assert_eq!(limit(&init, "Max open files"), ["1000", "2000"]);
    assert_eq!(limit(&init, "Max core file size"), ["0", "4096"]);
    // More than init has: an exec's limits do not come from there.
    assert!(exec.starts_with("300\n3000\n"), "{exec}");
    assert_eq!(limit(&exec, "Max open files"), ["300", "3000"]);
    assert_eq!(limit(&exec, "Max core file size"), ["512", "unlimited"]);

    let [init, exec] = outputs(&guest, "none", "cat /proc/self/limits", |_| {}, |_| {}).await;
    assert_eq!((limit(&init, "Max open files"), limit(&exec, "Max open files")), (own.clone(), own));
}
