//! The shim contract as each containerd and CRI-O holds a runtime to it, without any of them: a test client runs the shim's
//! binary and speaks to it (see [`bulkhead_e2e::shim`]).

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::processes::Processes;
use bulkhead_e2e::shim::{Caller, Code, Host, Output, Shim, code};
use bulkhead_e2e::{Netns, on_node};
use containerd_shim_protos::api;
use containerd_shim_protos::sandbox_api as sandbox;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::{BOOT_ID, node_boot_id};

/// Bulkhead's shim.
pub const SHIM: &str = "containerd-shim-bulkhead-v2";

/// A pod of the test client.
pub struct Contract {
    pub host: Host,
    pub netns: Netns,
    pub sandbox: &'static str,
}

impl Contract {
    pub async fn new(caller: Caller) -> Result<Self> {
        Ok(Self { host: Host::new(caller, SHIM).await?, netns: Netns::new("contract")?, sandbox: "contract-pod" })
    }

    /// The sandbox's pid is one whose network namespace is the pod's: containerd makes paths from it.
    fn check_pid(&self, pid: u32) -> Result<()> {
        let of_pid = std::fs::read_link(format!("/proc/{pid}/ns/net")).context("the sandbox's pid is not in /proc")?;
        ensure!(of_pid == self.netns.link()?, "pid {pid} is in {of_pid:?}");
        Ok(())
    }

    /// Makes the pod as a task of its own.
    pub async fn pod_by_task(&self) -> Result<(Shim, u32)> {
        self.pod_with_output("").await
    }

    /// The same with a path for what its process would say.
    pub async fn pod_with_output(&self, stdout: &str) -> Result<(Shim, u32)> {
        let bundle = self.host.sandbox_bundle(self.sandbox, self.netns.path())?;
        self.start_pod(&bundle, stdout).await
    }

    /// Makes and starts the pod of a bundle.
    pub async fn start_pod(&self, bundle: &std::path::Path, stdout: &str) -> Result<(Shim, u32)> {
        let (version, shim) = self.host.start(self.sandbox).await?;
        ensure!(version == self.host.caller.version(), "{:?} was answered with {version}", self.host.caller);
        let request = api::CreateTaskRequest {
            id: self.sandbox.into(),
            bundle: bundle.display().to_string(),
            stdout: stdout.to_owned(),
            ..Default::default()
        };
        let created: api::CreateTaskResponse = shim.task("Create", &request).await?;
        self.check_pid(created.pid)?;
        let _: api::StartResponse = shim.task("Start", &start(self.sandbox, "")).await?;
        Ok((shim, created.pid))
    }

    /// Makes and starts a container of the pod whose streams nobody reads; answers its bundle.
    pub async fn container(&self, shim: &Shim, pid: u32, id: &str, script: &str) -> Result<std::path::PathBuf> {
        let bundle = self.host.container_bundle(id, self.sandbox, pid, script)?;
        self.host.start(id).await?;
        let create =
            api::CreateTaskRequest { id: id.into(), bundle: bundle.display().to_string(), ..Default::default() };
        let _: api::CreateTaskResponse = shim.task("Create", &create).await?;
        let _: api::StartResponse = shim.task("Start", &start(id, "")).await?;
        Ok(bundle)
    }

    /// Runs a container from its bundle to its bundle's end, with everything that containerd asks on the way.
    async fn whole_container(&self, pod: &Shim, sandbox_pid: u32) -> Result<()> {
        let (host, id) = (&self.host, "contract-main");
        let script = format!("{BOOT_ID}; trap 'exit 7' TERM; while :; do sleep 1; done");
        let bundle = host.container_bundle(id, self.sandbox, sandbox_pid, &script)?;
        // By version 2 a container's shim is asked for; by version 3 its pod's is known.
        let shim = if host.caller.version() == 2 { host.start(id).await?.1 } else { pod.clone() };
        let output = Output::new(host.path("out"))?;
        let request = api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            stdout: output.path(),
            ..Default::default()
        };
        let created: api::CreateTaskResponse = shim.task("Create", &request).await?;
        let started: api::StartResponse = shim.task("Start", &start(id, "")).await?;
        ensure!(created.pid == started.pid && created.pid != sandbox_pid, "{created:?} {started:?}");
        ensure!(std::path::Path::new(&format!("/proc/{}/ns/pid", created.pid)).exists(), "no such pid: {created:?}");
        let connected: api::ConnectResponse = shim.task("Connect", &connect(id)).await?;
        ensure!(connected.task_pid == created.pid && connected.shim_pid != 0, "{connected:?}");
        self.whole_exec(&shim, id).await?;
        let numbers: api::StatsResponse = shim.task("Stats", &stats(id)).await?;
        ensure!(numbers.stats.type_url == "io.containerd.cgroups.v2.Metrics", "{numbers:?}");
        let _: api::Empty = shim.task("Kill", &kill(id, 15)).await?;
        let ended: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
        ensure!(ended.exit_status == 7, "{ended:?}");
        let numbers = shim.task::<api::StatsResponse>("Stats", &stats(id)).await;
        ensure!(code(&numbers) == Code::OK, "no numbers between exit and Delete: {numbers:?}");
        let deleted: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
        ensure!(deleted.exit_status == 7 && deleted.pid == created.pid, "{deleted:?}");
        let text = output.to_end().await?;
        ensure!(text.trim().len() == 36 && text.trim() != node_boot_id()?, "not in a guest: {text}");
        if host.caller != Caller::CriO {
            let expected = ["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"];
            let topics = host.events.next(expected.len()).await?;
            ensure!(topics == expected.map(|name| format!("/tasks/{name}")), "{topics:?}");
        }
        // The daemon is the pod's and stays.
        let _: api::Empty = shim.task("Shutdown", &shutdown(id)).await?;
        ensure!(code(&pod.task::<api::ConnectResponse>("Connect", &connect(id)).await) == Code::OK, "the shim is gone");
        ensure!(host.delete(id)?.exit_status == 137, "delete of a container that is gone");
        Ok(())
    }

    async fn whole_exec(&self, shim: &Shim, id: &str) -> Result<()> {
        let output = Output::new(self.host.path("exec-out"))?;
        let request = exec(id, "probe", "echo from-exec; exit 5", &output.path());
        let _: api::Empty = shim.task("Exec", &request).await?;
        let started: api::StartResponse = shim.task("Start", &start(id, "probe")).await?;
        ensure!(started.pid != 0, "{started:?}");
        let ended: api::WaitResponse = shim.task("Wait", &wait(id, "probe")).await?;
        let deleted: api::DeleteResponse = shim.task("Delete", &delete(id, "probe")).await?;
        ensure!(ended.exit_status == 5 && deleted.exit_status == 5, "{ended:?} {deleted:?}");
        let text = output.to_end().await?;
        ensure!(text == "from-exec\n", "{text:?}");
        Ok(())
    }

    async fn whole_pod_by_task(self) -> Result<()> {
        let (shim, pid) = self.pod_by_task().await?;
        if self.host.caller != Caller::CriO {
            ensure!(self.host.events.next(2).await? == ["/tasks/create", "/tasks/start"], "the sandbox's events");
        }
        self.whole_container(&shim, pid).await?;
        self.end_by_task(&shim).await
    }

    pub async fn end_by_task(&self, shim: &Shim) -> Result<()> {
        let _: api::Empty = shim.task("Kill", &kill(self.sandbox, 9)).await?;
        let ended: api::WaitResponse = shim.task("Wait", &wait(self.sandbox, "")).await?;
        ensure!(ended.exit_status == 137, "{ended:?}");
        let _: api::DeleteResponse = shim.task("Delete", &delete(self.sandbox, "")).await?;
        let _: api::Empty = shim.task("Shutdown", &shutdown(self.sandbox)).await?;
        ensure!(self.host.delete(self.sandbox)?.exit_status == 137, "delete of a pod that is gone");
        Ok(())
    }
}

pub fn start(id: &str, exec_id: &str) -> api::StartRequest {
    api::StartRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}

pub fn wait(id: &str, exec_id: &str) -> api::WaitRequest {
    api::WaitRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}

pub fn delete(id: &str, exec_id: &str) -> api::DeleteRequest {
    api::DeleteRequest { id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}

pub fn kill(id: &str, signal: u32) -> api::KillRequest {
    api::KillRequest { id: id.into(), signal, ..Default::default() }
}

pub fn stats(id: &str) -> api::StatsRequest {
    api::StatsRequest { id: id.into(), ..Default::default() }
}

pub fn connect(id: &str) -> api::ConnectRequest {
    api::ConnectRequest { id: id.into(), ..Default::default() }
}

pub fn shutdown(id: &str) -> api::ShutdownRequest {
    api::ShutdownRequest { id: id.into(), ..Default::default() }
}

pub fn exec(id: &str, exec_id: &str, script: &str, stdout: &str) -> api::ExecProcessRequest {
    api::ExecProcessRequest {
        id: id.into(),
        exec_id: exec_id.into(),
        stdout: stdout.into(),
        spec: MessageField::some(bulkhead_e2e::shim::process(script)),
        ..Default::default()
    }
}

#[test]
fn pod_of_containerd_1_6() {
    on_node(async |_| Contract::new(Caller::Containerd1_6).await?.whole_pod_by_task().await);
}

#[test]
fn pod_of_containerd_1_7() {
    on_node(async |_| Contract::new(Caller::Containerd1_7).await?.whole_pod_by_task().await);
}

#[test]
fn pod_of_containerd_2_1() {
    on_node(async |_| Contract::new(Caller::Containerd2_1).await?.whole_pod_by_task().await);
}

#[test]
fn pod_of_containerd_2_3() {
    on_node(async |_| Contract::new(Caller::Containerd2_3).await?.whole_pod_by_task().await);
}

#[test]
fn pod_of_crio() {
    on_node(async |_| Contract::new(Caller::CriO).await?.whole_pod_by_task().await);
}

/// The kernel kills an exec with its container's init; containerd must learn of the exec's end first, though its output
/// is still on the way.
#[test]
fn exec_that_its_containers_init_takes_along_ends_before_it() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd1_6).await?;
        let (shim, pid) = contract.pod_by_task().await?;
        let (host, id) = (&contract.host, "contract-order");
        contract.container(&shim, pid, id, "while :; do sleep 3600; done").await?;
        // More than all the pipes take, so that the exec's end waits for who reads it.
        let output = Output::new(host.path("exec-out"))?;
        let script = "exec cat /dev/zero";
        let _: api::Empty = shim.task("Exec", &exec(id, "taken", script, &output.path())).await?;
        let _: api::StartResponse = shim.task("Start", &start(id, "taken")).await?;
        let topics = host.events.next(6).await?;
        ensure!(topics.last().is_some_and(|topic| topic == "/tasks/exec-started"), "{topics:?}");
        output.begun().await?;
        let _: api::Empty = shim.task("Kill", &kill(id, 9)).await?;
        while processes(&shim, id).await? > 0 {}
        output.to_end().await?;
        let exits = host.events.next_exits(2).await?;
        let exits: Vec<_> = exits.iter().map(|exit| (&*exit.container_id, &*exit.id, exit.exit_status)).collect();
        ensure!(exits == [(id, "taken", 137), (id, id, 137)], "{exits:?}");
        let _: api::DeleteResponse = shim.task("Delete", &delete(id, "taken")).await?;
        let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
        host.delete(id)?;
        contract.end_by_task(&shim).await
    });
}

/// What an exec leaves behind has its stdout: a daemon that a probe starts, say. Its end is told nevertheless, with all that
/// had been written before; and what comes later goes on to be copied as long as somebody reads it.
#[test]
fn end_of_an_exec_is_told_at_once_whoever_else_has_its_stdout() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd1_6).await?;
        let (shim, pid) = contract.pod_by_task().await?;
        let (host, id) = (&contract.host, "contract-left");
        contract.container(&shim, pid, id, "while :; do sleep 3600; done").await?;
        let output = Output::new(host.path("left-out"))?;
        let script = "(until [ -e /tmp/go ]; do sleep 0.1; done; echo after) & echo before; exit 3";
        let _: api::Empty = shim.task("Exec", &exec(id, "parent", script, &output.path())).await?;
        let _: api::StartResponse = shim.task("Start", &start(id, "parent")).await?;
        let begun = std::time::Instant::now();
        let ended: api::WaitResponse = shim.task("Wait", &wait(id, "parent")).await?;
        // A probe's usual patience is less; the end itself takes milliseconds, and an emulated node fifty times as long.
        ensure!(ended.exit_status == 3 && begun.elapsed().as_secs() < 4, "{ended:?} after {:?}", begun.elapsed());
        // Longer than a stream is waited for of which the guest does not say how much is in it.
        let quiet = Output::new(host.path("quiet-out"))?;
        let _: api::Empty = shim.task("Exec", &exec(id, "go", "sleep 6; true > /tmp/go", &quiet.path())).await?;
        let _: api::StartResponse = shim.task("Start", &start(id, "go")).await?;
        let text = output.to_end().await?;
        ensure!(text == "before\nafter\n", "{text:?}");
        for exec in ["go", "parent"] {
            let _: api::WaitResponse = shim.task("Wait", &wait(id, exec)).await?;
            let _: api::DeleteResponse = shim.task("Delete", &delete(id, exec)).await?;
        }
        let _: api::Empty = shim.task("Kill", &kill(id, 9)).await?;
        let _: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
        let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
        host.delete(id)?;
        contract.end_by_task(&shim).await
    });
}

/// How many processes a container has, as its guest counts them.
async fn processes(shim: &Shim, id: &str) -> Result<u64> {
    let numbers: api::StatsResponse = shim.task("Stats", &stats(id)).await?;
    let numbers = containerd_shim_protos::cgroups_v2::metrics::Metrics::parse_from_bytes(&numbers.stats.value)?;
    Ok(numbers.pids.current)
}

/// A daemon lives as long as its pod; what containerd has open when it runs `start` is not the daemon's to hold.
#[test]
fn hostile_19_descriptors_of_who_starts_a_shim_are_neither_its_daemons_nor_its_vmms() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd1_6).await?;
        let leaked = contract.host.path("leaked");
        let file = std::fs::File::create_new(&leaked)?;
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?;
        let number = std::os::fd::AsRawFd::as_raw_fd(&file);
        let of_child = bulkhead_e2e::node_command("readlink", &[&format!("/proc/self/fd/{number}")])?;
        ensure!(std::path::Path::new(of_child.trim()) == leaked, "nothing leaks: {of_child}");
        let (shim, _) = contract.pod_by_task().await?;
        drop(file);
        let connected: api::ConnectResponse = shim.task("Connect", &connect(contract.sandbox)).await?;
        for pid in [connected.shim_pid, Processes::of_sandbox(contract.sandbox)?.vmm] {
            let open = std::fs::read_dir(format!("/proc/{pid}/fd")).with_context(|| format!("no process {pid}"))?;
            let open: Vec<_> = open.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect();
            ensure!(open.len() > 3 && !open.contains(&leaked), "process {pid} has {open:?}");
        }
        contract.end_by_task(&shim).await
    });
}

/// containerd 2.x asks once, before any pod, and turns on what is listed (containerd: core/runtime/v2, PluginInfo).
#[test]
fn info_is_told_without_a_pod() {
    on_node(async |_| {
        let answer = std::process::Command::new(SHIM).arg("-info").stdin(std::process::Stdio::null()).output()?;
        ensure!(answer.status.success() && answer.stderr.is_empty(), "{answer:?}");
        let info = RuntimeInfo::parse_from_bytes(&answer.stdout)?;
        ensure!(info.name == "io.containerd.bulkhead.v2" && !info.version.version.is_empty(), "{info}");
        ensure!(info.features.type_url.ends_with("/opencontainers/runtime-spec/1/features/Features"), "{info}");
        let features: serde_json::Value = serde_json::from_slice(&info.features.value)?;
        let lists = |list: &str, name: &str| features.pointer(list).is_some_and(|list| has(list, name));
        ensure!(lists("/mountOptions", "rro") && lists("/linux/namespaces", "pid"), "{features}");
        ensure!(lists("/linux/namespaces", "user") && features["linux"]["seccomp"]["enabled"] == true, "{features}");
        ensure!(!lists("/linux/namespaces", "time") && features["linux"]["selinux"]["enabled"] == false, "{features}");
        Ok(())
    });
}

fn has(list: &serde_json::Value, name: &str) -> bool {
    list.as_array().is_some_and(|list| list.iter().any(|one| one == name))
}

/// The kinds of hooks that run on the host, in their order.
const HOOKS: [&str; 4] = ["prestart", "createRuntime", "poststart", "poststop"];

/// What hooks of a bundle have left: which of them have run, and the state that the last one of a name was given.
struct HookNotes(std::path::PathBuf);

impl HookNotes {
    /// Gives a bundle hooks that take notes in a directory of their own.
    fn plant(bundle: &std::path::Path, directory: std::path::PathBuf) -> Result<Self> {
        std::fs::create_dir(&directory)?;
        let config = bundle.join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&config)?)?;
        for name in HOOKS {
            let script = format!("cd {}; echo {name} >> order; cat > {name}", directory.display());
            spec["hooks"][name] = serde_json::json!([{ "path": "/bin/sh", "args": ["sh", "-c", script] }]);
        }
        std::fs::write(config, spec.to_string())?;
        Ok(Self(directory))
    }

    /// Those that have run are the first ones, and the last of them was told this.
    fn check(&self, count: usize, id: &str, status: &str, pid: Option<u32>) -> Result<()> {
        let order = std::fs::read_to_string(self.0.join("order")).unwrap_or_default();
        ensure!(order.lines().eq(HOOKS.into_iter().take(count)), "of {id} have run {order:?}, expected {count}");
        let name = HOOKS[..count].last().context("no hook")?;
        let state: serde_json::Value = serde_json::from_slice(&std::fs::read(self.0.join(name))?)?;
        let told = state["pid"].as_u64();
        ensure!(state["id"] == id && state["status"] == status && told == pid.map(u64::from), "{name}: {state}");
        ensure!(state["ociVersion"] == "1.1.0" && state["annotations"].is_object(), "{name}: {state}");
        let bundle = state["bundle"].as_str().context("no bundle")?;
        ensure!(bundle.ends_with(id), "{name}: {state}");
        Ok(())
    }
}

#[test]
fn hooks_of_bundles_run_on_the_host_when_the_runtime_specification_says() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd1_6).await?;
        let (host, pod, id) = (&contract.host, contract.sandbox, "contract-hooks");
        let bundle = host.sandbox_bundle(pod, contract.netns.path())?;
        let of_pod = HookNotes::plant(&bundle, host.path("pod-hooks"))?;
        let shim = host.start(pod).await?.1;
        let create = |id: &str, bundle: std::path::PathBuf| api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            ..Default::default()
        };
        let sandbox: api::CreateTaskResponse = shim.task("Create", &create(pod, bundle)).await?;
        of_pod.check(2, pod, "created", Some(sandbox.pid))?;
        let _: api::StartResponse = shim.task("Start", &start(pod, "")).await?;
        of_pod.check(3, pod, "running", Some(sandbox.pid))?;

        let bundle = host.container_bundle(id, pod, sandbox.pid, "exit 0")?;
        let of_container = HookNotes::plant(&bundle, host.path("container-hooks"))?;
        host.start(id).await?;
        let created: api::CreateTaskResponse = shim.task("Create", &create(id, bundle)).await?;
        of_container.check(2, id, "created", Some(created.pid))?;
        let _: api::StartResponse = shim.task("Start", &start(id, "")).await?;
        of_container.check(3, id, "running", Some(created.pid))?;
        let _: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
        // Deleted is more than ended.
        of_container.check(3, id, "running", Some(created.pid))?;
        let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
        of_container.check(4, id, "stopped", None)?;
        host.delete(id)?;
        contract.end_by_task(&shim).await?;
        of_pod.check(4, pod, "stopped", None)
    });
}

/// The pod as the CRI describes it, in the CRI's own types.
fn pod_config() -> Any {
    use prost::Message as _;
    let config = v1::PodSandboxConfig {
        hostname: "by-api".into(),
        dns_config: Some(v1::DnsConfig { servers: vec!["10.9.8.7".into()], ..Default::default() }),
        linux: Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: "/contract".into(),
            sysctls: [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let type_url = "runtime.v1.PodSandboxConfig".to_owned();
    Any { type_url, value: config.encode_to_vec(), ..Any::default() }
}

impl Contract {
    /// Makes the pod by the Sandbox API.
    async fn pod_by_api(&self) -> Result<(Shim, u32)> {
        let id = || self.sandbox.to_owned();
        let bundle = self.host.empty_bundle(self.sandbox)?;
        let (_, shim) = self.host.start(self.sandbox).await?;
        let early = sandbox::StartSandboxRequest { sandbox_id: id(), ..Default::default() };
        let early = shim.sandbox::<sandbox::StartSandboxResponse>("StartSandbox", &early).await;
        ensure!(code(&early) == Code::NOT_FOUND, "{early:?}");
        let request = sandbox::CreateSandboxRequest {
            sandbox_id: id(),
            bundle_path: bundle.display().to_string(),
            netns_path: self.netns.path().display().to_string(),
            options: MessageField::some(pod_config()),
            ..Default::default()
        };
        let _: sandbox::CreateSandboxResponse = shim.sandbox("CreateSandbox", &request).await?;
        let again = shim.sandbox::<sandbox::CreateSandboxResponse>("CreateSandbox", &request).await;
        ensure!(code(&again) == Code::ALREADY_EXISTS, "{again:?}");
        let request = sandbox::StartSandboxRequest { sandbox_id: id(), ..Default::default() };
        let started: sandbox::StartSandboxResponse = shim.sandbox("StartSandbox", &request).await?;
        let again = shim.sandbox::<sandbox::StartSandboxResponse>("StartSandbox", &request).await;
        ensure!(code(&again) == Code::FAILED_PRECONDITION, "{again:?}");
        self.check_pid(started.pid)?;
        ensure!(started.created_at.seconds > 0, "{started:?}");
        Ok((shim, started.pid))
    }

    async fn status(&self, shim: &Shim) -> Result<sandbox::SandboxStatusResponse> {
        let request =
            sandbox::SandboxStatusRequest { sandbox_id: self.sandbox.into(), verbose: true, ..Default::default() };
        Ok(shim.sandbox("SandboxStatus", &request).await?)
    }

    async fn check_running(&self, shim: &Shim, pid: u32) -> Result<()> {
        let status = self.status(shim).await?;
        ensure!(status.state == "SANDBOX_READY" && status.pid == pid && status.created_at.seconds > 0, "{status:?}");
        let info: serde_json::Value = serde_json::from_str(status.info.get("info").context("no info")?)?;
        ensure!(info["hostname"] == "by-api", "{info}");
        let request = sandbox::PlatformRequest { sandbox_id: self.sandbox.into(), ..Default::default() };
        let platform: sandbox::PlatformResponse = shim.sandbox("Platform", &request).await?;
        ensure!(platform.platform.os == "linux" && !platform.platform.architecture.is_empty(), "{platform:?}");
        let request = sandbox::PingRequest { sandbox_id: self.sandbox.into(), ..Default::default() };
        let _: sandbox::PingResponse = shim.sandbox("PingSandbox", &request).await?;
        let stranger = sandbox::PingRequest { sandbox_id: "stranger".into(), ..Default::default() };
        let stranger = shim.sandbox::<sandbox::PingResponse>("PingSandbox", &stranger).await;
        ensure!(code(&stranger) == Code::NOT_FOUND, "{stranger:?}");
        let request = sandbox::SandboxMetricsRequest { sandbox_id: self.sandbox.into(), ..Default::default() };
        let metrics: sandbox::SandboxMetricsResponse = shim.sandbox("SandboxMetrics", &request).await?;
        let numbers =
            containerd_shim_protos::cgroups_v2::metrics::Metrics::parse_from_bytes(&metrics.metrics.data.value)?;
        ensure!(metrics.metrics.id == self.sandbox && numbers.memory.usage > 1 << 20, "{numbers:?}");
        // What containerd mounts into containers, where it looks.
        let files = self.host.path("root/io.containerd.grpc.v1.cri/sandboxes").join(self.sandbox);
        let read = |name: &str| std::fs::read_to_string(files.join(name));
        ensure!(read("hostname")? == "by-api\n" && read("resolv.conf")? == "nameserver 10.9.8.7\n", "the pod's files");
        ensure!(read("hosts").is_ok(), "no hosts");
        let shm = self.host.path("state/io.containerd.grpc.v1.cri/sandboxes").join(self.sandbox).join("shm");
        ensure!(shm.is_dir(), "no directory for /dev/shm");
        Ok(())
    }

    async fn end_by_api(&self, shim: &Shim) -> Result<()> {
        let id = || self.sandbox.to_owned();
        // The Task API's Shutdown leaves a sandbox of the Sandbox API alone.
        let _: api::Empty = shim.task("Shutdown", &shutdown(self.sandbox)).await?;
        let wait = sandbox::WaitSandboxRequest { sandbox_id: id(), ..Default::default() };
        let stop = sandbox::StopSandboxRequest { sandbox_id: id(), timeout_secs: 10, ..Default::default() };
        let (ended, stopped) = tokio::join!(
            shim.sandbox::<sandbox::WaitSandboxResponse>("WaitSandbox", &wait),
            shim.sandbox::<sandbox::StopSandboxResponse>("StopSandbox", &stop)
        );
        stopped?;
        let ended = ended?;
        ensure!(ended.exit_status == 137 && ended.exited_at.seconds > 0, "{ended:?}");
        let status = self.status(shim).await?;
        ensure!(status.state == "SANDBOX_NOTREADY" && status.exited_at.seconds > 0, "{status:?}");
        let ping = sandbox::PingRequest { sandbox_id: id(), ..Default::default() };
        let ping = shim.sandbox::<sandbox::PingResponse>("PingSandbox", &ping).await;
        ensure!(code(&ping) == Code::FAILED_PRECONDITION, "{ping:?}");
        let _: sandbox::StopSandboxResponse = shim.sandbox("StopSandbox", &stop).await?;
        let request = sandbox::ShutdownSandboxRequest { sandbox_id: id(), ..Default::default() };
        let _: sandbox::ShutdownSandboxResponse = shim.sandbox("ShutdownSandbox", &request).await?;
        let files = self.host.path("root/io.containerd.grpc.v1.cri/sandboxes").join(self.sandbox);
        ensure!(!files.exists(), "the pod's files are left");
        ensure!(self.host.delete(self.sandbox)?.exit_status == 137, "delete of a pod that is gone");
        Ok(())
    }
}

async fn whole_pod_by_api(caller: Caller) -> Result<()> {
    let contract = Contract::new(caller).await?;
    let (shim, pid) = contract.pod_by_api().await?;
    contract.check_running(&shim, pid).await?;
    contract.whole_container(&shim, pid).await?;
    contract.end_by_api(&shim).await
}

#[test]
fn pod_by_the_sandbox_api_of_containerd_2_1() {
    on_node(async |_| whole_pod_by_api(Caller::Containerd2_1).await);
}

#[test]
fn pod_by_the_sandbox_api_of_containerd_2_3() {
    on_node(async |_| whole_pod_by_api(Caller::Containerd2_3).await);
}

#[test]
fn sandbox_that_cannot_be_created_leaves_nothing() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd2_1).await?;
        let bundle = contract.host.empty_bundle(contract.sandbox)?;
        let (_, shim) = contract.host.start(contract.sandbox).await?;
        let request = sandbox::CreateSandboxRequest {
            sandbox_id: contract.sandbox.into(),
            bundle_path: bundle.display().to_string(),
            netns_path: "/run/netns/no-such-namespace".into(),
            options: MessageField::some(pod_config()),
            ..Default::default()
        };
        let _: sandbox::CreateSandboxResponse = shim.sandbox("CreateSandbox", &request).await?;
        let request = sandbox::StartSandboxRequest { sandbox_id: contract.sandbox.into(), ..Default::default() };
        let refused = shim.sandbox::<sandbox::StartSandboxResponse>("StartSandbox", &request).await;
        ensure!(format!("{refused:?}").contains("cannot enter the pod's network namespace"), "{refused:?}");
        let request = sandbox::ShutdownSandboxRequest { sandbox_id: contract.sandbox.into(), ..Default::default() };
        let _: sandbox::ShutdownSandboxResponse = shim.sandbox("ShutdownSandbox", &request).await?;
        contract.host.delete(contract.sandbox).map(drop)
    });
}

#[test]
fn daemon_without_a_pod_is_ended_by_delete() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd2_1).await?;
        contract.host.sandbox_bundle(contract.sandbox, contract.netns.path())?;
        let (_, shim) = contract.host.start(contract.sandbox).await?;
        let connect = async || code(&shim.task::<api::ConnectResponse>("Connect", &connect(contract.sandbox)).await);
        ensure!(connect().await == Code::NOT_FOUND, "a pod that nobody has made");
        contract.host.delete(contract.sandbox)?;
        ensure!(connect().await == Code::UNAVAILABLE, "the daemon is still there");
        Ok(())
    });
}

#[test]
fn shim_killed_under_the_sandbox_api_is_cleaned_up_by_delete() {
    on_node(async |_| {
        let contract = Contract::new(Caller::Containerd2_1).await?;
        let (shim, _) = contract.pod_by_api().await?;
        let connected: api::ConnectResponse = shim.task("Connect", &connect(contract.sandbox)).await?;
        bulkhead_e2e::node_command("kill", &["-KILL", &connected.shim_pid.to_string()])?;
        ensure!(contract.host.delete(contract.sandbox)?.exit_status == 137, "delete");
        let files = contract.host.path("root/io.containerd.grpc.v1.cri/sandboxes").join(contract.sandbox);
        ensure!(!files.exists(), "the pod's files are left");
        Ok(())
    });
}
