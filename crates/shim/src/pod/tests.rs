//! Calls of containerd's on a pod whose VM and agent are fakes ([`crate::sandbox::fake`]).

use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::types::task::Status;
use tokio::task::JoinHandle;

use super::container::Kind;
use super::hooks::ContainerHooks;
use super::*;
use crate::io::Stdio;
use crate::sandbox::agent::ProcessKey;
use crate::sandbox::fake::FakeAgent;
use crate::spec::HostHooks;

/// A pod with a running container, `c`.
struct Fixture {
    pod: Arc<Pod>,
    agent: Arc<FakeAgent>,
    _dir: tempfile::TempDir,
}

fn identity(dir: &Path) -> PodIdentity {
    PodIdentity { sandbox_id: "s".into(), run_dir: RunDir::new(&dir.join("run"), "k8s.io", "s") }
}

async fn pod() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let (publisher, _) = Publisher::start("k8s.io".into(), None);
    let pod = Arc::new(Pod::new(identity(dir.path()), publisher));
    let (sandbox, agent) = Sandbox::fake(dir.path()).await;
    *pod.sandbox_slot() = Some(sandbox);
    let fixture = Fixture { pod, agent, _dir: dir };
    fixture.agent.run("c", "");
    fixture.add("c", Kind::Member).init.set_status(Status::RUNNING);
    fixture
}

impl Fixture {
    /// Has a created container.
    fn add(&self, id: &str, kind: Kind) -> Arc<Container> {
        let init = Process::new(ProcessKey { container: id.into(), exec: String::new() }, Stdio::default());
        init.assign_pid(None).unwrap();
        let spec = oci_spec::runtime::Spec::default();
        let hooks = ContainerHooks::new(HostHooks::default(), &spec, id, Path::new("/"));
        let container = Arc::new(Container::new(id.into(), kind, "/".into(), Arc::new(init), hooks));
        self.pod.containers().insert(id.into(), container.clone());
        self.pod.watch_init(container.clone()).unwrap();
        container
    }

    /// Adds an exec to the container, and somebody who waits for it.
    fn exec(&self, id: &str) -> (Arc<Process>, JoinHandle<process::Exit>) {
        let process = serde_json::json!({ "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } });
        let process = process.to_string().into_bytes();
        let task = ExecTask { id: "c".into(), exec_id: id.into(), stdio: Stdio::default(), process };
        self.pod.exec(task).unwrap();
        let process = self.pod.process("c", id).unwrap();
        (process.clone(), tokio::spawn(async move { process.wait().await }))
    }

    fn start(&self, exec: &str) -> JoinHandle<Result<u32, TaskError>> {
        tokio::spawn(self.pod.clone().start("c".into(), exec.into()))
    }

    fn kill(&self, exec: &str) -> JoinHandle<Result<(), TaskError>> {
        tokio::spawn(self.pod.clone().kill("c".into(), exec.into(), 9, false))
    }

    fn delete(&self, id: &str, exec: &str) -> JoinHandle<Result<end::Deleted, TaskError>> {
        tokio::spawn(self.pod.clone().delete(id.into(), exec.into()))
    }
}

#[tokio::test]
async fn exec_that_cannot_be_started_has_ended_and_keeps_no_thread() {
    let fixture = pod().await;
    fixture.agent.refuse("Exec");
    let (exec, waiter) = fixture.exec("e");
    assert_eq!(fixture.start("e").await.unwrap().unwrap_err().code(), ttrpc::Code::INVALID_ARGUMENT);
    assert_eq!(waiter.await.unwrap().code, 137);
    // The thread ends by itself, a moment after nobody holds it.
    assert!(!exec.holds_pid());
    fixture.delete("c", "e").await.unwrap().unwrap();
    assert!(fixture.pod.process("c", "e").is_err());
}

#[tokio::test]
async fn exec_that_was_never_started_ends_with_its_deletion_or_its_containers() {
    let fixture = pod().await;
    let (_, waiter) = fixture.exec("deleted");
    fixture.delete("c", "deleted").await.unwrap().unwrap();
    assert_eq!(waiter.await.unwrap().code, 137);
    let (_, waiter) = fixture.exec("left");
    fixture.kill("").await.unwrap().unwrap();
    fixture.pod.process("c", "").unwrap().wait().await;
    fixture.delete("c", "").await.unwrap().unwrap();
    assert_eq!(waiter.await.unwrap().code, 137);
}

#[tokio::test]
async fn kill_and_delete_of_an_exec_wait_for_its_start() {
    let fixture = pod().await;
    fixture.agent.hold("Exec");
    let (exec, _) = fixture.exec("e");
    let start = fixture.start("e");
    fixture.agent.called("Exec c/e", 1).await;
    let (kill, delete) = (fixture.kill("e"), fixture.delete("c", "e"));
    tokio::task::yield_now().await;
    assert!(!kill.is_finished() && !delete.is_finished());
    fixture.agent.release("Exec");
    start.await.unwrap().unwrap();
    assert_eq!(delete.await.unwrap().unwrap_err().code(), ttrpc::Code::FAILED_PRECONDITION);
    kill.await.unwrap().unwrap();
    assert_eq!(exec.wait().await.code, 137);
    fixture.delete("c", "e").await.unwrap().unwrap();
    assert!(!fixture.agent.has("c", "e"), "the guest is made to forget it");
}

#[tokio::test]
async fn exec_that_the_guest_makes_too_late_is_killed() {
    let fixture = pod().await;
    fixture.agent.hold("Exec");
    let (exec, _) = fixture.exec("e");
    let start = fixture.start("e");
    fixture.agent.called("Exec c/e", 1).await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(61)).await;
    assert_eq!(start.await.unwrap().unwrap_err().code(), ttrpc::Code::DEADLINE_EXCEEDED);
    assert_eq!(exec.status(), Status::STOPPED);
    tokio::time::resume();
    fixture.agent.release("Exec");
    fixture.agent.called("SignalProcess c/e 9", 1).await;
    fixture.agent.called("DeleteProcess c/e", 1).await;
}
