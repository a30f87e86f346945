//! Calls of containerd's on a pod whose VM and agent are fakes ([`crate::sandbox::fake`]).

mod volumes;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::TaskExit;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Events, create_events};
use containerd_shim_protos::types::task::Status;
use futures::FutureExt;
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use ttrpc::asynchronous::{Server, TtrpcContext};

use super::hooks::ContainerHooks;
use super::*;
use crate::io::Stdio;
use crate::sandbox::agent::ProcessKey;
use crate::sandbox::fake::FakeAgent;
use crate::sandbox::record;
use crate::share::Share;
use crate::share::tests::{in_mount_namespace, jail_of};
use crate::sizing::Limits;
use crate::spec::HostHooks;

/// A pod with a running container, `c`.
struct Fixture {
    pod: Arc<Pod>,
    sandbox: Arc<Sandbox>,
    agent: Arc<FakeAgent>,
    _dir: Option<tempfile::TempDir>,
}

async fn pod() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let fixture = pod_in(dir.path()).await;
    Fixture { _dir: Some(dir), ..fixture }
}

async fn pod_in(dir: &Path) -> Fixture {
    pod_that_tells(dir, None).await
}

async fn pod_that_tells(dir: &Path, events: Option<String>) -> Fixture {
    let (publisher, _) = Publisher::start("k8s.io".into(), events);
    let endpoint = Arc::new(Endpoint::new(dir.join("socket")));
    std::fs::write(endpoint.socket(), "").unwrap();
    std::fs::write(endpoint.record(), "").unwrap();
    let run_dir = RunDir::new(&dir.join("run"), "k8s.io", "s");
    let identity = PodIdentity { sandbox_id: "s".into(), run_dir, endpoint };
    let pod = Arc::new(Pod::new(identity, publisher, Keeper::start().unwrap()));
    let (sandbox, agent) = Sandbox::fake(dir).await;
    *pod.sandbox_slot() = Some(sandbox.clone());
    let fixture = Fixture { pod, sandbox, agent, _dir: None };
    fixture.agent.run("c", "");
    fixture.add("c", Kind::Member).init.set_status(Status::RUNNING);
    fixture
}

/// The same, with a VMM that is locked into its share.
async fn pod_that_mounts(dir: &Path) -> Fixture {
    let fixture = pod_in(dir).await;
    let run = &fixture.pod.identity.run_dir;
    Share::create(run).unwrap();
    fixture.sandbox.share.is_jail_of(jail_of(run));
    fixture
}

/// containerd's end of the events: passes on what comes.
struct Listener(mpsc::UnboundedSender<Envelope>);

#[async_trait]
impl Events for Listener {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let _ = self.0.send(request.envelope.unwrap());
        Ok(Empty::new())
    }
}

/// Listens to events on a socket, as long as the server is kept.
async fn listen(socket: &Path) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
    let (tell, told) = mpsc::unbounded_channel();
    let mut server = Server::new().bind(&format!("unix://{}", socket.display())).unwrap();
    server = server.register_service(create_events(Arc::new(Listener(tell))));
    server.start().await.unwrap();
    (server, told)
}

fn creation() -> Deadline {
    Deadline::begin(Operation::CreateContainer)
}

/// Runs a test that mounts.
fn with_mounts<F: Future<Output = ()>>(test: impl FnOnce(PathBuf) -> F + Send + 'static) {
    in_mount_namespace(|dir| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(dir.to_path_buf()));
    });
}

/// The bundle of a container whose creation waits for us at its end, in a hook.
struct SlowBundle {
    path: PathBuf,
    begun: pipe::Receiver,
    go_on: pipe::Sender,
}

impl SlowBundle {
    fn new(path: PathBuf) -> Self {
        std::fs::create_dir_all(path.join("rootfs")).unwrap();
        let fifo = |name: &str| {
            mknodat(CWD, path.join(name), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            path.join(name)
        };
        let (begun, go_on) = (fifo("begun"), fifo("go-on"));
        let hook = serde_json::json!({ "path": "/bin/sh", "args": ["sh", "-c", "echo > begun; read line < go-on"] });
        let spec = serde_json::json!({
            "ociVersion": "1.1.0",
            "root": { "path": "rootfs" },
            "process": { "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "annotations": {
                "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s",
            },
            "hooks": { "createRuntime": [hook] },
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] },
        });
        std::fs::write(path.join("config.json"), spec.to_string()).unwrap();
        Self {
            path,
            begun: pipe::OpenOptions::new().read_write(true).open_receiver(begun).unwrap(),
            go_on: pipe::OpenOptions::new().read_write(true).open_sender(go_on).unwrap(),
        }
    }

    fn task(&self, id: &str) -> CreateTask {
        CreateTask { id: id.into(), bundle: self.path.clone(), ..CreateTask::default() }
    }

    /// Returns when everything but the hook is done.
    async fn begun(&mut self) {
        self.begun.read_u8().await.unwrap();
    }

    async fn go_on(&mut self) {
        self.go_on.write_all(b"\n").await.unwrap();
    }
}

impl Fixture {
    /// Has a created container.
    fn add(&self, id: &str, kind: Kind) -> Arc<Container> {
        let init = Process::new(ProcessKey { container: id.into(), exec: String::new() }, Stdio::default());
        init.assign_pid(&self.pod.keeper, &[]).unwrap();
        let spec = oci_spec::runtime::Spec::default();
        let hooks = ContainerHooks::new(HostHooks::default(), &spec, id, Path::new("/"));
        let container = Arc::new(Container::new(id.into(), kind, "/".into(), Arc::new(init), hooks));
        self.pod.containers().insert(id.into(), container.clone());
        self.pod.watch_init(container.clone(), self.sandbox.clone());
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
        tokio::spawn(self.pod.clone().start(Deadline::begin(Operation::StartContainer), "c".into(), exec.into()))
    }

    fn kill(&self, exec: &str) -> JoinHandle<Result<(), TaskError>> {
        tokio::spawn(self.pod.clone().kill(Deadline::begin(Operation::Kill), "c".into(), exec.into(), 9, false))
    }

    fn delete(&self, id: &str, exec: &str) -> JoinHandle<Result<end::Deleted, TaskError>> {
        tokio::spawn(self.pod.clone().delete(Deadline::begin(Operation::Delete), id.into(), exec.into()))
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
async fn exec_that_the_guest_leaves_running_ends_with_its_containers_deletion() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("events");
    let (_server, mut told) = listen(&socket).await;
    let fixture = pod_that_tells(dir.path(), Some(socket.display().to_string())).await;
    let (exec, waiter) = fixture.exec("e");
    fixture.start("e").await.unwrap().unwrap();
    fixture.kill("").await.unwrap().unwrap();
    fixture.pod.process("c", "").unwrap().wait().await;
    assert_eq!(exec.status(), Status::RUNNING);
    fixture.agent.hold("WaitProcess");
    fixture.delete("c", "").await.unwrap().unwrap();
    assert_eq!(waiter.now_or_never().expect("the exec goes on").unwrap().code, 137);
    assert!(!exec.holds_pid());
    let mut topics = Vec::new();
    while topics.last().is_none_or(|topic| topic != "/tasks/delete") {
        let Envelope { topic, event, .. } = told.recv().await.unwrap();
        if topic == "/tasks/exit" {
            topics.push(TaskExit::parse_from_bytes(&event.value).unwrap().id);
        }
        topics.push(topic);
    }
    let expected =
        ["/tasks/exec-added", "/tasks/exec-started", "c", "/tasks/exit", "e", "/tasks/exit", "/tasks/delete"];
    assert_eq!(topics, expected);
    // Nobody follows it any more.
    let gone = Arc::downgrade(&exec);
    drop(exec);
    tokio::task::yield_now().await;
    assert_eq!(gone.strong_count(), 0);
}

#[tokio::test]
async fn exec_whose_container_is_deleted_while_it_is_started_does_not_come_to_be() {
    let fixture = pod().await;
    fixture.agent.hold("Exec");
    let (_, waiter) = fixture.exec("e");
    let start = fixture.start("e");
    fixture.agent.called("Exec c/e", 1).await;
    fixture.kill("").await.unwrap().unwrap();
    fixture.pod.process("c", "").unwrap().wait().await;
    fixture.delete("c", "").await.unwrap().unwrap();
    assert_eq!(waiter.await.unwrap().code, 137);
    fixture.agent.release("Exec");
    assert!(matches!(start.await.unwrap(), Err(TaskError::State { what: "start", .. })));
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

#[tokio::test]
async fn process_whose_vm_has_ended_cannot_be_killed_because_it_has_finished() {
    let fixture = pod().await;
    let init = fixture.pod.process("c", "").unwrap();
    // Its end cannot be recorded meanwhile.
    let _order = init.order.lock().await;
    fixture.sandbox.vm.kill().await;
    assert!(matches!(fixture.kill("").await.unwrap(), Err(TaskError::Finished)));
    fixture.pod.teardown().await;
    assert!(matches!(fixture.kill("").await.unwrap(), Err(TaskError::Finished)));
    assert_eq!((init.status(), TaskError::Finished.code()), (Status::RUNNING, ttrpc::Code::NOT_FOUND));
}

#[tokio::test]
async fn exec_whose_end_the_guest_does_not_tell_after_sigkill_is_waited_for_no_longer() {
    let fixture = pod().await;
    fixture.agent.hold("WaitProcess");
    let (_, waiter) = fixture.exec("e");
    fixture.start("e").await.unwrap().unwrap();
    fixture.kill("e").await.unwrap().unwrap();
    assert!(!waiter.is_finished() && !fixture.sandbox.vm.has_ended());
    tokio::task::yield_now().await;
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(61)).await;
    tokio::time::resume();
    let exit = tokio::time::timeout(Duration::from_secs(10), waiter).await.expect("the exec goes on");
    assert_eq!(exit.unwrap().code, 137);
    fixture.delete("c", "e").await.unwrap().unwrap();
    assert!(!fixture.sandbox.vm.has_ended(), "the pod goes on");
}

#[tokio::test]
async fn update_that_the_guest_draws_out_ends_before_the_kubelet_gives_up() {
    let fixture = pod().await;
    let agent = &fixture.agent;
    let pass = async |seconds| {
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(seconds)).await;
        tokio::time::resume();
    };
    let deadline = Deadline::begin(Operation::Update);
    fixture.sandbox.make_room(deadline, "c", Limits::default()).await.unwrap();
    agent.hold("ResizeGuest");
    agent.hold("UpdateContainer");
    let cpus = br#"{ "cpu": { "quota": 600000, "period": 100000 } }"#;
    let update =
        tokio::spawn(fixture.pod.clone().update(Deadline::begin(Operation::Update), "c".into(), cpus.to_vec()));
    agent.called("ResizeGuest ", 1).await;
    pass(50).await;
    agent.release("ResizeGuest");
    agent.called("UpdateContainer c", 1).await;
    agent.hold("ResizeGuest");
    // It fails, and the guest is to be as small as it was.
    pass(21).await;
    agent.called("ResizeGuest ", 2).await;
    assert!(!update.is_finished());
    pass(30).await;
    let update = tokio::time::timeout(Duration::from_secs(10), update).await.expect("the update is still waiting");
    assert_eq!(update.unwrap().unwrap_err().code(), ttrpc::Code::DEADLINE_EXCEEDED);
}

#[test]
fn container_that_is_deleted_while_it_is_created_does_not_come_to_be() {
    with_mounts(async |dir| {
        let fixture = pod_that_mounts(&dir).await;
        let mut bundle = SlowBundle::new(dir.join("bundle"));
        let create = tokio::spawn(fixture.pod.clone().create(creation(), bundle.task("late")));
        bundle.begun().await;
        let second = fixture.pod.clone().create(creation(), bundle.task("late")).await;
        assert_eq!(second.unwrap_err().code(), ttrpc::Code::ALREADY_EXISTS);
        assert_eq!(fixture.delete("late", "").await.unwrap().unwrap_err().code(), ttrpc::Code::NOT_FOUND);
        bundle.go_on().await;
        assert!(matches!(create.await.unwrap(), Err(TaskError::Deleted(_))));
        assert!(fixture.pod.container("late").is_err() && !fixture.agent.has("late", ""));
        assert_eq!(fixture.sandbox.limits("late"), Limits::default());
        assert!(!fixture.pod.identity.run_dir.share().join("late").exists());
        // Its id is free again.
        let create = tokio::spawn(fixture.pod.clone().create(creation(), bundle.task("late")));
        bundle.begun().await;
        bundle.go_on().await;
        create.await.unwrap().unwrap();
    });
}

#[test]
fn container_whose_vm_ends_while_it_is_created_can_be_deleted() {
    with_mounts(async |dir| {
        let fixture = pod_that_mounts(&dir).await;
        let mut bundle = SlowBundle::new(dir.join("bundle"));
        let create = tokio::spawn(fixture.pod.clone().create(creation(), bundle.task("late")));
        bundle.begun().await;
        fixture.sandbox.vm.kill().await;
        fixture.pod.teardown().await;
        bundle.go_on().await;
        create.await.unwrap().unwrap();
        assert_eq!(fixture.delete("late", "").await.unwrap().unwrap().exit.code, 137);
    });
}

#[tokio::test]
async fn sandbox_that_is_stopped_while_it_boots_has_no_vm() {
    let fixture = pod().await;
    let pod = &fixture.pod;
    *pod.sandbox_slot() = None;
    pod.clone().create_sandbox(Deadline::begin(Operation::CreateSandbox), CreateSandbox::default()).await.unwrap();
    pod.clone().stop_sandbox(Deadline::begin(Operation::StopSandbox)).await.unwrap();
    assert_eq!(pod.wait_sandbox().await.unwrap().code, 137);
    *pod.sandbox_slot() = Some(fixture.sandbox.clone());
    let booted = pod.sandbox_booted(&pod.api_sandbox().unwrap(), fixture.sandbox.clone()).await;
    assert_eq!(booted.unwrap_err().code(), ttrpc::Code::FAILED_PRECONDITION);
    assert!(fixture.sandbox.vm.has_ended() && pod.sandbox_slot().is_none());
}

#[tokio::test]
async fn end_of_the_daemon_takes_along_what_is_being_booted_and_lets_nothing_boot_after() {
    let fixture = pod().await;
    let pod = fixture.pod.clone();
    let booted = pod.sandbox_slot().take();
    let gate = pod.gate.lock().await;
    let end = tokio::spawn({
        let pod = pod.clone();
        async move { pod.end().await }
    });
    tokio::task::yield_now().await;
    assert!(!end.is_finished());
    *pod.sandbox_slot() = booted;
    drop(gate);
    end.await.unwrap();
    assert!(fixture.sandbox.vm.has_ended() && pod.gate.try_lock().is_err());
}

#[tokio::test]
async fn boot_that_takes_long_when_the_daemon_is_to_end_is_cut_short() {
    let fixture = pod().await;
    let pod = fixture.pod.clone();
    *pod.sandbox_slot() = None;
    pod.identity.run_dir.create().unwrap();
    record(&pod.identity.run_dir.vmm_pid(), fixture.sandbox.vm.pid());
    let limit = Operation::FinishBoot.budget();
    let gate = pod.gate.lock().await;
    let boot = async {
        fixture.sandbox.vm.ended().await;
        drop(gate);
    };
    let end = async {
        let end = pod.end();
        tokio::pin!(end);
        assert!(end.as_mut().now_or_never().is_none());
        tokio::time::pause();
        tokio::time::advance(limit).await;
        tokio::time::resume();
        end.await;
    };
    let both = async { tokio::join!(boot, end) };
    tokio::time::timeout(limit + Duration::from_secs(10), both).await.expect("the boot goes on");
}

#[tokio::test]
async fn daemon_that_was_asked_to_end_with_its_sandbox_ends_with_the_last_member() {
    for asked in [true, false] {
        let fixture = pod().await;
        let (pod, endpoint) = (&fixture.pod, &fixture.pod.identity.endpoint);
        fixture.add("s", Kind::Sandbox);
        pod.shutdown();
        assert!(endpoint.record().exists(), "there is a VM");
        fixture.sandbox.vm.kill().await;
        for id in ["s", "c"] {
            pod.process(id, "").unwrap().wait().await;
        }
        fixture.delete("s", "").await.unwrap().unwrap();
        if asked {
            pod.shutdown();
        }
        assert_eq!(endpoint.record().exists(), !asked, "delete must not kill it");
        assert!(endpoint.socket().exists() && pod.finished().now_or_never().is_none());
        fixture.delete("c", "").await.unwrap().unwrap();
        assert_eq!(pod.finished().now_or_never().is_some(), asked);
        assert_eq!(endpoint.socket().exists(), !asked);
    }
}

#[test]
fn container_and_pod_are_removed_while_other_calls_wait_for_the_hosts_file_systems() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
    let (answer, hung) = std::sync::mpsc::channel::<()>();
    runtime.block_on(async {
        let fixture = pod().await;
        tokio::task::spawn_blocking(move || hung.recv());
        fixture.kill("").await.unwrap().unwrap();
        let removed = async {
            fixture.pod.process("c", "").unwrap().wait().await;
            fixture.delete("c", "").await.unwrap().unwrap();
            fixture.sandbox.vm.kill().await;
            fixture.pod.teardown().await;
        };
        tokio::time::timeout(Duration::from_secs(30), removed).await.unwrap();
    });
    drop(answer);
}

#[tokio::test]
async fn who_asks_for_a_container_that_is_being_created_waits_for_the_outcome() {
    let Fixture { pod, .. } = &pod().await;
    pod.creating().insert("new".into(), watch::channel(false).0);
    let settled = pod.created_or_not("new");
    tokio::pin!(settled);
    assert!(settled.as_mut().now_or_never().is_none());
    assert!(pod.created_or_not("c").now_or_never().is_some(), "a container that is there is not waited for");
    // A deletion decides it, but it is over when Create is.
    pod.creating().get("new").unwrap().send_replace(true);
    assert!(settled.as_mut().now_or_never().is_none());
    pod.creating().remove("new");
    settled.await;
}

#[tokio::test]
async fn counters_are_the_vmms() {
    let fixture = pod().await;
    let counters = fixture.pod.counters(Deadline::begin(Operation::Counters)).await.unwrap();
    assert_eq!(counters.iter().map(|device| device.kicks).collect::<Vec<_>>(), [7]);
}
