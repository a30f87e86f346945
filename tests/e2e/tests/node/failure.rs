//! What happens when a part dies.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::{node_command, on_node};

/// Pids of the VMM processes, oldest first.
fn vmms() -> Result<Vec<i32>> {
    let Ok(list) = node_command("pgrep", &["-x", "bulkhead-vmm"]) else { return Ok(Vec::new()) };
    list.lines().map(|pid| pid.trim().parse().context("pgrep says no pid")).collect()
}

fn sigkill(pid: i32) -> Result<()> {
    node_command("kill", &["-KILL", &pid.to_string()]).map(drop)
}

#[test]
fn killed_vmm_ends_its_pods_containers_with_137_and_no_other() {
    on_node(async |node| {
        let victim = node.pod("victim").await?;
        let running = vmms()?;
        ensure!(running.len() == 1, "one pod, VMMs {running:?}");
        let bystander = node.pod("bystander").await?;
        let (one, two) = (victim.sleeper("one").await?, victim.sleeper("two").await?);
        let other = bystander.sleeper("main").await?;
        sigkill(running[0])?;
        let begin = Instant::now();
        for container in [&one, &two] {
            let status = victim.wait_exit(container, Duration::from_secs(5)).await?;
            ensure!(status.exit_code == 137, "{status:?}");
        }
        ensure!(begin.elapsed() < Duration::from_secs(5), "both took {:?}", begin.elapsed());
        while victim.status().await?.state() != v1::PodSandboxState::SandboxNotready {
            ensure!(begin.elapsed() < Duration::from_secs(5), "the sandbox is still ready after 5 s");
        }
        ensure!(bystander.sh(&other, "echo alive").await? == "alive", "the other pod was hit");
        node.cri.remove_pod(&victim.id).await
    });
}

#[test]
fn killed_shim_leaves_a_pod_that_can_be_removed() {
    on_node(async |node| {
        let pod = node.pod("shimless").await?;
        pod.sleeper("main").await?;
        let shims = node_command("pgrep", &["-f", &format!("containerd-shim-bulkhead-v2.*{}", pod.id)])?;
        for pid in shims.lines() {
            sigkill(pid.trim().parse()?)?;
        }
        node.cri.remove_pod(&pod.id).await
    });
}

#[test]
fn guest_panic_ends_the_pod() {
    on_node(async |node| {
        let privileged = |pod: &mut v1::PodSandboxConfig| {
            let linux = pod.linux.get_or_insert_default();
            linux.security_context.get_or_insert_default().privileged = true;
        };
        let pod = node.pod_with("panic", "bulkhead", privileged).await?;
        let mut config = bulkhead_e2e::sh("main", "echo 2 > /proc/sys/vm/panic_on_oom; x=x; while :; do x=$x$x; done");
        let linux = config.linux.get_or_insert_default();
        linux.resources = Some(v1::LinuxContainerResources { memory_limit_in_bytes: 16 << 20, ..Default::default() });
        linux.security_context.get_or_insert_default().privileged = true;
        let container = pod.run(config).await?;
        let status = pod.wait_exit(&container, bulkhead_e2e::PATIENCE).await?;
        ensure!(status.exit_code == 137, "{status:?}");
        Ok(())
    });
}
