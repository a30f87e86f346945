//! The jail around a running pod's VMM, as an operator sees it.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::processes::Processes;
use bulkhead_e2e::{TestPod, node_command, on_node, sh};
use bulkhead_protocol::guest::SHARED_VOLUMES;

/// The VMM's process of a pod.
fn vmm(pod: &TestPod) -> Result<String> {
    Ok(Processes::of(pod)?.vmm.to_string())
}

/// What a VMM has open, in the order of names. What its guest has looked up is its share's.
const DESCRIPTORS: [&str; 11] = [
    "/dev/kvm",
    "/dev/net/tun",
    "/dev/null",
    "/memfd:decoy (deleted)",
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:[timerfd]",
    "anon_inode:kvm",
    "pipe",
    "share",
    "socket",
];

/// A descriptor without what is different from one to the next.
fn kind<'a>(target: &'a str, container: &str) -> &'a str {
    let inside = target.strip_prefix('/').map(|path| path.split('/').next().unwrap_or_default());
    if inside.is_some_and(|first| first.is_empty() || first == SHARED_VOLUMES || first == container) {
        return "share";
    }
    let cut = ["socket", "pipe", "anon_inode:kvm"].into_iter().find(|kind| target.starts_with(kind));
    cut.unwrap_or(target)
}

#[test]
fn hostile_19_jail_of_a_pod_is_closed_and_check_says_so() {
    on_node(async |node| {
        let pod = node.pod("jail").await?;
        let main = pod.sleeper("main").await?;
        let text = node_command("bulkhead", &["check", "--jail", &pod.id[..12]])?;
        ensure!(text.contains("the jail is closed"), "{text}");
        ensure!(text.contains("mnt own, pid own, net own, ipc own, uts own, cgroup own"), "{text}");
        for (thread, what) in
            [("vcpu0", "no capabilities"), ("devices", "no capabilities"), ("fs", "chown dac_override")]
        {
            let line = text.lines().find(|line| line.contains(&format!(" {thread} ")));
            ensure!(
                line.is_some_and(|line| line.contains(what) && line.contains("system calls: ")),
                "{thread}: {text}"
            );
        }
        // The threads of a VMM are the same in every pod; one more would be one that nobody has looked at.
        let threads = text
            .lines()
            .filter(|line| line.contains(" system calls: "))
            .filter_map(|line| line.split_whitespace().nth(2));
        let kinds: BTreeSet<_> = threads.map(|name| name.trim_end_matches(|c: char| c.is_ascii_digit())).collect();
        ensure!(kinds.into_iter().eq(["bulkhead-vmm", "devices", "disks", "fs", "locks", "memory", "vcpu"]), "{text}");
        let (of_vmm, of_shim) = text.split_once("\nshim, process ").context("no shim")?;
        // What containerd, or whoever started it, has open is not the VMM's: all that it has is known.
        let open = of_vmm.lines().find_map(|line| line.strip_prefix("  descriptors   ")).context("no descriptors")?;
        let open: BTreeSet<_> = open.split(", ").filter_map(|one| Some(kind(one.split_once(' ')?.1, &main))).collect();
        ensure!(open.into_iter().eq(DESCRIPTORS), "{text}");
        // The shim's own threads have no kinds: all of them are confined alike.
        let threads: Vec<_> = of_shim.lines().filter(|line| line.starts_with("  thread ")).collect();
        ensure!(
            !threads.is_empty() && threads.iter().all(|line| line.contains("; no new privileges; 1 filters")),
            "{text}"
        );
        ensure!(threads.iter().all(|line| line.contains(" sys_admin") && !line.contains("sys_module")), "{text}");
        Ok(())
    });
}

#[test]
fn hostile_19_vmm_has_no_network_and_no_files_but_the_pods() {
    on_node(async |node| {
        let pod = node.pod("jailed-view").await?;
        let id = pod.sleeper("main").await?;
        let vmm = vmm(&pod)?;
        let interfaces = node_command("nsenter", &["-t", &vmm, "-n", "ip", "-o", "link"])?;
        ensure!(interfaces.lines().count() == 1 && interfaces.contains("lo:"), "{interfaces}");
        let root = fs::read_dir(format!("/proc/{vmm}/root"))?.flatten().map(|entry| entry.file_name());
        let root: BTreeSet<_> = root.map(|name| name.to_string_lossy().into_owned()).collect();
        ensure!(root.iter().eq([SHARED_VOLUMES, &id]), "{root:?}");
        Ok(())
    });
}

#[test]
fn hostile_19_volumes_are_as_read_only_in_the_jail_as_in_the_spec() {
    on_node(async |node| {
        let pod = node.pod("jailed-volumes").await?;
        let place = std::env::temp_dir().join("bulkhead-jail");
        let mut config = sh("main", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done");
        for (name, read_only) in [("written", [false, false]), ("read", [true, true]), ("both", [true, false])] {
            fs::create_dir_all(place.join(name))?;
            for (number, readonly) in read_only.into_iter().enumerate() {
                config.mounts.push(v1::Mount {
                    container_path: format!("/{name}-{number}"),
                    host_path: place.join(name).display().to_string(),
                    readonly,
                    ..v1::Mount::default()
                });
            }
        }
        let main = pod.run(config).await?;
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", vmm(&pod)?))?;
        for (name, access) in [("written", "rw"), ("read", "ro"), ("both", "rw")] {
            let is_it = |line: &&str| line.contains(&format!("/bulkhead-jail/{name} "));
            let options: Vec<_> = table.lines().filter(is_it).filter_map(|line| line.split(' ').nth(5)).collect();
            // One mount, whatever the number of places in the pod.
            ensure!(options.len() == 1, "{name}: {table}");
            ensure!(options[0].starts_with(&format!("{access},nosuid,nodev,noexec")), "{name}: {options:?}");
        }
        // What the pod may write elsewhere is read-only in the guest.
        let writable = "for at in /*-?; do touch $at/x 2>/dev/null && echo $at; done; true";
        let writable = pod.sh(&main, writable).await?;
        ensure!(writable.split_whitespace().eq(["/both-1", "/written-0", "/written-1"]), "{writable}");
        fs::remove_dir_all(&place)?;
        Ok(())
    });
}

#[test]
fn hostile_20_vmm_killed_by_a_violation_or_a_signal_leaves_nothing() {
    on_node(async |node| {
        let pod = node.pod("jail-signal").await?;
        let id = pod.sleeper("main").await?;
        // What a violation of a filter raises.
        node_command("kill", &["-SYS", &vmm(&pod)?])?;
        let end = pod.wait_exit(&id, bulkhead_e2e::PATIENCE).await?;
        ensure!(end.exit_code == 137, "{end:?}");
        Ok(())
    });
}

/// A freezer, a debugger or an administrator may stop a VMM in the middle of any wait; the kernel restarts such a wait by a
/// system call of its own.
#[test]
fn vmm_that_was_stopped_goes_on_as_before() {
    on_node(async |node| {
        let pod = node.pod("jail-stop").await?;
        let id = pod.sleeper("main").await?;
        for _ in 0..3 {
            node_command("kill", &["-STOP", &vmm(&pod)?])?;
            node_command("kill", &["-CONT", &vmm(&pod)?])?;
            ensure!(pod.sh(&id, "echo > /file && echo here").await? == "here");
        }
        Ok(())
    });
}
