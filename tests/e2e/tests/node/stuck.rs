//! A guest that does not answer: no call waits for it longer than its bound, and its pod can be removed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use bulkhead_cli::cri::{self, v1};
use bulkhead_e2e::log_watch::LogWatch;
use bulkhead_e2e::shim::{Caller, Code, Error, Host, Shim, code};
use bulkhead_e2e::{Node, PATIENCE, TestPod, compat, node_command, on_node};
use containerd_shim_protos::api;

use crate::contract::{connect, delete, exec, kill, start, stats, wait};

/// State, Pids and Connect are answered from memory: containerd gives them 2 to 5 s, the issue 1 s.
const AT_ONCE: Duration = Duration::from_secs(1);

/// What the shim allows calls that touch only what the guest has, and those that make something; see its `agent` module.
const SHORT: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_secs(60);

/// What an emulated node takes on top.
const SLACK: Duration = Duration::from_secs(10);

/// Runs a call and checks its time.
async fn within<T>(what: &str, bound: Duration, call: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let begin = Instant::now();
    let answer = call.await;
    let took = begin.elapsed();
    if took > bound { Err(Error::Others(format!("{what} took {took:?}, more than {bound:?}"))) } else { answer }
}

/// The calls that containerd counts on whatever the guest does.
async fn answers_at_once(shim: &Shim, id: &str) -> Result<()> {
    let state = api::StateRequest { id: id.into(), ..Default::default() };
    let pids = api::PidsRequest { id: id.into(), ..Default::default() };
    within("State", AT_ONCE, shim.task::<api::StateResponse>("State", &state)).await?;
    within("Pids", AT_ONCE, shim.task::<api::PidsResponse>("Pids", &pids)).await?;
    within("Connect", AT_ONCE, shim.task::<api::ConnectResponse>("Connect", &connect(id))).await?;
    Ok(())
}

/// An answer that says that the guest is silent.
fn says_so<T: std::fmt::Debug>(what: &str, answer: &Result<T, Error>) -> Result<()> {
    ensure!(code(answer) == Code::DEADLINE_EXCEEDED, "{what}: {answer:?}");
    ensure!(format!("{answer:?}").contains("has not answered within"), "{what}: {answer:?}");
    Ok(())
}

/// Stops the pod's VMM and with it the guest's processors.
fn halt(shim_pid: u32) -> Result<()> {
    let vmm = node_command("pgrep", &["-P", &shim_pid.to_string(), "-x", "bulkhead-vmm"])?;
    node_command("kill", &["-STOP", vmm.trim()]).map(drop)
}

async fn halted(node: &Node, name: &str) -> Result<(TestPod, String, Shim)> {
    let pod = node.pod(name).await?;
    let container = pod.sleeper("main").await?;
    let shim = Shim::of_pod(&pod.id).await?;
    let connected: api::ConnectResponse = shim.task("Connect", &connect(&container)).await?;
    halt(connected.shim_pid)?;
    Ok((pod, container, shim))
}

async fn bounded_calls(shim: &Shim, pod: &str, id: &str) -> Result<()> {
    let host = Host::new(Caller::Containerd1_6, crate::contract::SHIM).await?;
    let known: api::ConnectResponse = shim.task("Connect", &connect(id)).await?;
    let bundle = host.container_bundle("stuck-new", pod, known.task_pid, "true")?.display().to_string();
    let create = api::CreateTaskRequest { id: "stuck-new".into(), bundle, ..Default::default() };
    let pause = api::PauseRequest { id: id.into(), ..Default::default() };
    let resources = protobuf::well_known_types::any::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: br#"{"cpu":{"shares":512}}"#.to_vec(),
        ..Default::default()
    };
    let update = api::UpdateTaskRequest { id: id.into(), resources: Some(resources).into(), ..Default::default() };
    let _: api::Empty = shim.task("Exec", &exec(id, "probe", "true", "")).await?;
    let probe = start(id, "probe");
    let numbers = stats(id);
    // All at once, and what is answered from memory meanwhile.
    let (stats, pause, update, exec, create, memory) = tokio::join!(
        within("Stats", SHORT, shim.task::<api::StatsResponse>("Stats", &numbers)),
        within("Pause", SHORT + SLACK, shim.task::<api::Empty>("Pause", &pause)),
        within("Update", SHORT + SLACK, shim.task::<api::Empty>("Update", &update)),
        within("Exec", LONG + SLACK, shim.task::<api::StartResponse>("Start", &probe)),
        within("Create", LONG + SHORT + SLACK, shim.task::<api::CreateTaskResponse>("Create", &create)),
        answers_at_once(shim, id)
    );
    memory?;
    // containerd may have asked before, and then there are numbers to tell.
    if stats.is_err() {
        says_so("Stats", &stats)?;
    }
    says_so("Pause", &pause)?;
    says_so("Update", &update)?;
    says_so("Exec", &exec)?;
    says_so("Create", &create)
}

#[test]
fn halted_guest_holds_no_call_beyond_its_bound() {
    on_node(async |node| {
        let (pod, id, shim) = halted(node, "halted").await?;
        answers_at_once(&shim, &id).await?;
        bounded_calls(&shim, &pod.id, &id).await?;
        answers_at_once(&shim, &id).await?;
        within("Kill", SHORT + SLACK, shim.task::<api::Empty>("Kill", &kill(&id, 15))).await?;
        let ended = within("Wait", SLACK, shim.task::<api::WaitResponse>("Wait", &wait(&id, ""))).await?;
        ensure!(ended.exit_status == 137, "{ended:?}");
        // containerd deletes the task before it says that the container has ended, and must be the first to: a task that is
        // deleted behind its back leaves its bundle behind, and the shim without the last Shutdown.
        let status = pod.wait_exit(&id, SHORT + SLACK).await?;
        ensure!(status.exit_code == 137, "{status:?}");
        let deleted = within("Delete", AT_ONCE, shim.task::<api::DeleteResponse>("Delete", &delete(&id, ""))).await;
        // The shim is gone already if containerd has gone on to the sandbox.
        ensure!(code(&deleted) != Code::OK && !matches!(code(&deleted), Code::DEADLINE_EXCEEDED), "{deleted:?}");
        Ok(())
    });
}

#[test]
fn pod_with_a_halted_guest_is_removed_in_bounded_time() {
    on_node(async |node| {
        let (pod, _, _) = halted(node, "halted-removal").await?;
        let begin = Instant::now();
        node.cri.remove_pod(&pod.id).await?;
        let took = begin.elapsed();
        ensure!(took < SHORT + SLACK + SLACK, "StopPodSandbox and RemovePodSandbox took {took:?}");
        Ok(())
    });
}

/// A container that takes the guest's only processor as a real-time process without a limit would have silenced the agent once.
/// Linux 6.12 keeps a twentieth for all others (its fair server), whatever sched_rt_runtime_us says.
#[test]
fn container_that_takes_the_processor_in_real_time_does_not_silence_the_agent() {
    on_node(async |node| {
        let privileged = |pod: &mut v1::PodSandboxConfig| {
            let linux = pod.linux.get_or_insert_default();
            linux.security_context.get_or_insert_default().privileged = true;
        };
        let pod = node.pod_with("starved", bulkhead_e2e::HANDLER, privileged).await?;
        node.cri.pull(compat::IMAGE).await?;
        let mut config = cri::container_config("main", compat::IMAGE, &["/bin/probe", "starve", "600"]);
        config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let log = LogWatch::new(Path::new(&pod.config.log_directory), &config.log_path)?;
        let id = pod.run(config).await?;
        log.contains("starving".to_owned(), PATIENCE).await?;
        let shim = Shim::of_pod(&pod.id).await?;
        answers_at_once(&shim, &id).await?;
        // The first may come too late on a slow node; they are there when a process has been made.
        let numbers = stats(&id);
        let first = within("Stats", SHORT, shim.task::<api::StatsResponse>("Stats", &numbers)).await;
        ensure!(matches!(code(&first), Code::OK | Code::DEADLINE_EXCEEDED), "{first:?}");
        ensure!(pod.sh(&id, "echo here").await? == "here");
        within("Stats", SHORT, shim.task::<api::StatsResponse>("Stats", &numbers)).await?;
        let begin = Instant::now();
        node.cri.remove_pod(&pod.id).await?;
        ensure!(begin.elapsed() < SHORT + SLACK + SLACK, "removal took {:?}", begin.elapsed());
        Ok(())
    });
}
