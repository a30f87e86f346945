//! What a Task call gets that names nothing, comes in the wrong state or comes twice: the same code as from runc's shim,
//! which is asked by the same client.

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::shim::{Caller, Code, Host, Shim, code};
use bulkhead_e2e::{Netns, on_node};
use containerd_shim_protos::api;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::contract::{connect, delete, exec, kill, start, stats, wait};

/// The answers, in order.
type Table = Vec<(String, Code)>;

/// Calls to which runc's shim says `UNKNOWN`, with a text, because its state machine returns plain errors, and what ours say,
/// since the contract has a code for it.
const WE_SAY_MORE: [(&str, Code); 19] = [
    ("second: Create", Code::ALREADY_EXISTS),
    ("created: Resume", Code::FAILED_PRECONDITION),
    ("no such exec: CloseIO", Code::NOT_FOUND),
    ("running: Start", Code::FAILED_PRECONDITION),
    ("running: Delete", Code::FAILED_PRECONDITION),
    ("running: Resume", Code::FAILED_PRECONDITION),
    ("running: Checkpoint", Code::UNIMPLEMENTED),
    ("paused: Pause", Code::FAILED_PRECONDITION),
    ("paused: Start", Code::FAILED_PRECONDITION),
    ("paused: Delete", Code::FAILED_PRECONDITION),
    ("running exec: Start", Code::FAILED_PRECONDITION),
    ("running exec: Delete", Code::FAILED_PRECONDITION),
    ("stopped exec: Start", Code::FAILED_PRECONDITION),
    ("stopped: Start", Code::FAILED_PRECONDITION),
    ("stopped: Exec", Code::FAILED_PRECONDITION),
    ("stopped: Pause", Code::FAILED_PRECONDITION),
    ("stopped: Resume", Code::FAILED_PRECONDITION),
    ("stopped: Update", Code::FAILED_PRECONDITION),
    ("stopped: Checkpoint", Code::UNIMPLEMENTED),
];

struct Script {
    shim: Shim,
    table: Table,
}

impl Script {
    async fn ask<A: Message>(&mut self, name: &str, method: &str, request: &impl Message) -> Option<A> {
        let answer = self.shim.task::<A>(method, request).await;
        self.table.push((format!("{name}: {method}"), code(&answer)));
        answer.ok()
    }

    /// Every call on a container or exec, as far as it needs no state to be set up for it.
    async fn every_call(&mut self, name: &str, id: &str, exec_id: &str) {
        self.ask::<api::StateResponse>(name, "State", &state(id, exec_id)).await;
        self.ask::<api::StartResponse>(name, "Start", &start(id, exec_id)).await;
        self.ask::<api::Empty>(name, "Kill", &api::KillRequest { exec_id: exec_id.into(), ..kill(id, 0) }).await;
        self.ask::<api::DeleteResponse>(name, "Delete", &delete(id, exec_id)).await;
        self.ask::<api::WaitResponse>(name, "Wait", &wait(id, exec_id)).await;
        self.ask::<api::Empty>(name, "ResizePty", &resize(id, exec_id)).await;
        self.ask::<api::Empty>(name, "CloseIO", &close(id, exec_id)).await;
    }

    /// The calls that have no exec.
    async fn container_calls(&mut self, name: &str, id: &str) {
        self.ask::<api::PidsResponse>(name, "Pids", &pids(id)).await;
        self.ask::<api::StatsResponse>(name, "Stats", &stats(id)).await;
        self.ask::<api::Empty>(name, "Pause", &pause(id)).await;
        self.ask::<api::Empty>(name, "Resume", &resume(id)).await;
        self.ask::<api::ConnectResponse>(name, "Connect", &connect(id)).await;
        self.ask::<api::Empty>(name, "Update", &update(id)).await;
        self.ask::<api::Empty>(name, "Checkpoint", &checkpoint(id)).await;
    }
}

fn state(id: &str, exec_id: &str) -> api::StateRequest {
    api::StateRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}

fn resize(id: &str, exec_id: &str) -> api::ResizePtyRequest {
    api::ResizePtyRequest { id: id.into(), exec_id: exec_id.into(), width: 80, height: 24, ..Default::default() }
}

fn close(id: &str, exec_id: &str) -> api::CloseIORequest {
    api::CloseIORequest { id: id.into(), exec_id: exec_id.into(), stdin: true, ..Default::default() }
}

fn pids(id: &str) -> api::PidsRequest {
    api::PidsRequest { id: id.into(), ..Default::default() }
}

fn pause(id: &str) -> api::PauseRequest {
    api::PauseRequest { id: id.into(), ..Default::default() }
}

fn resume(id: &str) -> api::ResumeRequest {
    api::ResumeRequest { id: id.into(), ..Default::default() }
}

fn update(id: &str) -> api::UpdateTaskRequest {
    let resources = Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: br#"{"cpu":{"shares":512}}"#.to_vec(),
        ..Any::default()
    };
    api::UpdateTaskRequest { id: id.into(), resources: MessageField::some(resources), ..Default::default() }
}

fn checkpoint(id: &str) -> api::CheckpointTaskRequest {
    let path = std::env::temp_dir().join("no-checkpoint").display().to_string();
    api::CheckpointTaskRequest { id: id.into(), path, ..Default::default() }
}

/// Runs the whole script against a shim.
async fn ask(binary: &str) -> Result<Table> {
    let (host, netns) = (Host::new(Caller::Containerd1_6, binary).await?, Netns::new("codes")?);
    let (pod, id) = ("codes-pod", "codes-main");
    let bundle = |bundle: std::path::PathBuf| bundle.display().to_string();
    let create = |id: &str, bundle: String| api::CreateTaskRequest { id: id.into(), bundle, ..Default::default() };
    let pod_bundle = bundle(host.sandbox_bundle(pod, netns.path())?);
    let shim = host.start(pod).await?.1;
    let sandbox: api::CreateTaskResponse = shim.task("Create", &create(pod, pod_bundle)).await?;
    let _: api::StartResponse = shim.task("Start", &start(pod, "")).await?;
    let main_bundle = bundle(host.container_bundle(id, pod, sandbox.pid, "while :; do sleep 1; done")?);
    host.start(id).await?;

    let mut script = Script { shim: shim.clone(), table: Vec::new() };
    script.every_call("no such container", "nobody", "").await;
    script.container_calls("no such container", "nobody").await;
    script.ask::<api::Empty>("no such container", "Exec", &exec("nobody", "e", "true", "")).await;
    script.ask::<api::CreateTaskResponse>("first", "Create", &create(id, main_bundle.clone())).await;
    script.ask::<api::CreateTaskResponse>("second", "Create", &create(id, main_bundle.clone())).await;
    script.ask::<api::Empty>("created", "Resume", &resume(id)).await;
    script.ask::<api::StateResponse>("created", "State", &state(id, "")).await;
    script.ask::<api::StartResponse>("created", "Start", &start(id, "")).await;
    script.every_call("no such exec", id, "nobody").await;
    running(&mut script, id).await;
    execs(&mut script, id).await;
    stopped(&mut script, id).await;
    script.ask::<api::DeleteResponse>("stopped", "Delete", &delete(id, "")).await;
    script.every_call("deleted", id, "").await;

    let ended = shim.task::<api::Empty>("Kill", &kill(pod, 9)).await;
    ended.with_context(|| format!("{binary} does not answer any more after {:?}", script.table))?;
    let _: api::WaitResponse = shim.task("Wait", &wait(pod, "")).await?;
    let _: api::DeleteResponse = shim.task("Delete", &delete(pod, "")).await?;
    let _: Result<api::Empty, _> = shim.task("Shutdown", &crate::contract::shutdown(pod)).await;
    // `delete` runs for both as the host goes; runc's shim warns on stderr that there is nothing.
    Ok(script.table)
}

async fn running(script: &mut Script, id: &str) {
    script.ask::<api::StartResponse>("running", "Start", &start(id, "")).await;
    script.ask::<api::DeleteResponse>("running", "Delete", &delete(id, "")).await;
    script.ask::<api::Empty>("running", "Resume", &resume(id)).await;
    script.ask::<api::Empty>("running", "Update", &update(id)).await;
    script.ask::<api::Empty>("running", "Checkpoint", &checkpoint(id)).await;
    script.ask::<api::Empty>("running", "Pause", &pause(id)).await;
    script.ask::<api::Empty>("paused", "Pause", &pause(id)).await;
    script.ask::<api::StartResponse>("paused", "Start", &start(id, "")).await;
    script.ask::<api::DeleteResponse>("paused", "Delete", &delete(id, "")).await;
    script.ask::<api::StateResponse>("paused", "State", &state(id, "")).await;
    script.ask::<api::Empty>("paused", "Resume", &resume(id)).await;
}

async fn execs(script: &mut Script, id: &str) {
    script.ask::<api::Empty>("first exec", "Exec", &exec(id, "e", "sleep 60", "")).await;
    script.ask::<api::Empty>("second exec", "Exec", &exec(id, "e", "sleep 60", "")).await;
    script.ask::<api::StateResponse>("created exec", "State", &state(id, "e")).await;
    script.ask::<api::StartResponse>("created exec", "Start", &start(id, "e")).await;
    script.ask::<api::StartResponse>("running exec", "Start", &start(id, "e")).await;
    script.ask::<api::DeleteResponse>("running exec", "Delete", &delete(id, "e")).await;
    let kill_exec = |signal| api::KillRequest { exec_id: "e".into(), ..kill(id, signal) };
    script.ask::<api::Empty>("running exec", "Kill", &kill_exec(9)).await;
    script.ask::<api::WaitResponse>("running exec", "Wait", &wait(id, "e")).await;
    script.ask::<api::StartResponse>("stopped exec", "Start", &start(id, "e")).await;
    script.ask::<api::Empty>("stopped exec", "Kill", &kill_exec(9)).await;
    script.ask::<api::DeleteResponse>("stopped exec", "Delete", &delete(id, "e")).await;
    script.ask::<api::DeleteResponse>("deleted exec", "Delete", &delete(id, "e")).await;
    script.ask::<api::Empty>("unstarted exec", "Exec", &exec(id, "u", "true", "")).await;
    script.ask::<api::DeleteResponse>("unstarted exec", "Delete", &delete(id, "u")).await;
}

async fn stopped(script: &mut Script, id: &str) {
    script.ask::<api::Empty>("running", "Kill", &kill(id, 9)).await;
    script.ask::<api::WaitResponse>("running", "Wait", &wait(id, "")).await;
    script.ask::<api::WaitResponse>("stopped", "Wait", &wait(id, "")).await;
    script.ask::<api::StateResponse>("stopped", "State", &state(id, "")).await;
    script.ask::<api::StartResponse>("stopped", "Start", &start(id, "")).await;
    script.ask::<api::Empty>("stopped", "Kill", &kill(id, 9)).await;
    script.ask::<api::Empty>("stopped", "Exec", &exec(id, "late", "true", "")).await;
    script.container_calls("stopped", id).await;
}

/// Whether ours is what the contract asks for, given runc's.
fn agrees(name: &str, runc: Code, ours: Code) -> bool {
    let more = WE_SAY_MORE.iter().find(|(call, _)| *call == name);
    more.map_or(runc == ours, |(_, code)| (runc, ours) == (Code::UNKNOWN, *code))
}

#[test]
fn wrong_calls_get_the_codes_that_runcs_shim_gives() {
    on_node(async |_| {
        let runc = ask("containerd-shim-runc-v2").await?;
        let ours = ask(crate::contract::SHIM).await?;
        ensure!(runc.len() == ours.len() && ours.len() > 60, "{} and {} calls", runc.len(), ours.len());
        let rows = runc.iter().zip(&ours);
        let wrong: Vec<_> = rows
            .filter(|((name, runc), (_, ours))| !agrees(name, *runc, *ours))
            .map(|((name, runc), (_, ours))| format!("{name}: runc's {runc:?}, ours {ours:?}"))
            .collect();
        let stale = WE_SAY_MORE.iter().find(|(call, _)| !ours.iter().any(|(name, _)| name == call));
        ensure!(stale.is_none(), "no call is {stale:?}");
        ensure!(wrong.is_empty(), "{} of {} calls differ:\n{}", wrong.len(), ours.len(), wrong.join("\n"));
        Ok(())
    });
}
