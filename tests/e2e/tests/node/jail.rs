//! The jail around a running pod's VMM, as an operator sees it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::{TestPod, node_command, on_node, sh};

/// The VMM's process of a pod.
fn vmm(pod: &TestPod) -> Result<String> {
    let note = fs::read_to_string(format!("/run/bulkhead/k8s.io/{}/vmm.pid", pod.id)).context("no VMM is noted")?;
    Ok(note.split(' ').next().unwrap_or_default().to_owned())
}

#[test]
fn hostile_19_jail_of_a_pod_is_closed_and_check_says_so() {
    on_node(async |node| {
        let pod = node.pod("jail").await?;
        pod.sleeper("main").await?;
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
        ensure!(kinds.into_iter().eq(["bulkhead-vmm", "devices", "disks", "fs", "memory", "vcpu"]), "{text}");
        // What containerd, or whoever started it, has open is not the VMM's.
        ensure!(!text.contains("/dev/vport"), "{text}");
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
        let root: Vec<_> =
            fs::read_dir(format!("/proc/{vmm}/root"))?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(root == [id.as_str()], "{root:?}");
        Ok(())
    });
}

#[test]
fn hostile_19_volumes_are_as_read_only_in_the_jail_as_in_the_spec() {
    on_node(async |node| {
        let pod = node.pod("jailed-volumes").await?;
        let volume = std::env::temp_dir().join("bulkhead-jail-volume");
        fs::create_dir_all(&volume)?;
        let mut config = sh("main", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done");
        let mount = |path: &str, readonly| v1::Mount {
            container_path: path.into(),
            host_path: volume.display().to_string(),
            readonly,
            ..v1::Mount::default()
        };
        config.mounts = vec![mount("/rw", false), mount("/ro", true)];
        pod.run(config).await?;
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", vmm(&pod)?))?;
        let of_the_volume = table.lines().filter(|line| line.contains("bulkhead-jail-volume"));
        let options: BTreeMap<_, _> = of_the_volume
            .filter_map(|line| {
                let fields: Vec<_> = line.split(' ').collect();
                Some((fields.get(5)?.split(',').next()?.to_owned(), fields.get(5)?.to_string()))
            })
            .collect();
        ensure!(options.keys().eq(["ro", "rw"]), "{table}");
        ensure!(options.values().all(|options| options.contains("nosuid,nodev,noexec")), "{options:?}");
        fs::remove_dir_all(&volume)?;
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
