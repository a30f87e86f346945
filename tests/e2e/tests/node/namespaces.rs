//! The node's namespaces: a pod gets none of them by whatever path, nothing in them is touched, and a process that a shim
//! reports is in none of them, so that what configures its namespaces (OCI hooks, container engines) configures the pod's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::net;
use bulkhead_e2e::shim::{Caller, Host, Output, Shim};
use bulkhead_e2e::{Netns, node_command, on_node};
use containerd_shim_protos::{api, sandbox_api as sandbox};
use serde_json::{Value, json};

use crate::contract::{SHIM, delete, exec, kill, shutdown, start, wait};

/// What a pod of the host's network would change: interfaces, what is done to their frames, addresses, routes.
pub fn node_network() -> Result<String> {
    let mut shown = String::new();
    for arguments in ["ip -o link", "tc qdisc show", "ip -o addr", "ip route show table all", "ip -6 route", "ip rule"]
    {
        let mut words = arguments.split(' ');
        shown += &node_command(words.next().context("no program")?, &words.collect::<Vec<_>>())?;
    }
    // Lifetimes of addresses count down.
    Ok(shown.split_whitespace().filter(|word| !word.ends_with("sec")).collect::<Vec<_>>().join(" "))
}

/// Changes the spec of a bundle.
fn change(bundle: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let config = bundle.join("config.json");
    let mut spec = serde_json::from_slice(&std::fs::read(&config)?)?;
    change(&mut spec);
    Ok(std::fs::write(config, spec.to_string())?)
}

fn create(id: &str, bundle: &Path, stdout: String) -> api::CreateTaskRequest {
    api::CreateTaskRequest { id: id.into(), bundle: bundle.display().to_string(), stdout, ..Default::default() }
}

/// What Create says of a sandbox, or of a container without a pod, one of whose namespaces is at a path.
async fn refusal(host: &Host, kind: &str, path: &str, annotated: bool) -> Result<String> {
    let id = "refused";
    let bundle = host.sandbox_bundle(id, Path::new("/nonexistent"))?;
    change(&bundle, |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().into_iter().flatten();
        for namespace in namespaces.filter(|namespace| namespace["type"] == kind) {
            namespace["path"] = path.into();
        }
        if !annotated {
            spec["annotations"] = json!({});
        }
    })?;
    let shim = host.start(id).await?.1;
    let created = shim.task::<api::CreateTaskResponse>("Create", &create(id, &bundle, String::new())).await;
    let _ = shim.task::<api::Empty>("Shutdown", &shutdown(id)).await;
    host.delete(id)?;
    Ok(created.err().context("it was created")?.to_string())
}

#[test]
fn pod_of_a_namespace_of_the_nodes_is_refused_and_the_node_is_as_before() {
    on_node(async |_| {
        let before = node_network()?;
        for (caller, annotated) in [(Caller::CriO, true), (Caller::Containerd1_6, true), (Caller::Containerd1_6, false)]
        {
            let host = Host::new(caller, SHIM).await?;
            for (kind, name, word) in [
                ("network", "net", "hostNetwork"),
                ("ipc", "ipc", "hostIPC"),
                ("pid", "pid", "hostPID"),
                ("uts", "uts", "UTS"),
            ] {
                let said = refusal(&host, kind, &format!("/proc/1/ns/{name}"), annotated).await?;
                ensure!(said.contains(word) && said.contains("runc"), "{caller:?} {kind}: {said}");
            }
        }
        // As CRI-O pins them: a file that the namespace is mounted on.
        let host = Host::new(Caller::CriO, SHIM).await?;
        let pinned = host.path("pinned");
        std::fs::write(&pinned, "")?;
        let pinned = pinned.to_str().context("no text")?;
        node_command("mount", &["--bind", "/proc/1/ns/net", pinned])?;
        let said = refusal(&host, "network", pinned, true).await;
        node_command("umount", &[pinned])?;
        ensure!(said?.contains("hostNetwork"), "by a mount");
        let host = Host::new(Caller::Containerd2_1, SHIM).await?;
        let id = || "refused".to_owned();
        let bundle = host.empty_bundle(&id())?;
        let shim = host.start(&id()).await?.1;
        let request = sandbox::CreateSandboxRequest {
            sandbox_id: id(),
            bundle_path: bundle.display().to_string(),
            netns_path: "/proc/1/ns/net".into(),
            ..Default::default()
        };
        let said = shim.sandbox::<sandbox::CreateSandboxResponse>("CreateSandbox", &request).await;
        let _ = shim
            .sandbox::<sandbox::ShutdownSandboxResponse>(
                "ShutdownSandbox",
                &sandbox::ShutdownSandboxRequest { sandbox_id: id(), ..Default::default() },
            )
            .await;
        host.delete(&id())?;
        ensure!(said.err().context("it was created")?.to_string().contains("hostNetwork"), "by the Sandbox API");
        let after = node_network()?;
        ensure!(before == after, "the node's network was\n{before}\nand is\n{after}");
        Ok(())
    });
}

/// A process that the shim reports is in none of the node's namespaces, and has the command line of what it stands for.
fn check_placeholder(pid: u32, command: &str) -> Result<()> {
    for name in ["net", "ipc", "uts", "pid", "mnt", "cgroup"] {
        let link = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/{name}"));
        let (its, nodes) = (link(&pid.to_string())?, link("1")?);
        ensure!(its != nodes, "{name} of the reported process {pid} is the node's");
    }
    let shown = node_command("ps", &["-o", "args=", "-p", &pid.to_string()])?;
    ensure!(shown.contains(command), "the node shows {shown:?} for {command:?}");
    Ok(())
}

/// A container without a pod, whose hook makes a network where it finds the reported process, as Docker's does.
struct Hooked {
    host: Host,
    bundle: PathBuf,
}

impl Hooked {
    const ID: &str = "hooked";

    async fn new() -> Result<Self> {
        let host = Host::new(Caller::Containerd1_6, SHIM).await?;
        let bundle = host.sandbox_bundle(Self::ID, Path::new(""))?;
        let script = "exec >/hook.log 2>&1; set -e
            pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/')
            ip link add hooked0 type veth peer name eth0 netns $pid
            ip addr add 10.97.0.1/24 dev hooked0; ip link set hooked0 up
            nsenter -n -t $pid ip link set eth0 up
            nsenter -n -t $pid ip addr add 10.97.0.2/24 dev eth0
            nsenter -n -t $pid ip route add default via 10.97.0.1"
            .replace("/hook.log", &host.path("hook.log").display().to_string());
        let hook =
            json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] });
        // It sees an interface come, and says so.
        let process = "until busybox ip addr show eth1 | grep -q 10.96.0.2; do busybox sleep 0.1; done; echo come
            exec sleep 3600";
        change(&bundle, |spec| {
            spec["annotations"] = json!({});
            spec["hooks"] = json!({ "prestart": [hook] });
            spec["process"]["args"] = json!(["/bin/sh", "-c", process.replace("| grep", "| busybox grep")]);
        })?;
        Ok(Self { host, bundle })
    }

    /// What a shell in the container prints.
    async fn shell(&self, shim: &Shim, name: &str, script: &str) -> Result<String> {
        let output = Output::new(self.host.path(name))?;
        let _: api::Empty = shim.task("Exec", &exec(Self::ID, name, script, &output.path())).await?;
        let started: api::StartResponse = shim.task("Start", &start(Self::ID, name)).await?;
        if name == "placeholder" {
            check_placeholder(started.pid, "sleep 1234")?;
            let _: api::Empty =
                shim.task("Kill", &api::KillRequest { exec_id: name.into(), ..kill(Self::ID, 9) }).await?;
        }
        let ended: api::WaitResponse = shim.task("Wait", &wait(Self::ID, name)).await?;
        let text = output.to_end().await?;
        let _: api::DeleteResponse = shim.task("Delete", &delete(Self::ID, name)).await?;
        ensure!(ended.exit_status == 0 || name == "placeholder", "{script}: {} {text}", ended.exit_status);
        Ok(text)
    }
}

impl Drop for Hooked {
    fn drop(&mut self) {
        for name in ["hooked0", "hooked1"] {
            let _ = node_command("ip", &["link", "del", name]);
        }
    }
}

#[test]
fn network_that_hooks_make_is_the_containers_and_the_nodes_stays_as_it_is() {
    on_node(async |_| {
        let before = node_network()?;
        let hooked = Hooked::new().await?;
        let (id, output) = (Hooked::ID, Output::new(hooked.host.path("out"))?);
        let shim = hooked.host.start(id).await?.1;
        let created: Result<api::CreateTaskResponse, _> =
            shim.task("Create", &create(id, &hooked.bundle, output.path())).await;
        let said = std::fs::read_to_string(hooked.host.path("hook.log")).unwrap_or_default();
        let created = created.with_context(|| format!("the hook said {said:?}"))?;
        check_placeholder(created.pid, "busybox ip addr show eth1")?;
        let _: api::StartResponse = shim.task("Start", &start(id, "")).await?;
        let shown = hooked.shell(&shim, "shown", "busybox ip addr; busybox ip route").await?;
        net::ping("10.97.0.2".parse()?).await?;
        ensure!(shown.contains("10.97.0.2/24") && shown.contains("default via 10.97.0.1 dev eth0"), "{shown}");
        hooked.shell(&shim, "placeholder", "exec sleep 1234").await?;
        // As `docker network connect` does.
        let pid = created.pid.to_string();
        let inside = |line: &str| {
            node_command("nsenter", &[&["-n", "-t", &pid, "ip"], &*line.split(' ').collect::<Vec<_>>()].concat())
        };
        node_command("ip", &["link", "add", "hooked1", "type", "veth", "peer", "name", "later", "netns", &pid])?;
        node_command("ip", &["link", "set", "hooked1", "up"])?;
        for line in ["link set later name eth1", "addr add 10.96.0.2/24 dev eth1", "link set eth1 up"] {
            inside(line)?;
        }
        output.begun().await?;
        node_command("ip", &["link", "del", "hooked1"])?;
        let gone = "while busybox ip link show eth1 >/dev/null 2>&1; do busybox sleep 0.1; done; busybox ip link";
        let links = hooked.shell(&shim, "gone", gone).await?;
        ensure!(links.contains("eth0") && !links.contains("eth1"), "{links}");
        let _: api::Empty = shim.task("Kill", &kill(id, 9)).await?;
        let _: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
        let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
        ensure!(output.to_end().await? == "come\n", "what the container has seen");
        let _ = shim.task::<api::Empty>("Shutdown", &shutdown(id)).await;
        hooked.host.delete(id)?;
        drop(hooked);
        let after = node_network()?;
        ensure!(before == after, "the node's network was\n{before}\nand is\n{after}");
        Ok(())
    });
}

#[test]
fn redirects_are_gone_with_the_pod_when_its_path_is_gone_first() {
    on_node(async |_| {
        let (host, id, netns) = (Host::new(Caller::CriO, SHIM).await?, "pathless", Netns::new("pathless")?);
        let inside =
            |line: &str| node_command("ip", &[&["-n", "pathless"], &*line.split(' ').collect::<Vec<_>>()].concat());
        node_command("ip", &["link", "add", "pathless0", "type", "veth", "peer", "name", "eth0", "netns", "pathless"])?;
        inside("addr add 10.95.0.2/24 dev eth0")?;
        inside("link set eth0 up")?;
        let bundle = host.sandbox_bundle(id, netns.path())?;
        let shim = host.start(id).await?.1;
        let created: api::CreateTaskResponse = shim.task("Create", &create(id, &bundle, String::new())).await?;
        let _: api::StartResponse = shim.task("Start", &start(id, "")).await?;
        // Another path to look from, and the one that the pod was given goes.
        node_command("ip", &["netns", "attach", "kept", &created.pid.to_string()])?;
        drop(netns);
        let _: api::Empty = shim.task("Kill", &kill(id, 9)).await?;
        let _: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
        let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
        let left = node_command("tc", &["-n", "kept", "qdisc", "show", "dev", "eth0"]);
        let _ = shim.task::<api::Empty>("Shutdown", &shutdown(id)).await;
        host.delete(id)?;
        node_command("ip", &["netns", "del", "kept"])?;
        let left = left?;
        ensure!(!left.contains("ingress"), "the redirect is still there: {left}");
        Ok(())
    });
}
