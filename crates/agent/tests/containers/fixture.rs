//! An agent in namespaces of its own, and what a shim would say to it.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bulkhead_protocol::agent::{
    AgentClient, ContainerRequest, CreateContainerRequest, CreateSandboxRequest, CreateSandboxResponse, Empty, Event,
    ExecRequest, ExitStatus, IdRange, PidNamespace, ProcessRequest, ResizeRequest, SignalRequest, Stats, Streams,
    UpdateContainerRequest, UserNamespace,
};
use bulkhead_protocol::stdio::{ACCEPTED, Stream, StreamHeader, encode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::context::Context;
use ttrpc::{Code, Result};

/// No call of these tests takes long; one that does fails instead of blocking the suite.
const CALL_TIMEOUT_NS: i64 = 30_000_000_000;

/// Prepares the namespaces as boot does in a guest: /run and the cgroup hierarchy are the agent's own. The hierarchy is a
/// group of the host's, made the root by a cgroup namespace. $1 is the directory, $2 the group's name.
const SETUP: &str = "mount -t tmpfs tmpfs /run && mkdir /run/host /run/bulkhead && mount -t cgroup2 cgroup2 /run/host && \
                     mkdir /run/host/$2 && echo $$ > /run/host/$2/cgroup.procs && umount /run/host && \
                     umount -lR /sys/fs/cgroup && \
                     exec unshare --cgroup sh -c \"mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec $0 serve $1\"";

/// Removes the group $0 of the host's.
const CLEANUP: &str = "mount -t cgroup2 cgroup2 /mnt && find /mnt/$0 -depth -type d -exec rmdir {} +";

/// A running agent.
pub struct Guest {
    agent: Child,
    dir: tempfile::TempDir,
    client: AgentClient,
    group: String,
}

impl Guest {
    /// Starts an agent and connects to it.
    pub async fn start() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests create containers: run them as root");
        let dir = tempfile::Builder::new().prefix("bulkhead-test-").tempdir_in("/var/tmp").unwrap();
        let group = dir.path().file_name().unwrap().to_str().unwrap().to_owned();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut agent = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child", "--ipc", "--uts", "--net", "--mount-proc"])
            .args(["sh", "-c", SETUP, env!("CARGO_BIN_EXE_bulkhead-agent")])
            .arg(dir.path())
            .arg(&group)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        // The agent says so when it listens; its output ends without a line if it cannot.
        let mut said = String::new();
        BufReader::new(agent.stdout.take().unwrap()).read_line(&mut said).unwrap();
        if said.is_empty() {
            let _ = agent.wait();
            panic!("the agent does not come up: {}", std::fs::read_to_string(dir.path().join("log")).unwrap());
        }
        let socket = dir.path().join("rpc.sock");
        let client = ttrpc::r#async::Client::connect(&format!("unix://{}", socket.display())).await.unwrap();
        Self { agent, dir, client: AgentClient::new(client), group }
    }

    pub async fn create(&self, id: &str, args: &[&str], streams: Streams) -> Result<()> {
        let spec = spec(self, id, args, |_| {});
        self.create_with(id, spec, streams, PidNamespace::PID_NAMESPACE_OWN, "").await
    }

    pub async fn create_with(
        &self,
        id: &str,
        spec: Value,
        streams: Streams,
        pids: PidNamespace,
        target: &str,
    ) -> Result<()> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: serde_json::to_vec(&spec).unwrap(),
            streams: Some(streams).into(),
            pid_namespace: pids.into(),
            target_container_id: target.into(),
            ..Default::default()
        };
        self.client.create_container(context(), &request).await.map(drop)
    }

    pub async fn start_container(&self, id: &str) -> Result<Empty> {
        self.client.start_container(context(), &container(id)).await
    }

    pub async fn delete(&self, id: &str) -> Result<Empty> {
        self.client.delete_container(context(), &container(id)).await
    }

    pub async fn pause(&self, id: &str) -> Result<Empty> {
        self.client.pause_container(context(), &container(id)).await
    }

    pub async fn resume(&self, id: &str) -> Result<Empty> {
        self.client.resume_container(context(), &container(id)).await
    }

    pub async fn stats(&self, id: &str) -> Stats {
        self.client.get_stats(context(), &container(id)).await.unwrap()
    }

    /// How many processes a container's control group holds.
    pub async fn processes(&self, id: &str) -> usize {
        let group = self.agent_root().join("sys/fs/cgroup/pod").join(id);
        tokio::fs::read_to_string(group.join("cgroup.procs")).await.unwrap().lines().count()
    }

    pub async fn exec(&self, id: &str, exec_id: &str, args: &[&str], streams: Streams) -> Result<()> {
        self.exec_with(id, exec_id, &process(args), streams).await
    }

    pub async fn exec_with(&self, id: &str, exec_id: &str, process: &Value, streams: Streams) -> Result<()> {
        self.client.exec(context(), &exec_request(id, exec_id, process, streams)).await.map(drop)
    }

    /// Waits as long for an exec as the shim does.
    pub async fn exec_patiently(&self, id: &str, exec_id: &str, args: &[&str]) -> Result<()> {
        let twice_as_long = ttrpc::context::with_timeout(2 * CALL_TIMEOUT_NS);
        self.client.exec(twice_as_long, &exec_request(id, exec_id, &process(args), streams(""))).await.map(drop)
    }

    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<ExitStatus> {
        self.client.wait_process(context(), &process_request(id, exec_id)).await
    }

    pub async fn delete_process(&self, id: &str, exec_id: &str) -> Result<Empty> {
        self.client.delete_process(context(), &process_request(id, exec_id)).await
    }

    pub async fn signal(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<Empty> {
        let request =
            SignalRequest { container_id: id.into(), exec_id: exec_id.into(), signal, all, ..Default::default() };
        self.client.signal_process(context(), &request).await
    }

    pub async fn resize(&self, id: &str, exec_id: &str, width: u32, height: u32) -> Result<Empty> {
        let request =
            ResizeRequest { container_id: id.into(), exec_id: exec_id.into(), width, height, ..Default::default() };
        self.client.resize_terminal(context(), &request).await
    }

    pub async fn try_attach(&self, id: &str, exec_id: &str, stream: Stream) -> Option<UnixStream> {
        let mut socket = UnixStream::connect(self.dir.path().join("stdio.sock")).await.unwrap();
        let header = StreamHeader { container_id: id.into(), exec_id: exec_id.into(), stream };
        socket.write_all(&encode(&header).unwrap()).await.unwrap();
        (socket.read_u8().await.unwrap() == ACCEPTED).then_some(socket)
    }

    pub async fn attach(&self, id: &str, exec_id: &str, stream: Stream) -> UnixStream {
        self.try_attach(id, exec_id, stream).await.unwrap()
    }

    /// All that a stream brings until its end.
    pub async fn read(&self, id: &str, exec_id: &str, stream: Stream) -> String {
        read_to_end(&mut self.attach(id, exec_id, stream).await).await
    }

    /// Writes all of the input and closes it.
    pub async fn write(&self, id: &str, exec_id: &str, bytes: &[u8]) {
        self.type_in(id, exec_id, bytes).await.shutdown().await.unwrap();
    }

    /// Writes some of the input.
    pub async fn type_in(&self, id: &str, exec_id: &str, bytes: &[u8]) -> UnixStream {
        let mut socket = self.attach(id, exec_id, Stream::Stdin).await;
        socket.write_all(bytes).await.unwrap();
        socket
    }

    pub async fn create_sandbox(&self, request: &CreateSandboxRequest) -> Result<CreateSandboxResponse> {
        self.client.create_sandbox(context(), request).await
    }

    /// Ends the sandbox; the reply may be lost.
    pub async fn destroy_sandbox(&self) {
        let _ = self.client.destroy_sandbox(context(), &Empty::new()).await;
    }

    pub async fn update(&self, id: &str, resources: &Value) -> Result<Empty> {
        let resources = serde_json::to_vec(resources).unwrap();
        let request = UpdateContainerRequest { container_id: id.into(), resources, ..Default::default() };
        self.client.update_container(context(), &request).await
    }

    pub async fn next_event(&self) -> Event {
        self.client.next_event(context(), &Empty::new()).await.unwrap()
    }

    /// Runs a script in the agent's namespaces.
    pub fn run(&self, script: &str) -> String {
        let target = self.agent_pid().to_string();
        let output = Command::new("nsenter")
            .args(["--target", &target, "--mount", "--net", "--uts", "--cgroup", "sh", "-c", script])
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The directory of its root file systems, which no container sees.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Kills the process that holds the pod's namespaces, and returns when the agent knows.
    pub fn kill_holder(&self) {
        let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.agent_pid())).unwrap();
        let mut processes = children.split_whitespace().map(|pid| Path::new("/proc").join(pid));
        let is_holder = |process: &PathBuf| {
            let line = std::fs::read_to_string(process.join("cmdline")).unwrap_or_default();
            line.split('\0').any(|word| word == "pid-namespace")
        };
        let holder = processes.find(is_holder).unwrap();
        let pid = holder.file_name().unwrap().to_str().unwrap().parse().unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        let begun = std::time::Instant::now();
        while holder.exists() {
            assert!(begun.elapsed() < std::time::Duration::from_secs(10), "the holder is not reaped");
        }
    }

    /// Whether the agent is gone.
    pub fn ended(mut self) -> bool {
        self.agent.wait().is_ok()
    }

    /// What the agent's directories and control groups hold of containers, in its mount namespace.
    pub fn leftovers(&self) -> Vec<String> {
        let root = self.agent_root();
        ["run/bulkhead/bundles", "run/bulkhead/c", "run/bulkhead/x", "sys/fs/cgroup/pod"]
            .iter()
            .flat_map(|dir| std::fs::read_dir(root.join(dir)).into_iter().flatten())
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .map(|path| path.display().to_string())
            .collect()
    }

    fn agent_root(&self) -> PathBuf {
        Path::new("/proc").join(self.agent_pid().to_string()).join("root")
    }

    /// The agent is the child of unshare(1), which waits for it.
    fn agent_pid(&self) -> i32 {
        let children = format!("/proc/{0}/task/{0}/children", self.agent.id());
        std::fs::read_to_string(children).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default());
        }
        // With its init all of the pid namespace ends, and unshare(1) after it.
        if let Some(pid) = self.agent.try_wait().unwrap().map_or_else(|| Pid::from_raw(self.agent_pid()), |_| None) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.agent.wait();
        let removed = Command::new("unshare").args(["--mount", "sh", "-c", CLEANUP, &self.group]).status();
        if !removed.is_ok_and(|status| status.success()) {
            eprintln!("the control group {} is left behind", self.group);
        }
    }
}

/// A pod with a user namespace.
pub fn with_user_namespace() -> CreateSandboxRequest {
    let ids = || vec![IdRange { first: 0, count: 65536, ..Default::default() }];
    let user = UserNamespace { uids: ids(), gids: ids(), ..Default::default() };
    CreateSandboxRequest { user_namespace: Some(user).into(), ..Default::default() }
}

/// The code of a call that must have failed.
pub fn code_of<T: std::fmt::Debug>(outcome: Result<T>) -> Code {
    match outcome {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("{other:?}"),
    }
}

/// The text of a call that must have failed.
pub fn message_of<T: std::fmt::Debug>(outcome: Result<T>) -> String {
    match outcome {
        Err(ttrpc::Error::RpcStatus(status)) => status.message,
        other => panic!("{other:?}"),
    }
}

/// Streams by letters: i, o, e and t for a terminal.
pub fn streams(letters: &str) -> Streams {
    let has = |letter| letters.contains(letter);
    Streams { terminal: has('t'), stdin: has('i'), stdout: has('o'), stderr: has('e'), ..Default::default() }
}

pub async fn read_to_end(socket: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

pub async fn read_until(socket: &mut UnixStream, end: &str) -> String {
    let mut text = String::new();
    while !text.ends_with(end) {
        text.push(char::from(socket.read_u8().await.unwrap()));
    }
    text
}

/// A container of busybox whose user is 33, with one capability.
pub fn spec(guest: &Guest, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> Value {
    let rootfs = guest.dir.path().join(id).join("rootfs");
    make_rootfs(&rootfs);
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": rootfs},
        "process": process(args),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}
        ],
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"]
        }
    });
    change(&mut spec);
    spec
}

pub fn process(args: &[&str]) -> Value {
    let capabilities = ["CAP_CHOWN"];
    json!({
        "args": args, "cwd": "/tmp", "env": ["PATH=/bin", "FOO=bar"], "user": {"uid": 33, "gid": 33},
        "capabilities": {"bounding": capabilities, "effective": [], "permitted": []}
    })
}

pub fn make_rootfs(rootfs: &Path) {
    for dir in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
        std::fs::create_dir_all(rootfs.join(dir)).unwrap();
    }
    std::fs::set_permissions(rootfs.join("tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    let busybox = rootfs.join("bin/busybox");
    if busybox.exists() {
        return;
    }
    std::fs::copy("/bin/busybox", &busybox).expect("these tests need busybox-static");
    for applet in [
        "sh", "cat", "echo", "grep", "head", "hostname", "id", "ls", "mkdir", "mknod", "ping", "readlink", "sleep",
        "stty", "tail", "test", "tr", "true", "tty", "wc", "yes",
    ] {
        std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
    }
    std::fs::write(rootfs.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/home/web:/bin/sh\n").unwrap();
}

fn context() -> Context {
    ttrpc::context::with_timeout(CALL_TIMEOUT_NS)
}

fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}

fn exec_request(id: &str, exec_id: &str, process: &Value, streams: Streams) -> ExecRequest {
    ExecRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        process: serde_json::to_vec(process).unwrap(),
        streams: Some(streams).into(),
        ..Default::default()
    }
}

fn process_request(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() }
}
