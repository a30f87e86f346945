//! Parts that are killed at every step of a pod's life, and a node that lacks what a pod needs: the kubelet can always
//! remove the pod, and nothing is left of it (the fixture checks).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::chaos::{self, Component, Step};
use bulkhead_e2e::{Node, PATIENCE, TestPod, node_command, on_node, sh, soak};

/// The table of faults: each row is a test.
macro_rules! faults {
    ($($name:ident: $component:ident, $step:ident;)+) => {
        $(
            #[test]
            fn $name() {
                on_node(async |node| chaos::killed(node, Component::$component, Step::$step).await.map(drop));
            }
        )+
    };
}

faults! {
    containerd_killed_while_booting: Containerd, WhileBooting;
    containerd_killed_after_run_pod_sandbox: Containerd, AfterRunPodSandbox;
    containerd_killed_while_create_container: Containerd, WhileCreateContainer;
    containerd_killed_after_create_container: Containerd, AfterCreateContainer;
    containerd_killed_while_task_create: Containerd, WhileTaskCreate;
    containerd_killed_while_task_start: Containerd, WhileTaskStart;
    containerd_killed_while_running: Containerd, WhileRunning;
    containerd_killed_during_exec: Containerd, DuringExec;
    containerd_killed_during_stop_container: Containerd, DuringStopContainer;
    containerd_killed_during_stop_pod_sandbox: Containerd, DuringStopPodSandbox;
    containerd_killed_during_remove_pod_sandbox: Containerd, DuringRemovePodSandbox;
    containerd_killed_after_container_ended: Containerd, AfterContainerEnded;
    shim_killed_while_booting: Shim, WhileBooting;
    shim_killed_after_run_pod_sandbox: Shim, AfterRunPodSandbox;
    shim_killed_while_create_container: Shim, WhileCreateContainer;
    shim_killed_after_create_container: Shim, AfterCreateContainer;
    shim_killed_while_task_create: Shim, WhileTaskCreate;
    shim_killed_while_task_start: Shim, WhileTaskStart;
    shim_killed_while_running: Shim, WhileRunning;
    shim_killed_during_exec: Shim, DuringExec;
    shim_killed_during_stop_container: Shim, DuringStopContainer;
    shim_killed_during_stop_pod_sandbox: Shim, DuringStopPodSandbox;
    shim_killed_during_remove_pod_sandbox: Shim, DuringRemovePodSandbox;
    shim_killed_after_container_ended: Shim, AfterContainerEnded;
    vmm_killed_while_booting: Vmm, WhileBooting;
    vmm_killed_after_run_pod_sandbox: Vmm, AfterRunPodSandbox;
    vmm_killed_while_create_container: Vmm, WhileCreateContainer;
    vmm_killed_after_create_container: Vmm, AfterCreateContainer;
    vmm_killed_while_task_create: Vmm, WhileTaskCreate;
    vmm_killed_while_task_start: Vmm, WhileTaskStart;
    vmm_killed_while_running: Vmm, WhileRunning;
    vmm_killed_during_exec: Vmm, DuringExec;
    vmm_killed_during_stop_container: Vmm, DuringStopContainer;
    vmm_killed_during_stop_pod_sandbox: Vmm, DuringStopPodSandbox;
    vmm_killed_during_remove_pod_sandbox: Vmm, DuringRemovePodSandbox;
    vmm_killed_after_container_ended: Vmm, AfterContainerEnded;
    agent_killed_while_booting: Agent, WhileBooting;
    agent_killed_after_run_pod_sandbox: Agent, AfterRunPodSandbox;
    agent_killed_while_create_container: Agent, WhileCreateContainer;
    agent_killed_after_create_container: Agent, AfterCreateContainer;
    agent_killed_while_task_create: Agent, WhileTaskCreate;
    agent_killed_while_task_start: Agent, WhileTaskStart;
    agent_killed_while_running: Agent, WhileRunning;
    agent_killed_during_exec: Agent, DuringExec;
    agent_killed_during_stop_container: Agent, DuringStopContainer;
    agent_killed_during_stop_pod_sandbox: Agent, DuringStopPodSandbox;
    agent_killed_during_remove_pod_sandbox: Agent, DuringRemovePodSandbox;
    agent_killed_after_container_ended: Agent, AfterContainerEnded;
}

/// Runs a test whose node has had trouble; then its pods are removed in time.
fn trouble(test: impl AsyncFnOnce(&Node) -> Result<()>) {
    on_node(async |node| {
        test(node).await?;
        chaos::converge(node).await.map(drop)
    });
}

/// Something of the node that is changed for a test, and undone with the value.
struct Changed(Vec<Vec<String>>);

impl Changed {
    fn nothing() -> Self {
        Self(Vec::new())
    }

    /// Runs a command now and another one at the end.
    fn by(&mut self, now: &str, undo: &str) -> Result<()> {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        run(&words(now))?;
        self.0.push(words(undo));
        Ok(())
    }

    /// Undoes all, the last first.
    fn undo(&mut self) -> Result<()> {
        while let Some(command) = self.0.pop() {
            run(&command)?;
        }
        Ok(())
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        // A test that has come to its end has undone all itself.
        let _ = self.undo();
    }
}

fn run(command: &[String]) -> Result<()> {
    let (program, arguments) = command.split_first().context("no command")?;
    node_command(program, &arguments.iter().map(String::as_str).collect::<Vec<_>>()).map(drop)
}

fn names(message: &str, words: &[&str]) -> Result<()> {
    println!("chaos: refused with: {message}");
    ensure!(!message.contains('\n'), "more than one line: {message}");
    for word in words {
        ensure!(message.contains(word), "{message:?} does not name {word:?}");
    }
    Ok(())
}

/// The CNI plugin that the node's network begins with.
const PLUGIN: &str = "/usr/lib/cni/bridge";

/// Puts a script in the place of the CNI plugin; `$real` in it is the plugin, `$state` a file of its own.
fn plugin(script: &str) -> Result<Changed> {
    let scratch = PathBuf::from(format!("/run/node/chaos-cni-{}", std::process::id()));
    let mut changed = Changed::nothing();
    changed.by(&format!("mkdir {}", scratch.display()), &format!("rm -r {}", scratch.display()))?;
    let (real, wrapper) = (scratch.join("real"), scratch.join("wrapper"));
    fs::copy(PLUGIN, &real)?;
    let head = format!("#!/bin/bash\nreal={} state={}/state\n", real.display(), scratch.display());
    fs::write(&wrapper, format!("{head}{script}\nexec $real\n"))?;
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755))?;
    changed.by(&format!("mount --bind {} {PLUGIN}", wrapper.display()), &format!("umount {PLUGIN}"))?;
    Ok(changed)
}

#[test]
fn hostile_27_slow_cni_delays_its_pod_and_no_other() {
    trouble(async |node| {
        let running = node.pod("bystander").await?;
        let container = running.sleeper("main").await?;
        let mut changed = plugin("[ $CNI_COMMAND != ADD ] || sleep 10")?;
        let begin = Instant::now();
        let other = async {
            let answer = running.sh(&container, "echo alive").await?;
            ensure!(answer == "alive" && begin.elapsed() < Duration::from_secs(10), "{answer} {:?}", begin.elapsed());
            Ok(())
        };
        let (slow, other) = tokio::join!(node.pod("slow-cni"), other);
        slow?;
        other?;
        ensure!(begin.elapsed() > Duration::from_secs(10), "the plugin was not waited for: {:?}", begin.elapsed());
        changed.undo()
    });
}

#[test]
fn hostile_27_cni_that_fails_to_add_is_named() {
    trouble(async |node| {
        let error = r#"{"cniVersion":"1.0.0","code":100,"msg":"no address is left"}"#;
        let mut changed = plugin(&format!("[ $CNI_COMMAND != ADD ] || {{ echo '{error}'; exit 1; }}"))?;
        let message = node.refused_pod("no-address", |_| {}).await;
        changed.undo()?;
        names(&message?, &["no address is left"])?;
        node.pod("address").await.map(drop)
    });
}

#[test]
fn hostile_27_cni_that_fails_to_delete_once_is_asked_again() {
    trouble(async |node| {
        let pod = node.pod("sticky").await?;
        pod.sleeper("main").await?;
        let error = r#"{"cniVersion":"1.0.0","code":11,"msg":"try again later"}"#;
        let once = format!("[ $CNI_COMMAND != DEL -o -e $state ] || {{ : > $state; echo '{error}'; exit 1; }}");
        let mut changed = plugin(&once)?;
        let first = node.cri.remove_pod(&pod.id).await;
        let second = chaos::converge(node).await;
        changed.undo()?;
        let message = first.err().context("the failure was not told")?.to_string();
        names(&message, &["try again later"])?;
        second.map(drop)
    });
}

/// containerd's data in the node, and where it makes the layers of a new container.
const ROOT: &str = "/run/node/containerd";
const SNAPSHOTS: &str = "/run/node/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";

/// A container that runs goes on while no other can be made, which is said; and others can be made again after it.
async fn without_new_containers(
    node: &Node,
    name: &str,
    change: impl FnOnce(&mut Changed) -> Result<()>,
    word: &str,
) -> Result<()> {
    let pod = node.pod(name).await?;
    let running = pod.sleeper("main").await?;
    let mut changed = Changed::nothing();
    change(&mut changed)?;
    let refused = pod.run(sh("refused", "exit 0")).await;
    let answer = pod.sh(&running, "echo alive").await;
    changed.undo()?;
    // Only now: containerd writes a container's end to the disk before it believes it.
    let stopped = pod.stop(&running, PATIENCE).await;
    names(&refused.err().context("a container was made")?.to_string(), &[word])?;
    ensure!(answer? == "alive", "the running container does not answer");
    stopped?;
    let (status, _) = pod.run_to_end(sh("later", "exit 4")).await?;
    ensure!(status.exit_code == 4, "{status:?}");
    Ok(())
}

#[test]
fn hostile_27_image_store_that_is_read_only_stops_no_running_container() {
    trouble(async |node| {
        let read_only = |changed: &mut Changed| {
            changed.by(&format!("mount --bind {SNAPSHOTS} {SNAPSHOTS}"), &format!("umount {SNAPSHOTS}"))?;
            changed.by(&format!("mount -o remount,bind,ro {SNAPSHOTS}"), "true")
        };
        without_new_containers(node, "read-only-store", read_only, "read-only file system").await
    });
}

#[test]
fn hostile_27_disk_that_is_full_stops_no_running_container() {
    trouble(async |node| {
        let full = |changed: &mut Changed| {
            changed.by(
                &format!("dd if=/dev/zero of={ROOT}/ballast bs=4k count=1 status=none"),
                &format!("rm {ROOT}/ballast"),
            )?;
            // No more blocks than are in use.
            let table = node_command("df", &["-k", "--output=used", ROOT])?;
            let used = table.lines().last().unwrap_or_default().trim().to_owned();
            changed.by(&format!("mount -o remount,size={used}k {ROOT}"), &format!("mount -o remount,size=50% {ROOT}"))
        };
        without_new_containers(node, "full-disk", full, "no space left on device").await
    });
}

#[test]
fn hostile_27_run_directory_without_space_is_named() {
    trouble(async |node| {
        fs::create_dir_all("/run/bulkhead")?;
        let mut changed = Changed::nothing();
        changed.by("mount -t tmpfs -o nr_inodes=2 tmpfs /run/bulkhead", "umount /run/bulkhead")?;
        let message = node.refused_pod("no-space", |_| {}).await;
        changed.undo()?;
        names(&message?, &["/run/bulkhead", "No space left on device"])
    });
}

#[test]
fn hostile_27_device_that_is_no_kvm_is_named() {
    trouble(async |node| {
        let mut changed = Changed::nothing();
        changed.by("mount --bind /dev/null /dev/kvm", "umount /dev/kvm")?;
        let message = node.refused_pod("null-kvm", |_| {}).await;
        changed.undo()?;
        names(&message?, &["/dev/kvm", "KVM's interface"])
    });
}

/// A parameter of the node's memory.
fn sysctl(name: &str) -> Result<String> {
    Ok(crate::read(&format!("/proc/sys/vm/{name}"))?.trim().to_owned())
}

#[test]
fn hostile_27_memory_that_the_kernel_refuses_is_named() {
    trouble(async |node| {
        let number = |line: &str| line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
        let text = crate::read("/proc/meminfo")?;
        let committed = text.lines().find(|line| line.starts_with("Committed_AS")).and_then(number);
        // Enough for whatever else starts, not for a guest of 3000 MiB.
        let limit = committed.context("no Committed_AS")? + (1500 << 10);
        let mut changed = Changed::nothing();
        let before = |name: &str| Ok::<_, anyhow::Error>(format!("sysctl -qw vm.{name}={}", sysctl(name)?));
        // Either of the two makes the other 0.
        changed.by(&format!("sysctl -qw vm.overcommit_kbytes={limit}"), &before("overcommit_ratio")?)?;
        changed.by("sysctl -qw vm.overcommit_memory=2", &before("overcommit_memory")?)?;
        let large = |config: &mut v1::PodSandboxConfig| {
            config.annotations.insert("io.bulkhead.memory-mib".into(), "3000".into());
        };
        let message = node.refused_pod("no-memory", large).await;
        changed.undo()?;
        names(&message?, &["cannot map 3000 MiB for the guest", "overcommit limit is too small"])
    });
}

/// A cgroup for pods, as the kubelet makes one, with a limit on memory.
pub struct Group(PathBuf);

impl Group {
    pub fn new(name: &str) -> Result<Self> {
        let path = Path::new("/sys/fs/cgroup").join(name);
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        fs::write(self.0.join(name), value).with_context(|| format!("cannot set {name} of a cgroup"))
    }

    pub fn get(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.0.join(name)).with_context(|| format!("cannot read {name} of a cgroup"))
    }

    fn parent(&self) -> String {
        format!("/{}", self.0.file_name().unwrap_or_default().display())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

pub fn in_group(config: &mut v1::PodSandboxConfig, group: &Group) {
    config.linux.get_or_insert_default().cgroup_parent = group.parent();
}

#[test]
fn hostile_27_cgroup_too_small_for_a_guest_refuses_the_pod() {
    trouble(async |node| {
        let group = Group::new("chaos-small")?;
        group.set("memory.max", "12M")?;
        let message = node.refused_pod("too-small", |config| in_group(config, &group)).await?;
        names(&message, &["signal 9 ended the VMM before the guest was ready", "raise the pod's memory limit"])
    });
}

#[test]
fn hostile_20_vmm_killed_for_its_memory_ends_its_containers_with_137() {
    trouble(async |node| {
        let group = Group::new("chaos-oom")?;
        let pod = node.pod_with("oom", bulkhead_e2e::HANDLER, |config| in_group(config, &group)).await?;
        let container = pod.sleeper("main").await?;
        // What is there may stay, and the guest wants more.
        let current: u64 = crate::read(&format!("{}/memory.current", group.0.display()))?.parse()?;
        group.set("memory.max", &(current + (8 << 20)).to_string())?;
        let fill = pod.exec(&container, &["/bin/sh", "-c", "head -c 60000000 /dev/zero > /dev/shm/ballast"]).await;
        let status = pod.wait_exit(&container, PATIENCE).await?;
        ensure!(status.exit_code == 137, "{status:?}; the guest had its memory: {fill:?}");
        group.set("memory.max", "max")?;
        // Here, since the group goes next.
        chaos::converge(node).await.map(drop)
    });
}

#[test]
fn hostile_27_clock_that_is_set_forth_and_back_disturbs_no_pod() {
    trouble(async |node| {
        let pod = node.pod("clock").await?;
        let (first, second) = (pod.sleeper("first").await?, pod.sleeper("second").await?);
        // A day on, a month back, and where it was.
        let mut changed = Changed::nothing();
        changed.by("date -s +1day", "date -s -1day")?;
        let forth = lives(&pod, &first).await;
        changed.by("date -s -30days", "date -s +30days")?;
        let back = lives(&pod, &second).await;
        changed.undo()?;
        forth.and(back)
    });
}

/// A container is executed in and stopped, another comes and ends, all without waiting for a clock.
async fn lives(pod: &TestPod, container: &str) -> Result<()> {
    let begin = Instant::now();
    ensure!(pod.sh(container, "echo alive").await? == "alive", "no answer");
    pod.stop(container, PATIENCE).await?;
    let (status, out) = pod.run_to_end(sh(&format!("after-{}", &container[..8]), "echo made; exit 5")).await?;
    ensure!(status.exit_code == 5 && out == "made\n", "{status:?} {out}");
    ensure!(begin.elapsed() < PATIENCE, "all of it took {:?}", begin.elapsed());
    Ok(())
}

#[test]
fn hostile_28_upgrade_of_all_binaries_leaves_a_running_pod_to_the_new_ones() {
    trouble(async |node| {
        let pod = node.pod("upgraded").await?;
        let container = pod.sleeper("main").await?;
        // As a package manager does it: a new file in the place of the one that runs.
        for file in ["bin/containerd-shim-bulkhead-v2", "lib/bulkhead-vmm", "lib/vmlinux", "lib/initramfs.cpio"] {
            let file = format!("/run/node/{file}");
            node_command("cp", &["--remove-destination", "--preserve=mode", &file, &format!("{file}.new")])?;
            node_command("mv", &[&format!("{file}.new"), &file])?;
        }
        ensure!(pod.sh(&container, "echo alive").await? == "alive", "the old guest does not answer");
        let (status, out) = pod.run_to_end(sh("later", "echo joined; exit 6")).await?;
        ensure!(status.exit_code == 6 && out == "joined\n", "{status:?} {out}");
        pod.stop(&container, PATIENCE).await
    });
}

#[test]
fn hostile_29_storm_of_pods_leaves_nothing() {
    on_node(async |node| soak::storm(node, 6, 3).await);
}
