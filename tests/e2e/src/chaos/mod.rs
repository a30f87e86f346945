//! One part of a pod is killed at a known step of the pod's life; then the pod must be possible to remove, as the kubelet
//! removes it, in bounded time.
//!
//! A step is reached by stopping what would go on, never by being quick: the VMM is stopped (SIGSTOP), the kubelet's call
//! is made, and once its request waits for the guest, the call is known to be half way ([`moment`]).

mod agent;
pub mod moment;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_cli::cri::{self, v1};
use bulkhead_protocol::node::{RUN_ROOT, SHIM_RECORD, VMM_RECORD};
use containerd_shim_protos::api;
use rustix::process::{Pid, Signal, kill_process};

use crate::processes::{Processes, recorded};
use crate::shim::{Code, Shim, code};
use crate::terminal::Terminal;
use crate::{HANDLER, Node, PATIENCE, TestPod, containerd, node_command, sh};
use moment::Watch;

/// Where containerd has the pods' network namespaces.
const NAMESPACES: &str = "/run/netns";
/// The operator's configuration in the node.
const CONFIG: &str = "/etc/bulkhead/config.toml";
/// The annotation that makes a guest small, and less than the default memory, in MiB: its boot is shorter.
const SMALL: (&str, &str) = ("io.bulkhead.memory-mib", "128");

/// How long StopPodSandbox and RemovePodSandbox may take together, whatever was killed.
pub const CONVERGED: Duration = Duration::from_secs(10);

/// What is killed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Component {
    /// The node's containerd; it is started again before the pod is removed.
    Containerd,
    /// The pod's shim.
    Shim,
    /// The pod's VMM.
    Vmm,
    /// The guest's init.
    Agent,
}

/// When.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// RunPodSandbox has started the VMM, whose guest is not there yet.
    WhileBooting,
    /// RunPodSandbox has answered.
    AfterRunPodSandbox,
    /// containerd is making a container's spec.
    WhileCreateContainer,
    /// CreateContainer has answered. Shim and guest know nothing of the container.
    AfterCreateContainer,
    /// StartContainer has come to the shim's Create, which waits for the guest.
    WhileTaskCreate,
    /// StartContainer has come to the shim's Start, which waits for the guest.
    WhileTaskStart,
    /// A container runs.
    WhileRunning,
    /// An exec runs, with its streams attached.
    DuringExec,
    /// StopContainer has sent its signal, which waits for the guest.
    DuringStopContainer,
    /// StopPodSandbox has asked the guest to end.
    DuringStopPodSandbox,
    /// RemovePodSandbox of a pod that was not stopped is ending its container.
    DuringRemovePodSandbox,
    /// The container has ended, and its status has been told.
    AfterContainerEnded,
}

/// Kills `component` at `step` of a pod's life and removes the pod. Returns how long the removal took.
pub async fn killed(node: &Node, component: Component, step: Step) -> Result<Duration> {
    let case = Case { node, component, step };
    let running = containerd::command()?;
    let happened = case.happen().await;
    // Also after a case that failed half way: the next one needs it.
    if !containerd::runs() {
        containerd::start(&node.cri, &running).await?;
    }
    let expects = happened?;
    expects.check().await.context("before the pod is removed")?;
    println!("chaos: {component:?} killed {step:?}");
    let took = converge(node).await?;
    if step == Step::WhileBooting {
        // The kubelet's next attempt.
        let again = |pod: &mut v1::PodSandboxConfig| small(pod, 1);
        node.pod_with("chaos", HANDLER, again).await.context("the pod cannot be made again")?;
    }
    Ok(took)
}

/// Stops and removes every pod that the CRI knows, as the kubelet does with those that it does not want; each in time.
/// Returns how long the slowest took.
pub async fn converge(node: &Node) -> Result<Duration> {
    let request = v1::ListPodSandboxRequest::default();
    let pods = node.cri.runtime().list_pod_sandbox(request).await.map_err(cri::status)?.into_inner().items;
    let mut slowest = Duration::ZERO;
    for pod in pods {
        let begin = Instant::now();
        let mut removed = node.cri.remove_pod(&pod.id).await;
        // A pod that has died is deleted by containerd too, which then closes its connection to the shim, a call of StopPodSandbox
        // that is under way or not. The kubelet asks again.
        if removed.as_ref().is_err_and(|error| format!("{error:#}").contains("ttrpc: closed")) {
            println!("chaos: once more, {removed:?}");
            removed = node.cri.remove_pod(&pod.id).await;
        }
        removed.with_context(|| format!("pod {} cannot be removed", pod.id))?;
        let took = begin.elapsed();
        println!("chaos: pod {} removed in {took:.2?}", pod.id);
        ensure!(took < CONVERGED, "StopPodSandbox and RemovePodSandbox took {took:?}, more than {CONVERGED:?}");
        slowest = slowest.max(took);
    }
    Ok(slowest)
}

fn small(pod: &mut v1::PodSandboxConfig, attempt: u32) {
    pod.annotations.insert(SMALL.0.to_owned(), SMALL.1.to_owned());
    // The same pod each time for the kubelet: one uid, further attempts.
    if let Some(metadata) = &mut pod.metadata {
        metadata.uid = "chaos".to_owned();
        metadata.attempt = attempt;
    }
}

/// The processes of a pod.
#[derive(Clone, Debug)]
struct Parts {
    shim: u32,
    vmm: u32,
    /// Where the pod's network is; unknown until the sandbox is there.
    netns: Option<String>,
}

impl Parts {
    fn of(pod: &TestPod) -> Result<Self> {
        let Processes { shim, vmm } = Processes::of(pod)?;
        // There is no other pod; with the Sandbox API the CRI does not tell a pod's namespace.
        let netns = std::fs::read_dir(NAMESPACES)?.flatten().next().context("the pod has no network namespace")?;
        Ok(Self { shim, vmm, netns: Some(netns.path().display().to_string()) })
    }

    fn stop_vmm(&self) -> Result<()> {
        signal(self.vmm, Signal::STOP)
    }

    fn continue_vmm(&self) -> Result<()> {
        signal(self.vmm, Signal::CONT)
    }
}

fn signal(pid: u32, signal: Signal) -> Result<()> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).context("a pid that is none")?;
    kill_process(raw, signal).with_context(|| format!("cannot send {signal:?} to process {pid}"))
}

/// What the kubelet must see before it removes the pod.
enum Expect {
    /// Nothing in particular.
    Removable,
    /// The container runs and can be executed in.
    Runs(TestPod, String),
    /// The container has ended with one of these codes.
    Ended(TestPod, String, &'static [i32]),
}

impl Expect {
    async fn check(self) -> Result<()> {
        match self {
            Self::Removable => Ok(()),
            Self::Runs(pod, container) => {
                ensure!(pod.sh(&container, "echo alive").await? == "alive", "the container does not answer");
                Ok(())
            }
            Self::Ended(pod, container, codes) => {
                let status = pod.wait_exit(&container, PATIENCE).await?;
                ensure!(codes.contains(&status.exit_code), "{status:?}");
                Ok(())
            }
        }
    }
}

struct Case<'a> {
    node: &'a Node,
    component: Component,
    step: Step,
}

impl Case<'_> {
    /// Brings the pod to the step and kills.
    async fn happen(&self) -> Result<Expect> {
        if self.step == Step::WhileBooting {
            self.while_booting().await?;
            return Ok(Expect::Removable);
        }
        let pod = self.node.pod_with("chaos", HANDLER, |pod| small(pod, 0)).await?;
        let parts = Parts::of(&pod)?;
        match self.step {
            Step::WhileBooting => {}
            Step::AfterRunPodSandbox => self.strike(&parts, Agent::Idle).await?,
            Step::WhileCreateContainer => self.while_create_container(&pod, &parts).await?,
            Step::AfterCreateContainer => {
                pod.create(sh("main", "exit 0")).await?;
                self.strike(&parts, Agent::Idle).await?;
            }
            Step::WhileTaskCreate => {
                let container = pod.create(sh("main", "sleep 3600")).await?;
                self.during(&parts, pod.start(&container)).await?;
            }
            Step::WhileTaskStart => self.while_task_start(&pod, &parts).await?,
            Step::WhileRunning => {
                let container = pod.sleeper("main").await?;
                self.strike(&parts, Agent::Idle).await?;
                return Ok(match self.component {
                    Component::Containerd => Expect::Runs(pod, container),
                    // 255 is containerd's own, when it learns of the end of its connection before `delete` has told the code.
                    Component::Shim => Expect::Ended(pod, container, &[137, 255]),
                    Component::Vmm | Component::Agent => Expect::Ended(pod, container, &[137]),
                });
            }
            Step::DuringExec => self.during_exec(&pod, &parts).await?,
            Step::DuringStopContainer => {
                let container = pod.sleeper("main").await?;
                self.during(&parts, pod.stop(&container, PATIENCE)).await?;
            }
            Step::DuringStopPodSandbox => {
                let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
                let mut runtime = self.node.cri.runtime();
                self.during(&parts, async { Ok(runtime.stop_pod_sandbox(request).await.map(drop)?) }).await?;
            }
            Step::DuringRemovePodSandbox => {
                pod.sleeper("main").await?;
                let request = v1::RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
                let mut runtime = self.node.cri.runtime();
                self.during(&parts, async { Ok(runtime.remove_pod_sandbox(request).await.map(drop)?) }).await?;
            }
            Step::AfterContainerEnded => {
                let (status, _) = pod.run_to_end(sh("main", "exit 3")).await?;
                self.strike(&parts, Agent::Idle).await?;
                return Ok(Expect::Ended(pod, status.id, &[3]));
            }
        }
        Ok(Expect::Removable)
    }

    /// Kills, and lets the VMM go on if it was stopped. Returns when what was killed is gone.
    async fn strike(&self, parts: &Parts, agent: Agent) -> Result<()> {
        match self.component {
            Component::Containerd => {
                let pid = containerd::pid()?;
                signal(pid, Signal::KILL)?;
                moment::gone(pid, PATIENCE).await?;
                parts.continue_vmm()
            }
            Component::Shim => {
                signal(parts.shim, Signal::KILL)?;
                moment::gone(parts.shim, PATIENCE).await?;
                // It may have been killed already.
                let _ = parts.continue_vmm();
                Ok(())
            }
            Component::Vmm => {
                signal(parts.vmm, Signal::KILL)?;
                moment::gone(parts.vmm, PATIENCE).await
            }
            Component::Agent => {
                parts.stop_vmm()?;
                agent::overwrite(parts.vmm)?;
                parts.continue_vmm()?;
                if agent == Agent::Idle {
                    wake(parts.netns.as_deref().context("an agent without a network")?)?;
                }
                moment::gone(parts.vmm, PATIENCE).await.context("the guest outlives its init")
            }
        }
    }

    /// Makes a call of the kubelet's and kills while its request waits for the guest. The call must end; how does not matter.
    async fn during(&self, parts: &Parts, call: impl Future<Output = Result<()>>) -> Result<()> {
        parts.stop_vmm()?;
        let strike = async {
            moment::request_waits(parts.vmm).await?;
            self.strike(parts, Agent::Asked).await
        };
        self.both(call, strike).await
    }

    async fn both<T>(
        &self,
        call: impl Future<Output = Result<T>>,
        strike: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let limit = 2 * PATIENCE;
        let both = async { tokio::join!(call, strike) };
        let Ok((outcome, struck)) = tokio::time::timeout(limit, both).await else {
            bail!("a call of the kubelet's has not ended within {limit:?}");
        };
        struck?;
        if let Err(error) = outcome {
            println!("chaos: {:?} killed {:?}: the call says {error:#}", self.component, self.step);
        }
        Ok(())
    }

    async fn while_booting(&self) -> Result<()> {
        if self.component == Component::Agent {
            return self.agent_that_ends_at_once().await;
        }
        let pods = Watch::directory(&Path::new(RUN_ROOT).join("k8s.io"))?;
        let strike = async {
            let directory = Watch::directory(&pods.first_entry().await?)?;
            let shim = directory.path().join(SHIM_RECORD);
            let vmm = directory.recorded(VMM_RECORD).await?;
            let parts = Parts { shim: recorded(&shim)?, vmm, netns: None };
            parts.stop_vmm()?;
            self.strike(&parts, Agent::Asked).await
        };
        let call = self.node.pod_with("chaos", HANDLER, |pod| small(pod, 0));
        let call = async { if call.await.is_ok() { bail!("the pod was made nevertheless") } else { Ok(()) } };
        self.both(call, strike).await
    }

    /// An image whose init resets the machine.
    async fn agent_that_ends_at_once(&self) -> Result<()> {
        let good = std::fs::read_to_string(CONFIG)?;
        std::fs::write(CONFIG, good.replace("/initramfs.cpio", "/reboot.cpio"))?;
        let refused = self.node.refused_pod("chaos", |pod| small(pod, 0)).await;
        std::fs::write(CONFIG, good)?;
        let message = refused?;
        ensure!(message.contains("the guest ended before it was ready: it reset itself"), "{message}");
        ensure!(message.contains("init reached"), "without the guest's last words: {message}");
        Ok(())
    }

    /// containerd reads a seccomp profile while it makes the spec; here the profile is a fifo.
    async fn while_create_container(&self, pod: &TestPod, parts: &Parts) -> Result<()> {
        let fifo = Fifo::new()?;
        let mut config = sh("main", "exit 0");
        let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.seccomp = Some(v1::SecurityProfile {
            profile_type: v1::security_profile::ProfileType::Localhost.into(),
            localhost_ref: fifo.path.display().to_string(),
        });
        let strike = async {
            fifo.watch.opened().await?;
            self.strike(parts, Agent::Idle).await?;
            std::io::Write::write_all(&mut &fifo.file, br#"{"defaultAction":"SCMP_ACT_ALLOW"}"#)?;
            drop(fifo.file);
            Ok(())
        };
        let done = self.both(pod.create(config), strike).await;
        std::fs::remove_file(fifo.path)?;
        done
    }

    /// Between the shim's Create and Start containerd is stopped.
    async fn while_task_start(&self, pod: &TestPod, parts: &Parts) -> Result<()> {
        let shim = Shim::of_pod(&pod.id).await?;
        let container = pod.create(sh("main", "sleep 3600")).await?;
        let containerd = containerd::pid()?;
        parts.stop_vmm()?;
        let strike = async {
            moment::request_waits(parts.vmm).await?;
            let stopped = Stopped::new(containerd)?;
            parts.continue_vmm()?;
            created(&shim, &container).await?;
            parts.stop_vmm()?;
            drop(stopped);
            moment::request_waits(parts.vmm).await?;
            self.strike(parts, Agent::Asked).await
        };
        self.both(pod.start(&container), strike).await
    }

    async fn during_exec(&self, pod: &TestPod, parts: &Parts) -> Result<()> {
        let container = pod.sleeper("main").await?;
        let script = ["/bin/sh", "-c", "echo up; exec sleep 3600"];
        let mut exec = Terminal::exec(pod, &container, &script, false).await?;
        exec.expect("up").await?;
        self.strike(parts, Agent::Idle).await?;
        if let Ok(code) = tokio::time::timeout(PATIENCE, exec.finish()).await.context("the exec does not end")? {
            ensure!(code != 0, "the exec has ended well");
        }
        Ok(())
    }
}

/// What the agent does when its program is overwritten.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Agent {
    /// It waits, and must be woken to die.
    Idle,
    /// A request waits for it.
    Asked,
}

/// Connects to the pod's localhost, which the agent carries.
fn wake(netns: &str) -> Result<()> {
    // Refused or cut off: nobody listens, and the agent dies.
    let connect = "timeout 2 bash -c ': < /dev/tcp/127.0.0.1/9' || true";
    node_command("nsenter", &[&format!("--net={netns}"), "sh", "-c", connect]).map(drop)
}

/// A process that is stopped, and goes on with the end of this, also when a test gives up.
struct Stopped(u32);

impl Stopped {
    fn new(process: u32) -> Result<Self> {
        signal(process, Signal::STOP)?;
        Ok(Self(process))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = signal(self.0, Signal::CONT);
    }
}

/// Returns when the shim has created a container and the guest has read everything that goes with it.
async fn created(shim: &Shim, id: &str) -> Result<()> {
    let begin = Instant::now();
    let state = api::StateRequest { id: id.to_owned(), ..Default::default() };
    while code(&shim.task::<api::StateResponse>("State", &state).await) != Code::OK {
        ensure!(begin.elapsed() < PATIENCE, "the shim does not create the container");
        // Who asks the shim is not told of what others ask it for.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Goes the same way as what the shim has asked the guest since, and after it.
    let stats = api::StatsRequest { id: id.to_owned(), ..Default::default() };
    let numbers = shim.task::<api::StatsResponse>("Stats", &stats).await;
    ensure!(code(&numbers) == Code::OK, "a created container has no numbers: {numbers:?}");
    Ok(())
}

/// A fifo that is open, so that whoever opens it to read gets no end before ours.
struct Fifo {
    path: PathBuf,
    file: std::fs::File,
    watch: Watch,
}

impl Fifo {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("bulkhead-chaos-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        node_command("mkfifo", &[&path.display().to_string()])?;
        let file = std::fs::File::options().read(true).write(true).open(&path)?;
        let watch = Watch::opening(&path)?;
        Ok(Self { path, file, watch })
    }
}
