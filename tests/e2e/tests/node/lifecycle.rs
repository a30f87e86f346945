//! A container's life as the kubelet drives it.

use std::time::Duration;

use anyhow::ensure;
use bulkhead_cli::cri::v1;
use bulkhead_cli::log;
use bulkhead_e2e::{PATIENCE, on_node, sh};

use crate::{BOOT_ID, node_boot_id};

#[test]
fn single_container_runs_in_a_guest_of_its_own_and_reports_log_and_exit_code() {
    on_node(async |node| {
        let pod = node.pod("single").await?;
        let (status, out) = pod.run_to_end(sh("main", &format!("{BOOT_ID}; uname -r; hostname"))).await?;
        let lines: Vec<_> = out.lines().collect();
        ensure!(status.exit_code == 0 && status.reason == "Completed", "{status:?}");
        ensure!(lines.len() == 3 && lines[0] != node_boot_id()? && lines[2] == "single", "{lines:?}");
        ensure!(lines[1] != crate::read("/proc/sys/kernel/osrelease")?, "the pod has the node's kernel: {lines:?}");
        Ok(())
    });
}

#[test]
fn runc_runs_beside_it_on_the_nodes_kernel() {
    on_node(async |node| {
        let pod = node.pod_with("runc", "runc", |_| {}).await?;
        let (status, out) = pod.run_to_end(sh("main", BOOT_ID)).await?;
        ensure!(status.exit_code == 0 && out.trim() == node_boot_id()?, "{status:?} {out}");
        Ok(())
    });
}

#[test]
fn three_containers_share_guest_network_and_shared_memory_but_not_files_or_pids() {
    on_node(async |node| {
        let pod = node.pod("three").await?;
        let mut ids = Vec::new();
        for name in ["one", "two", "three"] {
            ids.push(pod.sleeper(name).await?);
        }
        let boot_id = pod.sh(&ids[0], BOOT_ID).await?;
        for (index, id) in ids.iter().enumerate() {
            ensure!(pod.sh(id, BOOT_ID).await? == boot_id, "container {index} is in another guest");
            pod.sh(id, &format!("touch /own-{index} /dev/shm/shared-{index}")).await?;
        }
        for (index, id) in ids.iter().enumerate() {
            ensure!(pod.sh(id, "ls -d /own-*").await? == format!("/own-{index}"), "root file systems are shared");
            ensure!(pod.sh(id, "ls /dev/shm | wc -l").await? == "3", "/dev/shm is not the pod's");
            ensure!(pod.sh(id, "cat /proc/1/comm").await? == "sh", "pid 1 is not the container's own");
        }
        pod.sh(&ids[0], "mkdir /www; echo from-one > /www/index.html; busybox httpd -p 127.0.0.1:8000 -h /www").await?;
        ensure!(pod.sh(&ids[2], "wget -qO- http://127.0.0.1:8000/").await? == "from-one", "localhost is not shared");
        Ok(())
    });
}

#[test]
fn init_container_ends_before_the_main_container_starts() {
    on_node(async |node| {
        let pod = node.pod("init").await?;
        let (init, _) = pod.run_to_end(sh("init", "echo prepared > /dev/shm/file")).await?;
        let (main, out) = pod.run_to_end(sh("main", "cat /dev/shm/file")).await?;
        ensure!(init.exit_code == 0 && main.exit_code == 0 && out == "prepared\n", "{init:?} {main:?} {out}");
        ensure!(main.started_at >= init.finished_at, "main started before init ended: {init:?} {main:?}");
        Ok(())
    });
}

#[test]
fn container_restarts_in_the_same_guest_with_fresh_files() {
    on_node(async |node| {
        let pod = node.pod("restart").await?;
        let script = format!("test ! -e /mark || exit 9; touch /mark; {BOOT_ID}; exit 3");
        let first = pod.run(sh("main", &script)).await?;
        let ended = pod.wait_exit(&first, PATIENCE).await?;
        ensure!(ended.exit_code == 3 && ended.reason == "Error", "{ended:?}");
        let boot_id = pod.log(&first).await?;
        let mut again = sh("main", &script);
        again.metadata = Some(v1::ContainerMetadata { name: "main".into(), attempt: 1 });
        again.log_path = "main_1.log".into();
        let second = pod.run(again).await?;
        ensure!(pod.wait_exit(&second, PATIENCE).await?.exit_code == 3, "the second attempt saw the first one's files");
        ensure!(log::text_of(&pod.log(&second).await?, "stdout") == log::text_of(&boot_id, "stdout"), "another guest");
        pod.remove_container(&first).await
    });
}

#[test]
fn log_has_the_cri_format_with_streams_and_partial_lines() {
    on_node(async |node| {
        let pod = node.pod("log").await?;
        let script = "echo out; echo err >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf end";
        let container = pod.run(sh("main", script)).await?;
        pod.wait_exit(&container, PATIENCE).await?;
        let lines = pod.log(&container).await?;
        let out = log::text_of(&lines, "stdout");
        ensure!(log::text_of(&lines, "stderr") == "err\n", "{lines:?}");
        ensure!(
            out.starts_with("out\nxxx") && out.ends_with("x\nend") && out.len() == 4 + 40001 + 3,
            "{} bytes",
            out.len()
        );
        ensure!(lines.iter().any(|line| !line.complete), "a line of 40000 bytes is not split");
        Ok(())
    });
}

#[test]
fn large_output_arrives_whole() {
    on_node(async |node| {
        let pod = node.pod("large").await?;
        // containerd 1.6 closes its end when it learns of the exit, with up to a pipe's worth unread (runc's output is cut
        // in the same way), so the container stays until it has read everything.
        let (status, out) = pod.run_to_end(sh("main", "seq 1 100000; sleep 10")).await?;
        let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
        ensure!(status.exit_code == 0 && out == expected, "{} of {} bytes", out.len(), expected.len());
        Ok(())
    });
}

#[test]
fn exit_codes_and_signals_are_reported_as_a_shell_would() {
    on_node(async |node| {
        let pod = node.pod("codes").await?;
        for (name, script, code) in [
            ("zero", "exit 0", 0),
            ("forty-two", "exit 42", 42),
            ("max", "exit 255", 255),
            // PID 1 of a namespace does not get its own deadly signals: a child takes them.
            ("sigsegv", "sh -c 'kill -SEGV $$'; exit $?", 139),
        ] {
            let (status, _) = pod.run_to_end(sh(name, script)).await?;
            ensure!(status.exit_code == code, "{name}: {status:?}");
        }
        Ok(())
    });
}

#[test]
fn stop_sends_the_stop_signal_and_kills_after_the_grace_period() {
    on_node(async |node| {
        let pod = node.pod("stop").await?;
        let polite = pod.run(sh("polite", "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 1; done")).await?;
        let stubborn = pod.run(sh("stubborn", "trap '' TERM; echo up; while :; do sleep 1; done")).await?;
        // The shell in the container needs a moment to set its trap; an exec that sees it asleep proves that it has.
        for container in [&polite, &stubborn] {
            pod.sh(container, "until pidof sleep > /dev/null; do :; done").await?;
        }
        pod.stop(&polite, PATIENCE).await?;
        let status = pod.container(&polite).await?;
        let out = log::text_of(&pod.log(&polite).await?, "stdout");
        ensure!(status.exit_code == 5 && out == "up\nbye\n", "{status:?} {out}");
        pod.stop(&stubborn, Duration::from_secs(2)).await?;
        let status = pod.container(&stubborn).await?;
        ensure!(status.exit_code == 137, "{status:?}");
        Ok(())
    });
}

#[test]
fn pod_with_running_containers_is_removed_with_everything() {
    on_node(async |node| {
        let pod = node.pod("removal").await?;
        for name in ["one", "two"] {
            pod.sleeper(name).await?;
        }
        // The fixture asserts that nothing is left; here, that removal is fine to repeat.
        node.cri.remove_pod(&pod.id).await?;
        node.cri.remove_pod(&pod.id).await
    });
}

#[test]
fn two_pods_live_and_end_independently() {
    on_node(async |node| {
        let (first, second) = (node.pod("first").await?, node.pod("second").await?);
        let (one, two) = (first.sleeper("main").await?, second.sleeper("main").await?);
        ensure!(first.sh(&one, BOOT_ID).await? != second.sh(&two, BOOT_ID).await?, "two pods share a guest");
        node.cri.remove_pod(&first.id).await?;
        ensure!(second.sh(&two, "echo alive").await? == "alive", "the second pod went with the first");
        Ok(())
    });
}

/// The lines of all pods come together in containerd's log.
#[test]
fn every_line_of_a_shim_in_containerds_log_names_its_pod() {
    on_node(async |node| {
        let pod = node.pod("named-in-the-log").await?;
        pod.run_to_end(sh("main", "true")).await?;
        node.cri.remove_pod(&pod.id).await?;
        let log = crate::read("/run/node/log/containerd.log")?;
        let lines: Vec<_> = log.lines().filter(|line| line.contains(" bulkhead_shim::")).collect();
        let whose = format!("pod=default/named-in-the-log sandbox={}", pod.id);
        ensure!(lines.iter().any(|line| line.contains(&whose)), "nothing of {whose} among {} lines", lines.len());
        let nobodys: Vec<_> = lines.iter().filter(|line| !line.contains(" sandbox=")).collect();
        ensure!(nobodys.is_empty(), "{nobodys:?}");
        Ok(())
    });
}
