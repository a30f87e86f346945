//! What has been an escape elsewhere (docs/negative-tests.md, 22 and 25: the runc class of faults). A container reaches
//! nothing of the guest outside of it, whether the host's request, the image or the program in it is what tries.

use std::os::unix::fs::symlink;
use std::path::Path;

use bulkhead_protocol::agent::{CreateSandboxRequest, PidNamespace};
use bulkhead_protocol::stdio::Stream;
use serde::Serialize;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::fixture::{self, Guest, code_of, message_of, streams};

const OWN: PidNamespace = PidNamespace::PID_NAMESPACE_OWN;

/// What no container may read or change.
const SECRET: &str = "the-guest's-own";

/// What runc gives a container by default.
const DEFAULT: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A secret of the guest's; answers its path.
fn plant(guest: &Guest) -> String {
    let path = guest.dir().join("secret");
    std::fs::write(&path, SECRET).unwrap();
    path.display().to_string()
}

/// Root, with what a container has by default.
fn as_root(process: &mut Value) {
    process["user"] = json!({"uid": 0, "gid": 0});
    process["cwd"] = "/".into();
    process["capabilities"] = json!({"bounding": DEFAULT, "effective": DEFAULT, "permitted": DEFAULT});
}

/// Runs a container to its end, if it can be created; answers what it wrote, or why there is none.
async fn run(guest: &Guest, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> Result<String, String> {
    let spec = fixture::spec(guest, id, args, |spec| {
        as_root(&mut spec["process"]);
        change(spec);
    });
    if let Err(error) = guest.create_with(id, spec, streams("oe"), OWN, "").await {
        return Err(error.to_string());
    }
    if let Err(error) = guest.start_container(id).await {
        let _ = guest.signal(id, "", 9, true).await;
        return Err(error.to_string());
    }
    guest.wait(id, "").await.unwrap();
    let output = guest.read(id, "", Stream::Stdout).await + &guest.read(id, "", Stream::Stderr).await;
    guest.delete(id).await.unwrap();
    Ok(output)
}

/// What has become of attacks. One that is always refused may have lacked something else, and one that finds nothing proves
/// nothing: tests say how many there must be of each.
#[derive(Debug, Default, Eq, PartialEq)]
struct Outcomes {
    made: usize,
    refused: usize,
}

impl Outcomes {
    /// Counts an attack; answers what the container wrote, if there was one.
    fn count(&mut self, what: &str, outcome: Result<String, String>) -> Option<String> {
        println!("{what}: {outcome:?}");
        match outcome {
            Ok(output) => {
                assert!(!output.contains(SECRET), "{what}: {output}");
                self.made += 1;
                Some(output)
            }
            Err(error) => {
                // By what makes containers, which had everything that it needs.
                assert!(error.contains("failed to create container: exec process failed"), "{what}: {error}");
                self.refused += 1;
                None
            }
        }
    }
}

/// Requires that a script shows the secret where the container has it.
async fn assert_shows(guest: &Guest, secret: &str, script: &str) {
    let output = run(guest, "control", &["sh", "-c", script], |spec| push_bind(spec, secret, secret)).await.unwrap();
    assert!(output.contains(SECRET), "{script}: {output}");
}

fn push_bind(spec: &mut Value, source: impl Serialize, destination: &str) {
    let mount = json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro"]});
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

/// The mounts of the agent's namespace, which are the guest's.
fn mounts(guest: &Guest) -> String {
    guest.run("cut -d' ' -f5 /proc/1/mountinfo")
}

#[tokio::test]
async fn hostile_22_exec_after_the_end_and_ids_in_use_are_refused() {
    let guest = Guest::start().await;
    guest.create("c", &["sleep", "100"], streams("")).await.unwrap();
    guest.start_container("c").await.unwrap();
    guest.exec("c", "e", &["sleep", "100"], streams("")).await.unwrap();
    assert_eq!(code_of(guest.exec("c", "e", &["true"], streams("")).await), Code::ALREADY_EXISTS);
    assert_eq!(code_of(guest.create("c", &["true"], streams("")).await), Code::ALREADY_EXISTS);
    assert_eq!(code_of(guest.start_container("c").await), Code::FAILED_PRECONDITION);
    assert_eq!(code_of(guest.delete_process("c", "e").await), Code::FAILED_PRECONDITION);
    guest.signal("c", "", 9, true).await.unwrap();
    assert_eq!((guest.wait("c", "e").await.unwrap().code, guest.wait("c", "").await.unwrap().code), (137, 137));
    // Its pids are free for others, so nothing may be done to them.
    assert_eq!(code_of(guest.exec("c", "late", &["true"], streams("")).await), Code::FAILED_PRECONDITION);
    assert_eq!(code_of(guest.signal("c", "", 9, false).await), Code::NOT_FOUND);
    assert_eq!(code_of(guest.signal("c", "e", 9, false).await), Code::NOT_FOUND);
    assert_eq!(code_of(guest.start_container("c").await), Code::FAILED_PRECONDITION);
    guest.delete_process("c", "e").await.unwrap();
    assert_eq!(code_of(guest.delete_process("c", "e").await), Code::NOT_FOUND);
    guest.delete("c").await.unwrap();
    for outcome in [guest.delete("c").await, guest.start_container("c").await, guest.pause("c").await] {
        assert_eq!(code_of(outcome), Code::NOT_FOUND);
    }
    assert_eq!(code_of(guest.exec("c", "e", &["true"], streams("")).await), Code::NOT_FOUND);
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn hostile_22_ids_that_are_paths_name_nothing() {
    let guest = Guest::start().await;
    guest.create("good", &["sleep", "100"], streams("")).await.unwrap();
    guest.start_container("good").await.unwrap();
    let long = "x".repeat(200);
    for id in ["", ".", "..", "../c", "a/b", "/etc", "a\0b", ".hidden", "a b", "a\nb", "\u{202e}", &long] {
        let spec = fixture::spec(&guest, "rootfs", &["true"], |_| {});
        let created = guest.create_with(id, spec, streams(""), OWN, "").await;
        assert_eq!(code_of(created), Code::INVALID_ARGUMENT, "container {id:?}");
        if !id.is_empty() {
            let executed = guest.exec("good", id, &["true"], streams("")).await;
            assert_eq!(code_of(executed), Code::INVALID_ARGUMENT, "exec {id:?}");
        }
        for outcome in [guest.delete(id).await, guest.start_container(id).await, guest.signal(id, "", 9, true).await] {
            assert_eq!(code_of(outcome), Code::NOT_FOUND, "container {id:?}");
        }
        assert_eq!(code_of(guest.wait(id, "").await), Code::NOT_FOUND, "container {id:?}");
        if long != id {
            assert!(guest.try_attach(id, "", Stream::Stdout).await.is_none());
        }
    }
    guest.signal("good", "", 9, true).await.unwrap();
    guest.wait("good", "").await.unwrap();
    guest.delete("good").await.unwrap();
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn hostile_25_mounts_over_links_of_the_image_stay_in_the_container() {
    let guest = Guest::start().await;
    let secret = plant(&guest);
    let volume = guest.dir().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("file"), "the volume's").unwrap();
    let before = mounts(&guest);
    // Where the image's link leads, and where the volume is to go.
    let dir = guest.dir().display().to_string();
    let links = [
        ("etc/resolv.conf", secret.clone(), "/etc/resolv.conf"),
        ("etc/resolv.conf", format!("/proc/1/root{secret}"), "/etc/resolv.conf"),
        ("etc/resolv.conf", format!("../../../../../..{secret}"), "/etc/resolv.conf"),
        ("data", "/".to_owned(), "/data/secret"),
        ("data", "../../../../../../..".to_owned(), "/data/secret"),
        ("data", dir.clone(), "/data/secret"),
        ("data", "/proc/self/root".to_owned(), "/data/secret"),
        ("data", "/proc/1/cwd".to_owned(), "/data/secret"),
    ];
    assert_shows(&guest, &secret, &format!("cat {secret}")).await;
    let mut outcomes = Outcomes::default();
    for (number, (link, to, destination)) in links.iter().enumerate() {
        for (kind, source) in [("file", volume.join("file")), ("directory", volume.clone())] {
            let id = format!("c{number}-{kind}");
            let rootfs = guest.dir().join(&id).join("rootfs");
            fixture::make_rootfs(&rootfs);
            symlink(to, rootfs.join(link)).unwrap();
            let what = format!("{link} -> {to}, {kind} at {destination}");
            let script = format!(
                "cat {secret}; for file in {destination} {destination}/file; do echo changed > $file; cat $file; done; true"
            );
            let outcome = run(&guest, &id, &["sh", "-c", &script], |spec| push_bind(spec, source, destination)).await;
            if let Some(output) = outcomes.count(&what, outcome) {
                assert!(output.contains("the volume's"), "{what}: {output}");
            }
            assert_eq!(std::fs::read_to_string(&secret).unwrap(), SECRET, "{what}");
            assert_eq!(mounts(&guest), before, "{what}: a mount of the guest's");
        }
    }
    // Nothing is mounted through proc's links.
    assert_eq!(outcomes, Outcomes { made: 10, refused: 6 });
    assert_eq!(std::fs::read_to_string(volume.join("file")).unwrap(), "the volume's");
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn hostile_25_mounts_with_dots_stay_in_the_container() {
    let guest = Guest::start().await;
    let secret = plant(&guest);
    let before = mounts(&guest);
    let script = format!("cat {secret}; test -d {secret} && echo mounted; true");
    assert_shows(&guest, &secret, &script).await;
    let mut outcomes = Outcomes::default();
    for (number, destination) in [
        "../../../../../../..",
        "/../../../../../../../..",
        "/tmp/../../../../..",
        "/proc/self/root/tmp",
        "/proc/1/root",
    ]
    .into_iter()
    .enumerate()
    {
        let destination = format!("{destination}{secret}");
        let outcome = run(&guest, &format!("c{number}"), &["sh", "-c", &script], |spec| {
            let mount = json!({"destination": destination, "type": "tmpfs", "source": "tmpfs"});
            spec["mounts"].as_array_mut().unwrap().push(mount);
        })
        .await;
        if let Some(output) = outcomes.count(&destination, outcome) {
            assert!(output.ends_with("mounted\n") || output.starts_with("mounted\n"), "{destination}: {output}");
        }
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), SECRET, "{destination}");
        assert_eq!(mounts(&guest), before, "{destination}");
    }
    assert_eq!(outcomes, Outcomes { made: 3, refused: 2 });
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

/// CVE-2024-21626: a descriptor of the runtime's as the working directory.
#[tokio::test]
async fn hostile_25_working_directory_is_in_the_container_or_nowhere() {
    let guest = Guest::start().await;
    let secret = plant(&guest);
    guest.create("running", &["sleep", "1000"], streams("")).await.unwrap();
    guest.start_container("running").await.unwrap();
    let script =
        format!("cat ../../../../../../../../..{secret}; cat ..{secret}; cat .{secret}; readlink /proc/self/cwd; true");
    let args = ["sh", "-c", &script];
    let places = (0..24).map(|fd| format!("/proc/self/fd/{fd}"));
    let others =
        ["/proc/self/cwd", "/proc/self/root", "/proc/1/cwd", "/proc/1/root", "/proc/self/fd/3/../..", "..", "."];
    assert_shows(&guest, &secret, &script).await;
    let (mut inits, mut execs) = (Outcomes::default(), Outcomes::default());
    let everywhere = ["/", "/tmp"].into_iter().map(str::to_owned).chain(places).chain(others.map(str::to_owned));
    for (number, cwd) in everywhere.enumerate() {
        let outcome =
            run(&guest, &format!("c{number}"), &args, |spec| spec["process"]["cwd"] = cwd.clone().into()).await;
        let exec = exec_in(&guest, &format!("e{number}"), &args, &cwd).await;
        for (outcomes, outcome) in [(&mut inits, outcome), (&mut execs, exec)] {
            if let Some(output) = outcomes.count(&cwd, outcome) {
                // Inside its root: never one that the kernel calls unreachable.
                let place = output.lines().find(|line| line.starts_with(['/', '('])).unwrap_or_default();
                assert!(place == "/" || place == "/tmp", "{cwd}: {output}");
            }
        }
    }
    // An exec finds proc's links mounted, which lead into the container; no descriptor is a directory.
    assert_eq!(inits, Outcomes { made: 4, refused: 29 });
    assert_eq!(execs, Outcomes { made: 8, refused: 25 });
    guest.signal("running", "", 9, true).await.unwrap();
    guest.wait("running", "").await.unwrap();
    guest.delete("running").await.unwrap();
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

/// Runs an exec of root's to its end in the container `running`; answers what it wrote, or why there is none.
async fn exec_in(guest: &Guest, exec: &str, args: &[&str], cwd: &str) -> Result<String, String> {
    let mut process = fixture::process(args);
    as_root(&mut process);
    process["cwd"] = cwd.into();
    guest.exec_with("running", exec, &process, streams("oe")).await.map_err(|error| error.to_string())?;
    guest.wait("running", exec).await.unwrap();
    Ok(guest.read("running", exec, Stream::Stdout).await + &guest.read("running", exec, Stream::Stderr).await)
}

/// CVE-2019-5736: the runtime's own program, reached through a process of its own.
#[tokio::test]
async fn hostile_25_agents_program_is_not_changed_through_proc() {
    let guest = Guest::start().await;
    let agent = Path::new(env!("CARGO_BIN_EXE_bulkhead-agent"));
    let before = std::fs::read(agent).unwrap();
    let pod = PidNamespace::PID_NAMESPACE_POD;
    // The holder of the pod's pid namespace is the agent's own program, and is seen by every container that shares it.
    let script = "try() { (echo x >> $1) && echo appended to $1; (: > $1) && echo emptied $1; echo tried; }; \
                  for exe in /proc/[0-9]*/exe /proc/self/exe /tmp/control; do try $exe; done; echo done; sleep 1000";
    let spec = fixture::spec(&guest, "c", &["sh", "-c", script], |spec| as_root(&mut spec["process"]));
    guest.create_with("c", spec, streams("oe"), pod, "").await.unwrap();
    guest.start_container("c").await.unwrap();
    // The shell's own is the container's busybox, which is in use.
    let output = fixture::read_until(&mut guest.attach("c", "", Stream::Stdout).await, "done\n").await;
    assert!(output.matches("tried").count() >= 4, "{output}");
    let (appended, emptied) = (output.matches("appended").count(), output.matches("emptied").count());
    assert_eq!((appended, emptied), (1, 1), "a file of its own, and no program: {output}");
    // Its entry point is whatever makes it: the agent's helper, before it executes the program.
    for (number, program) in ["/proc/self/exe", "/proc/1/exe", "/proc/thread-self/exe"].into_iter().enumerate() {
        let outcome = run(&guest, &format!("exe{number}"), &[program, "helper"], |_| {}).await;
        println!("{program}: {outcome:?}");
        let mut process = fixture::process(&[program, "helper"]);
        as_root(&mut process);
        let exec = format!("e{number}");
        if guest.exec_with("c", &exec, &process, streams("oe")).await.is_ok() {
            let _ = guest.signal("c", &exec, 9, false).await;
            guest.wait("c", &exec).await.unwrap();
        }
    }
    guest.signal("c", "", 9, true).await.unwrap();
    guest.wait("c", "").await.unwrap();
    assert_eq!(std::fs::read(agent).unwrap(), before, "the agent's program was changed");
    guest.delete("c").await.unwrap();
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

/// CVE-2025-31133 and CVE-2025-52565: what is bound over a masked path, and the console, come from the image.
#[tokio::test]
async fn hostile_25_devices_of_the_image_are_neither_mask_nor_console() {
    let guest = Guest::start().await;
    let secret = plant(&guest);
    let before = mounts(&guest);
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    // The masked path is one that every kernel has.
    let script = "cat /proc/meminfo | head -c 100 | wc -c; cat /proc/meminfo; echo x > /proc/meminfo; \
                  echo x > /proc/sys/kernel/core_pattern; echo x > /dev/console; true";
    let with_masked = |spec: &mut Value, paths: &[&str]| {
        spec["linux"]["maskedPaths"] = json!(paths);
        // The image's /dev, not one that is made for the container.
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    };
    let seen = run(&guest, "control", &["sh", "-c", script], |spec| with_masked(spec, &[])).await.unwrap();
    assert!(seen.starts_with("100\n"), "{seen}");
    let mut outcomes = Outcomes::default();
    for (number, to) in
        ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/meminfo", &secret, "/etc/passwd", "a file"]
            .into_iter()
            .enumerate()
    {
        for (kind, device) in [("null", "dev/null"), ("console", "dev/console"), ("ptmx", "dev/ptmx")] {
            let id = format!("c{number}-{kind}");
            let rootfs = guest.dir().join(&id).join("rootfs");
            fixture::make_rootfs(&rootfs);
            match to {
                "a file" => std::fs::write(rootfs.join(device), "").unwrap(),
                _ => symlink(to, rootfs.join(device)).unwrap(),
            }
            let outcome = run(&guest, &id, &["sh", "-c", script], |spec| with_masked(spec, &["/proc/meminfo"])).await;
            if let Some(output) = outcomes.count(&format!("{device} -> {to}"), outcome) {
                // Masked by something that holds nothing.
                assert!(output.starts_with("0\n"), "{device} -> {to}: {output}");
            }
            assert_eq!(std::fs::read_to_string(&secret).unwrap(), SECRET);
            assert_eq!(std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), pattern);
            assert_eq!(mounts(&guest), before, "{device} -> {to}");
        }
    }
    // A null device that is none is refused; one of them leads nowhere in the container, and the device is made there.
    assert_eq!(outcomes, Outcomes { made: 13, refused: 5 });
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

/// CVE-2025-52881: writes that the runtime means for /proc, sent elsewhere by links of the image.
#[tokio::test]
async fn hostile_25_proc_of_the_image_takes_no_writes_of_the_runtimes() {
    let guest = Guest::start().await;
    let secret = plant(&guest);
    let before = mounts(&guest);
    let script = format!(
        "cat /proc/sys/kernel/ostype /proc/self/oom_score_adj; echo x > /proc/sys/kernel/hostname; cat {secret}; true"
    );
    // What the runtime writes to /proc for. Labels and namespaced parameters, for which others do, are refused: see the next test.
    let with_writes = |spec: &mut Value| spec["process"]["oomScoreAdj"] = 500.into();
    assert_shows(&guest, &secret, &script).await;
    let mut outcomes = Outcomes::default();
    let ordinary = run(&guest, "ordinary", &["sh", "-c", &script], with_writes).await;
    let ordinary = outcomes.count("a directory", ordinary).unwrap();
    assert!(ordinary.starts_with("Linux\n500\n"), "{ordinary}");
    for (number, to) in ["/tmp", "/dev", "/", "../../../../../../..", "/sys"].into_iter().enumerate() {
        let id = format!("c{number}");
        let rootfs = guest.dir().join(&id).join("rootfs");
        fixture::make_rootfs(&rootfs);
        std::fs::remove_dir(rootfs.join("proc")).unwrap();
        symlink(to, rootfs.join("proc")).unwrap();
        let outcome = run(&guest, &id, &["sh", "-c", &script], with_writes).await;
        outcomes.count(&format!("/proc -> {to}"), outcome);
        for dir in ["tmp", "sys"] {
            assert_eq!(std::fs::read_dir(rootfs.join(dir)).unwrap().count(), 0, "/proc -> {to}: written to /{dir}");
        }
        assert_eq!(mounts(&guest), before, "/proc -> {to}");
        assert!(!guest.run("hostname").contains("redirected"), "/proc -> {to}");
    }
    // proc goes to a directory of its own or nowhere, as with runc.
    assert_eq!(outcomes, Outcomes { made: 1, refused: 5 });
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}

/// Without such a spec the runtime has no reason to write to them.
#[tokio::test]
async fn hostile_25_labels_and_parameters_of_the_spec_are_refused_and_change_nothing() {
    let guest = Guest::start().await;
    let state = "cat /proc/1/attr/current 2>/dev/null || echo none; hostname";
    let before = guest.run(state);
    for (part, field, value) in [
        ("process", "apparmorProfile", json!("unconfined")),
        ("process", "apparmorProfile", json!("/proc/self/attr/../../1/attr")),
        ("process", "selinuxLabel", json!("system_u:system_r:container_t:s0")),
        ("process", "selinuxLabel", json!("no:such:label")),
        ("linux", "mountLabel", json!("system_u:object_r:container_file_t:s0")),
        ("linux", "mountLabel", json!("\u{1b}context=\"x\",rw")),
        ("linux", "sysctl", json!({"kernel.hostname": "redirected"})),
        ("linux", "sysctl", json!({"../../../tmp/x": "1"})),
    ] {
        let outcome = run(&guest, "c", &["true"], |spec| spec[part][field] = value.clone()).await;
        let refusal = outcome.unwrap_err();
        assert!(refusal.contains(&format!("{part}.{field}")), "{field}: {refusal}");
        assert_eq!(std::fs::read_dir(guest.dir().join("c/rootfs/tmp")).unwrap().count(), 0, "{field}");
        assert_eq!(guest.run(state), before, "{field}");
    }
    assert_eq!(guest.leftovers(), Vec::<String>::new());
    // Where none is asked for it has the agent's own.
    let script = "cat /proc/self/attr/current 2>/dev/null || echo none; hostname";
    let own = run(&guest, "c", &["sh", "-c", script], |_| {}).await;
    assert_eq!(own.unwrap(), before);
}

#[tokio::test]
async fn hostile_25_sysctl_names_lead_nowhere_but_to_sysctls() {
    let marker = "bulkhead-sysctl";
    for name in [
        "..",
        ".",
        "",
        "/",
        "kernel..hostname",
        "../../etc/hostname",
        "net/../kernel/hostname",
        "/proc/sys/kernel/hostname",
        "net.ipv4.conf.all./../../../../kernel/hostname",
        "kernel/./hostname",
        "kernel.hostname/",
        "kernel\0.hostname",
    ] {
        let guest = Guest::start().await;
        let request =
            CreateSandboxRequest { sysctls: [(name.to_owned(), marker.to_owned())].into(), ..Default::default() };
        let text = message_of(guest.create_sandbox(&request).await);
        assert!(text.contains("sysctl"), "{name:?}: {text}");
        assert!(!guest.run("hostname").contains(marker), "{name:?}");
        assert!(!std::fs::read_to_string("/etc/hostname").unwrap_or_default().contains(marker), "{name:?}");
    }
}

/// A root file system that is a link: only the host could make one, and it gets what it names, which is no more of the guest
/// than its own.
#[tokio::test]
async fn hostile_22_root_that_does_not_name_a_directory_is_refused() {
    let guest = Guest::start().await;
    let before = mounts(&guest);
    std::fs::write(guest.dir().join("file"), "").unwrap();
    symlink(guest.dir().join("itself"), guest.dir().join("itself")).unwrap();
    for (number, path) in ["file", "absent", "itself", "file/../absent"].into_iter().enumerate() {
        let path = guest.dir().join(path);
        let outcome =
            run(&guest, &format!("c{number}"), &["true"], |spec| spec["root"] = json!({ "path": path })).await;
        let error = outcome.expect_err(path.to_str().unwrap());
        assert!(error.len() < 2000 && !error.contains('\n'), "{error}");
    }
    let error =
        run(&guest, "none", &["true"], |spec| drop(spec.as_object_mut().unwrap().remove("root"))).await.unwrap_err();
    assert!(error.contains("no root"), "{error}");
    let error = run(&guest, "long", &[&"x".repeat(60_000)], |_| {}).await.unwrap_err();
    assert!(error.len() < 5000, "an error of {} bytes", error.len());
    assert_eq!(mounts(&guest), before);
    assert_eq!(guest.leftovers(), Vec::<String>::new());
}
