//! What the spec says of a process, as its program finds it: in a container's init and in an exec, which takes all of it from
//! its own request (containerd sends a copy of the container's with another program).

use bulkhead_protocol::agent::PidNamespace;
use bulkhead_protocol::stdio::Stream;
use serde_json::{Value, json};

use crate::fixture::{self, Guest, message_of, streams};

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

/// Bits of CAP_CHOWN, CAP_KILL and CAP_NET_RAW.
const CHOWN: u64 = 1;
const KILL: u64 = 1 << 5;
const RAW: u64 = 1 << 13;

/// A process and what its program must find.
struct Case {
    name: &'static str,
    process: Value,
    /// Of the container that it is the init of.
    seccomp: bool,
    /// Uid, gid, additional groups, umask and OOM score.
    ids: &'static str,
    /// Inheritable, permitted, effective, bounding, ambient.
    capabilities: [u64; 5],
    no_new_privileges: bool,
}

/// Ids, capabilities, no_new_privs, and whether there is a filter.
type Found = (String, [u64; 5], bool, bool);

impl Case {
    fn give(&self, process: &mut Value) {
        for (key, value) in self.process.as_object().unwrap() {
            process[key] = value.clone();
        }
    }

    fn wanted(&self, seccomp: bool) -> Found {
        (self.ids.to_owned(), self.capabilities, self.no_new_privileges, seccomp)
    }
}

fn cases() -> Vec<Case> {
    let all = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW"]);
    let chown = json!(["CAP_CHOWN"]);
    let ids = "33 44 5,7 0027 300";
    let user = json!({"uid": 33, "gid": 44, "additionalGids": [5, 7], "umask": 0o27});
    let ambient =
        json!({"bounding": all, "permitted": chown, "effective": chown, "inheritable": chown, "ambient": chown});
    let with = |capabilities: &Value, no_new_privileges: bool| {
        json!({
            "user": user, "oomScoreAdj": 300, "noNewPrivileges": no_new_privileges, "capabilities": capabilities
        })
    };
    let mut cases = Vec::new();
    for (seccomp, no_new_privileges) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut case = |name, process, ids, capabilities| {
            cases.push(Case { name, process, seccomp, ids, capabilities, no_new_privileges });
        };
        let every = CHOWN | KILL | RAW;
        case("ambient", with(&ambient, no_new_privileges), ids, [CHOWN, CHOWN, CHOWN, every, CHOWN]);
        // What containerd gives a user: his program has none of it (capabilities(7)).
        let plain = json!({"bounding": all, "permitted": all, "effective": all});
        case("user", with(&plain, no_new_privileges), ids, [0, 0, 0, every, 0]);
        let mut root = with(&plain, no_new_privileges);
        root["user"] = json!({"uid": 0, "gid": 0, "additionalGids": [10], "umask": 0o22});
        root["oomScoreAdj"] = 7.into();
        case("root", root.clone(), "0 0 10 0022 7", [0, every, every, every, 0]);
        // All dropped: Go leaves empty sets out.
        root["capabilities"] = json!({});
        case("root with nothing", root, "0 0 10 0022 7", [0; 5]);
    }
    cases
}

/// From /proc/self/status (proc_pid_status(5)).
fn found(output: &str) -> Found {
    let field = |name: &str| {
        let line = output.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let words: Vec<_> = line.unwrap_or_else(|| panic!("{name}: {output}")).split_whitespace().collect();
        words
    };
    // Real, effective, saved and file system ids are the same.
    let id = |name| {
        let ids = field(name);
        assert!(ids.iter().all(|id| *id == ids[0]), "{name}: {ids:?}");
        ids[0].to_owned()
    };
    let ids = [id("Uid"), id("Gid"), field("Groups").join(","), id("Umask"), id("OOM")].join(" ");
    let set = |name| u64::from_str_radix(field(name)[0], 16).unwrap();
    let capabilities = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(set);
    (ids, capabilities, field("NoNewPrivs") == ["1"], field("Seccomp") == ["2"])
}

#[tokio::test]
async fn process_is_who_and_may_what_its_spec_says() {
    let guest = Guest::start().await;
    let script = "cat /proc/self/status; echo \"OOM: $(cat /proc/self/oom_score_adj)\"";
    let cases = cases();
    // The exec is another one than init. Only the filter is its container's.
    for (number, (init, exec)) in cases.iter().zip(cases.iter().cycle().skip(1)).enumerate() {
        let seccomp = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
        });
        let change = |spec: &mut Value| {
            init.give(&mut spec["process"]);
            if init.seccomp {
                spec["linux"]["seccomp"] = seccomp;
            }
        };
        let output = outputs(&guest, &format!("c{number}"), script, change, |process| exec.give(process)).await;
        assert_eq!(found(&output[0]), init.wanted(init.seccomp), "init, {}", init.name);
        assert_eq!(found(&output[1]), exec.wanted(init.seccomp), "exec, {} after {}", exec.name, init.name);
    }
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

/// A container of a Guaranteed pod has a score below the agent's own. In the pod's user namespace no process may lower its
/// score or raise its hard limits, whatever it may do there.
#[tokio::test]
#[ignore = "needs CAP_SYS_RESOURCE"]
async fn user_namespace_withholds_neither_scores_nor_limits() {
    let guest = Guest::start().await;
    guest.create_sandbox(&fixture::with_user_namespace()).await.unwrap();
    let own = guest.run("grep 'Max msgqueue size' /proc/1/limits");
    assert_eq!(limit(&own, "Max msgqueue size"), ["819200", "819200"]);
    let give = |process: &mut Value, score: i32, bytes: u32| {
        process["oomScoreAdj"] = score.into();
        process["rlimits"] = json!([
            {"type": "RLIMIT_MSGQUEUE", "soft": 1000, "hard": bytes}, {"type": "RLIMIT_NOFILE", "soft": 30, "hard": 40}
        ]);
    };
    let [init, exec] = outputs(
        &guest,
        "c",
        "cat /proc/self/oom_score_adj; cat /proc/self/limits",
        |spec| {
            spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "cgroup"}, {"type": "user"}]);
            give(&mut spec["process"], -997, 900_000);
        },
        |process| give(process, -998, 1_000_000),
    )
    .await;
    assert!(init.starts_with("-997\n") && exec.starts_with("-998\n"), "{init}{exec}");
    assert_eq!(limit(&init, "Max msgqueue size"), ["1000", "900000"]);
    assert_eq!(limit(&exec, "Max msgqueue size"), ["1000", "1000000"]);
    assert_eq!((limit(&init, "Max open files"), limit(&exec, "Max open files")), (vec!["30", "40"], vec!["30", "40"]));
}

#[tokio::test]
#[ignore = "needs CAP_SYS_RESOURCE"]
async fn holder_of_the_pods_namespaces_outlives_its_containers_when_memory_runs_out() {
    for user_namespace in [false, true] {
        let guest = Guest::start().await;
        if user_namespace {
            guest.create_sandbox(&fixture::with_user_namespace()).await.unwrap();
        }
        let spec = fixture::spec(&guest, "c", &["sleep", "1000"], |_| {});
        guest.create_with("c", spec, streams(""), PidNamespace::PID_NAMESPACE_POD, "").await.unwrap();
        let script = "for process in /proc/[0-9]*; do ! grep -qs pid-namespace $process/cmdline || cat $process/oom_score_adj; done";
        assert_eq!(guest.run(script), "-998\n", "{user_namespace}");
    }
}

#[tokio::test]
#[ignore = "takes as long as the agent waits, 45 s"]
async fn exec_that_its_container_holds_up_ends_and_leaves_nothing() {
    let guest = Guest::start().await;
    // One container stops whatever comes into it, the other's control group is frozen, as a container could do itself.
    let script = "while :; do for p in /proc/[0-9]*; do [ $p = /proc/1 ] || kill -STOP ${p#/proc/}; done; done";
    let stopping = fixture::spec(&guest, "stopping", &["sh", "-c", script], |spec| {
        let capabilities = ["CAP_KILL"];
        spec["process"]["user"] = json!({"uid": 0, "gid": 0});
        spec["process"]["capabilities"] =
            json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
    });
    guest.create_with("stopping", stopping, streams(""), PidNamespace::PID_NAMESPACE_OWN, "").await.unwrap();
    guest.create("frozen", &["sleep", "1000"], streams("")).await.unwrap();
    for id in ["stopping", "frozen"] {
        guest.start_container(id).await.unwrap();
    }
    // It has come to its program.
    guest.exec("frozen", "first", &["true"], streams("")).await.unwrap();
    guest.run("echo 1 > /sys/fs/cgroup/pod/frozen/cgroup.freeze");
    let stopped = async {
        // One that is quick enough is stopped in its program.
        for number in 0..20 {
            guest.exec_patiently("stopping", &format!("e{number}"), &["sleep", "1000"]).await?;
        }
        Ok(())
    };
    for outcome in <[_; 2]>::from(tokio::join!(stopped, guest.exec_patiently("frozen", "e", &["true"]))) {
        let error = message_of(outcome);
        assert!(error.contains("does not answer within 45 s"), "{error}");
    }
    // Neither a helper, nor what it has forked.
    guest.run("timeout 10 sh -c 'while grep -qsx agent-helper /proc/[0-9]*/comm; do :; done'");
    guest.run("echo 0 > /sys/fs/cgroup/pod/frozen/cgroup.freeze");
    guest.exec("frozen", "e", &["true"], streams("")).await.unwrap();
    assert_eq!(guest.wait("frozen", "e").await.unwrap().code, 0);
}
