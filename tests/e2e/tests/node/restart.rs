//! containerd is killed and started again while pods run.

use anyhow::ensure;
use bulkhead_cli::cri::v1;
use bulkhead_cli::log;
use bulkhead_e2e::shim::Shim;
use bulkhead_e2e::{PATIENCE, containerd, on_node, sh};
use containerd_shim_protos::api;

use crate::contract::{kill, wait};

#[test]
fn pods_outlive_containerd_and_ends_meanwhile_are_reported() {
    on_node(async |node| {
        let pod = node.pod("survivor").await?;
        let main = pod.sleeper("main").await?;
        let short = pod.run(sh("short", "trap 'exit 7' TERM; echo up; while :; do sleep 1; done")).await?;
        pod.sh(&short, "until pidof sleep > /dev/null; do :; done").await?;
        let boot_id = pod.sh(&main, crate::BOOT_ID).await?;
        let shim = Shim::of_pod(&pod.id).await?;

        let command = containerd::crash()?;
        let ended = async {
            let _: api::Empty = shim.task("Kill", &kill(&short, 15)).await?;
            shim.task::<api::WaitResponse>("Wait", &wait(&short, "")).await
        }
        .await;
        containerd::start(&node.cri, &command).await?;
        ensure!(ended.as_ref().is_ok_and(|ended| ended.exit_status == 7), "while containerd was away: {ended:?}");

        let status = pod.wait_exit(&short, PATIENCE).await?;
        ensure!(status.exit_code == 7, "{status:?}");
        ensure!(pod.status().await?.state() == v1::PodSandboxState::SandboxReady, "the pod is not ready");
        ensure!(pod.container(&main).await?.state() == v1::ContainerState::ContainerRunning, "main does not run");
        ensure!(pod.sh(&main, crate::BOOT_ID).await? == boot_id, "another guest");
        pod.sh(&main, "echo after the restart > /proc/1/fd/1").await?;
        let request = v1::ContainerStatsRequest { container_id: main.clone() };
        let stats = node.cri.runtime().container_stats(request).await?.into_inner().stats;
        ensure!(stats.is_some_and(|stats| stats.memory.is_some()), "no numbers");
        // A container that comes later joins the same guest, with the pod's files.
        let (later, out) =
            pod.run_to_end(sh("later", &format!("{}; hostname; cat /etc/hostname", crate::BOOT_ID))).await?;
        ensure!(later.exit_code == 0 && out == format!("{boot_id}\nsurvivor\nsurvivor\n"), "{later:?} {out}");
        pod.stop(&main, PATIENCE).await?;
        let text = log::text_of(&pod.log(&main).await?, "stdout");
        ensure!(text == "after the restart\n", "{text:?}");
        node.cri.remove_pod(&pod.id).await
    });
}
