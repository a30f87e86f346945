//! A daemon with pods whose VMM and guest lie, and a pod's life as containerd leads it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_e2e::Netns;
use bulkhead_e2e::processes::descriptors;
use bulkhead_e2e::shim::{Caller, Code, Error, Host, Output, Shim, code};
use containerd_shim_protos::api;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use crate::contract::{connect, delete, exec, kill, shutdown, start, stats, wait};

/// State, Pids and Connect: containerd gives them 2 to 5 s.
const AT_ONCE: Duration = Duration::from_secs(2);

/// A call that nobody holds up, on an emulated node whose one processor is busy with a flood.
pub const SOON: Duration = Duration::from_secs(10);

/// How long a guest may take to be ready in these tests, see `config`.
pub const BOOT: Duration = Duration::from_secs(5);

/// The shim's own bounds: for calls that make something, for those that do not, and for numbers.
pub const LONG: Duration = Duration::from_secs(60);
pub const SHORT: Duration = Duration::from_secs(20);
pub const NUMBERS: Duration = Duration::from_secs(1);

/// How far a shim's memory may grow over that of an idle pod's, KiB.
const GROWTH_KIB: u64 = 8 << 10;

/// Longest error that containerd is told, characters.
const LONGEST_ERROR: usize = 2000;

/// A daemon with one honest pod, whose shim is the measure.
pub struct Stage {
    pub host: Host,
    liar: PathBuf,
    bystander: Option<Pod>,
    idle_kib: u64,
    /// Pods that have lived: each has a name of its own, for a shim may be on its way out yet when the next one comes.
    lives: Cell<u32>,
}

/// A pod of the stage, with one container if it came so far.
pub struct Pod {
    pub id: String,
    pub main: String,
    pub shim: Shim,
    pub shim_pid: u32,
    /// What its sandbox was reported with; 0 if there is none.
    pub pid: u32,
    _netns: Netns,
}

/// Whether containerd kills the container.
#[derive(Clone, Copy, Eq, PartialEq)]
pub enum End {
    Killed,
    ByItself,
}

/// What containerd was told in a pod's life.
#[derive(Debug, Default)]
pub struct Story {
    pub calls: Vec<(&'static str, Result<u32, Error>, Duration)>,
    /// Most memory that the shim had, over an idle pod's.
    pub growth_kib: u64,
    /// Descriptors that the shim had more at the end than at the beginning of the container.
    pub descriptors: usize,
    pub events: BTreeMap<String, usize>,
}

impl Story {
    pub fn of(&self, name: &str) -> Result<&(&'static str, Result<u32, Error>, Duration)> {
        self.calls.iter().find(|(call, ..)| *call == name).with_context(|| format!("{name} was not called: {self:?}"))
    }

    fn told(&mut self, name: &'static str, begin: Instant, answer: Result<u32, Error>) -> bool {
        let ok = answer.is_ok();
        self.calls.push((name, answer, begin.elapsed()));
        ok
    }

    /// What a call said that failed.
    pub fn refusal(&self, name: &str) -> Result<String> {
        match &self.of(name)?.1 {
            Err(Error::RpcStatus(status)) => Ok(status.message.clone()),
            other => bail!("{name} was not refused: {other:?} in {self:#?}"),
        }
    }

    pub fn value(&self, name: &str) -> Result<u32> {
        match &self.of(name)?.1 {
            Ok(value) => Ok(*value),
            Err(error) => bail!("{name} failed: {error} in {self:#?}"),
        }
    }

    /// What holds whatever the guest says.
    pub fn check(&self) -> Result<()> {
        for (name, answer, _) in &self.calls {
            if let Err(error) = answer {
                let Error::RpcStatus(status) = error else { bail!("{name}: the shim is gone: {error} in {self:#?}") };
                let text = &status.message;
                ensure!(text.chars().count() < LONGEST_ERROR, "{name}: an error of {} bytes", text.len());
                ensure!(!text.chars().any(char::is_control), "{name}: an error of several lines: {text:?}");
                ensure!(code(answer) != Code::UNIMPLEMENTED, "{name}: containerd would downgrade the shim: {text}");
            }
        }
        ensure!(self.growth_kib < GROWTH_KIB, "the shim grew by {} KiB: {self:#?}", self.growth_kib);
        // One message's may be in hand when they are counted.
        ensure!(self.descriptors < 64 + 8, "{} descriptors more: {self:#?}", self.descriptors);
        Ok(())
    }

    pub fn took(&self, name: &str, bound: Duration) -> Result<()> {
        let took = self.of(name)?.2;
        ensure!(took < bound, "{name} took {took:?}, more than {bound:?}: {self:#?}");
        Ok(())
    }
}

impl Stage {
    /// A daemon, alone.
    pub async fn empty() -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let liar = std::env::split_paths(&path).map(|dir| dir.join("bulkhead-liar")).find(|file| file.exists());
        let host = Host::new(Caller::Containerd1_6, crate::contract::SHIM).await?;
        Ok(Self {
            host,
            liar: liar.context("bulkhead-liar is not in PATH")?,
            bystander: None,
            idle_kib: 0,
            lives: Cell::new(0),
        })
    }

    pub async fn new() -> Result<Self> {
        let mut stage = Self::empty().await?;
        let (mut story, bystander) = stage.begin("bystander", "").await?;
        stage.container(&mut story, &bystander).await?;
        ensure!(story.calls.iter().all(|(_, answer, _)| answer.is_ok()), "an honest agent: {story:#?}");
        stage.idle_kib = status_kib(bystander.shim_pid, "VmRSS")?;
        stage.bystander = Some(bystander);
        Ok(stage)
    }

    /// The options that name a configuration of the test's own, as containerd passes them.
    fn options(&self, id: &str, script: &str) -> Result<Any> {
        let path = self.host.path(format!("{id}.toml"));
        let config = format!(
            "vmm = {0:?}\nkernel = {0:?}\ninitramfs = {0:?}\nboot_timeout_s = {1}\nkernel_params = \"liar={script}\"\n",
            self.liar,
            BOOT.as_secs()
        );
        std::fs::write(&path, config)?;
        let path = path.display().to_string();
        let value = [&[0x12, u8::try_from(path.len())?][..], path.as_bytes()].concat();
        Ok(Any { type_url: "runtimeoptions.v1.Options".to_owned(), value, ..Any::default() })
    }

    /// The sandbox.
    pub async fn begin(&self, id: &str, script: &str) -> Result<(Story, Pod)> {
        self.begin_with(id, script, |_| {}).await
    }

    /// A sandbox whose spec is changed first.
    pub async fn begin_with(
        &self,
        id: &str,
        script: &str,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Result<(Story, Pod)> {
        let netns = Netns::new(id)?;
        let bundle = self.host.sandbox_bundle(id, netns.path())?;
        let config = bundle.join("config.json");
        let mut spec = serde_json::from_str(&std::fs::read_to_string(&config)?)?;
        change(&mut spec);
        std::fs::write(config, spec.to_string())?;
        let bundle = bundle.display().to_string();
        let shim = self.host.start(id).await?.1;
        let mut pod =
            Pod { id: id.into(), main: format!("{id}-main"), shim, shim_pid: daemon(id)?, pid: 0, _netns: netns };
        let mut story = Story::default();
        let options = MessageField::some(self.options(id, script)?);
        let create = api::CreateTaskRequest { id: id.into(), bundle, options, ..Default::default() };
        let begin = Instant::now();
        let created = pod.shim.task::<api::CreateTaskResponse>("Create", &create).await;
        pod.pid = created.as_ref().map_or(0, |created| created.pid);
        if story.told("boot", begin, created.map(|created| created.pid)) {
            // A VMM that has ended meanwhile makes it too late.
            let _ = pod.shim.task::<api::StartResponse>("Start", &start(id, "")).await;
        }
        Ok((story, pod))
    }

    /// A container, with everything that containerd asks about one while it runs.
    pub async fn container(&self, story: &mut Story, pod: &Pod) -> Result<()> {
        let id = &pod.main;
        let bundle = self.host.container_bundle(id, &pod.id, pod.pid, "true")?.display().to_string();
        self.host.start(id).await?;
        let fifo = self.host.path(format!("{id}-stdout"));
        let output = Output::new(fifo.clone())?;
        let create = api::CreateTaskRequest { id: id.into(), bundle, stdout: output.path(), ..Default::default() };
        let begin = Instant::now();
        let created = pod.shim.task::<api::CreateTaskResponse>("Create", &create).await;
        if !story.told("create", begin, created.map(|created| created.pid)) {
            return Ok(());
        }
        let before = descriptors(pod.shim_pid)?;
        let begin = Instant::now();
        let started = pod.shim.task::<api::StartResponse>("Start", &start(id, "")).await;
        story.told("start", begin, started.map(|started| started.pid));
        pod.answers_at_once().await.context("after Start")?;
        let _: Result<api::Empty, _> = pod.shim.task("Exec", &exec(id, "probe", "true", "")).await;
        let (begin, request) = (Instant::now(), start(id, "probe"));
        let running = pod.shim.task::<api::StartResponse>("Start", &request);
        let (started, memory) = tokio::join!(running, pod.answers_at_once());
        memory.context("while an exec starts")?;
        if story.told("exec", begin, started.map(|started| started.pid)) {
            let begin = Instant::now();
            let request = wait(id, "probe");
            let ended = tokio::time::timeout(SOON, pod.shim.task::<api::WaitResponse>("Wait", &request)).await;
            // An exec's end may be kept from us; that of its container is told anyway.
            if let Ok(ended) = ended {
                story.told("exec-wait", begin, ended.map(|ended| ended.exit_status));
            }
        }
        let (begin, request) = (Instant::now(), stats(id));
        let numbers = pod.shim.task::<api::StatsResponse>("Stats", &request);
        let (numbers, memory) = tokio::join!(numbers, pod.answers_at_once());
        memory.context("during Stats")?;
        let entries = numbers.and_then(|numbers| {
            let value = numbers.stats.unwrap_or_default().value;
            let parsed = containerd_shim_protos::cgroups_v2::metrics::Metrics::parse_from_bytes(&value);
            let parsed = parsed.map_err(|error| Error::Others(error.to_string()))?;
            Ok(u32::try_from(parsed.network.len() + parsed.io.usage.len() + parsed.hugetlb.len()).unwrap_or(u32::MAX))
        });
        story.told("stats", begin, entries);
        story.descriptors = descriptors(pod.shim_pid)?.saturating_sub(before);
        drop(output);
        Ok(())
    }

    /// The container's end, by force or by itself.
    pub async fn end_container(&self, story: &mut Story, pod: &Pod, end: End) -> Result<()> {
        let id = &pod.main;
        if end == End::Killed {
            let (begin, request) = (Instant::now(), kill(id, 9));
            let killed = pod.shim.task::<api::Empty>("Kill", &request);
            let (killed, memory) = tokio::join!(killed, pod.answers_at_once());
            memory.context("during Kill")?;
            story.told("kill", begin, killed.map(|_| 0));
        }
        let begin = Instant::now();
        let ended = pod.shim.task::<api::WaitResponse>("Wait", &wait(id, "")).await;
        let code = ended.as_ref().map_or(0, |ended| ended.exit_status);
        ensure!(code < 256, "no process ends with {code}");
        story.told("wait", begin, ended.map(|ended| ended.exit_status));
        let (begin, request) = (Instant::now(), delete(id, ""));
        let deleted = pod.shim.task::<api::DeleteResponse>("Delete", &request);
        let connected = connect(id);
        let connected = pod.shim.task::<api::ConnectResponse>("Connect", &connected);
        let (deleted, memory) = tokio::join!(deleted, connected);
        memory.context("during Delete")?;
        ensure!(story.told("delete", begin, deleted.map(|deleted| deleted.exit_status)), "not removable: {story:#?}");
        Ok(())
    }

    /// The pod's end, which must come whatever was before.
    pub async fn end(&self, story: &mut Story, pod: Pod, with_container: bool) -> Result<()> {
        let begin = Instant::now();
        if story.value("boot").is_ok() {
            let _: Result<api::Empty, _> = pod.shim.task("Kill", &kill(&pod.id, 9)).await;
            let _: api::WaitResponse = pod.shim.task("Wait", &wait(&pod.id, "")).await?;
            let _: api::DeleteResponse = pod.shim.task("Delete", &delete(&pod.id, "")).await?;
        }
        let peak = status_kib(pod.shim_pid, "VmHWM")?;
        // Against the honest pod's, if there is one.
        story.growth_kib = if self.idle_kib > 0 { peak.saturating_sub(self.idle_kib) } else { 0 };
        let _: Result<api::Empty, _> = pod.shim.task("Shutdown", &shutdown(&pod.id)).await;
        if with_container {
            self.host.delete(&pod.main)?;
        }
        self.host.delete(&pod.id)?;
        story.told("remove", begin, Ok(0));
        let _ = std::fs::remove_file(self.host.path(format!("{}-main-stdout", pod.id)));
        Ok(())
    }

    /// A pod's whole life with an agent that follows a script.
    pub async fn life(&self, script: &str) -> Result<Story> {
        self.try_life(script, End::Killed).await.with_context(|| format!("with the script {script:?}"))
    }

    /// The same without a call that ends it.
    pub async fn unkilled_life(&self, script: &str) -> Result<Story> {
        self.try_life(script, End::ByItself).await.with_context(|| format!("with the script {script:?}"))
    }

    async fn try_life(&self, script: &str, end: End) -> Result<Story> {
        self.lives.set(self.lives.get() + 1);
        let (mut story, pod) = self.begin(&format!("victim-{}", self.lives.get()), script).await?;
        let booted = story.value("boot").is_ok();
        if booted {
            self.container(&mut story, &pod).await?;
            if story.value("create").is_ok() {
                self.end_container(&mut story, &pod, end).await?;
            }
        }
        self.bystander_is_well().await?;
        self.end(&mut story, pod, booted).await?;
        for topic in self.host.events.seen().await {
            *story.events.entry(topic).or_default() += 1;
        }
        println!(
            "{script:<40} grew {:>5} KiB, {} descriptors, took {:?}",
            story.growth_kib,
            story.descriptors,
            story
                .calls
                .iter()
                .map(|(name, answer, took)| format!("{name} {:?} {took:.1?}", code(answer)))
                .collect::<Vec<_>>()
        );
        story.check()?;
        Ok(story)
    }

    async fn bystander_is_well(&self) -> Result<()> {
        let Some(pod) = &self.bystander else { return Ok(()) };
        pod.answers_at_once().await.context("another pod")?;
        let begin = Instant::now();
        let _: api::StatsResponse = pod.shim.task("Stats", &stats(&pod.main)).await.context("another pod's numbers")?;
        ensure!(begin.elapsed() < SOON, "another pod's numbers took {:?}", begin.elapsed());
        Ok(())
    }

    /// Removes the bystander: it has an end like any other's.
    pub async fn close(mut self) -> Result<()> {
        let mut story = Story { calls: vec![("boot", Ok(0), Duration::ZERO)], ..Story::default() };
        let pod = self.bystander.take().context("no bystander")?;
        self.end_container(&mut story, &pod, End::Killed).await?;
        ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
        self.end(&mut story, pod, true).await
    }
}

impl Pod {
    /// What containerd counts on whatever the guest does, while a call that may take its time is under way.
    async fn answers_at_once(&self) -> Result<()> {
        let state = api::StateRequest { id: self.main.clone(), ..Default::default() };
        let pids = api::PidsRequest { id: self.main.clone(), ..Default::default() };
        for round in 0..3 {
            let begin = Instant::now();
            let state: api::StateResponse = self.shim.task("State", &state).await?;
            ensure!(state.exit_status < 256, "{state:?}");
            let _: api::PidsResponse = self.shim.task("Pids", &pids).await?;
            let _: api::ConnectResponse = self.shim.task("Connect", &connect(&self.main)).await?;
            ensure!(begin.elapsed() < AT_ONCE, "State, Pids and Connect took {:?}, round {round}", begin.elapsed());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

/// A line of /proc/PID/status in KiB.
fn status_kib(pid: u32, name: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("the shim is gone")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB")).with_context(|| format!("no {name}"))?;
    Ok(number.parse()?)
}

/// The process of a pod's shim, which says nothing of itself before there is a pod.
fn daemon(id: &str) -> Result<u32> {
    let found = bulkhead_e2e::node_command("pgrep", &["-f", "--", &format!("-id {id} -publish-binary .* serve$")])?;
    found.trim().parse().with_context(|| format!("not one shim of {id}: {found:?}"))
}
