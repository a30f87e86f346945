//! Containers that try to leave, in a guest (docs/negative-tests.md, 25; the agent's own tests have more of them, without
//! one). What a container reaches is its own: not the pod's other containers, not the agent, not the host.

use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::shim::{Caller, Host, Output, Shim};
use bulkhead_e2e::{Netns, PATIENCE, on_shims};
use containerd_shim_protos::api;
use serde_json::{Value, json};

use crate::contract::{SHIM, delete, kill, shutdown, start, wait};

const SECRET: &str = "the-witness's-own";
const POD: &str = "hostile-guest";

/// A pod in a guest, with a container that has something to lose.
struct Attacked {
    host: Host,
    shim: Shim,
    pid: u32,
    _netns: Netns,
}

impl Attacked {
    async fn new() -> Result<Self> {
        let (host, netns) = (Host::new(Caller::Containerd1_6, SHIM).await?, Netns::new(POD)?);
        let bundle = host.sandbox_bundle(POD, netns.path())?.display().to_string();
        let shim = host.start(POD).await?.1;
        let create = api::CreateTaskRequest { id: POD.into(), bundle, ..Default::default() };
        let created: api::CreateTaskResponse = shim.task("Create", &create).await?;
        let _: api::StartResponse = shim.task("Start", &start(POD, "")).await?;
        let attacked = Self { host, shim, pid: created.pid, _netns: netns };
        attacked
            .begin("witness", "sleep 3600", |rootfs, _| Ok(std::fs::write(rootfs.join("etc/secret"), SECRET)?))
            .await?;
        Ok(attacked)
    }

    /// Makes and starts a container; `change` gets its root file system and its spec.
    async fn begin(
        &self,
        id: &str,
        script: &str,
        change: impl FnOnce(&Path, &mut Value) -> Result<()>,
    ) -> Result<Output> {
        let bundle = self.host.container_bundle(id, POD, self.pid, script)?;
        let config = bundle.join("config.json");
        let mut spec = serde_json::from_str(&std::fs::read_to_string(&config)?)?;
        change(&bundle.join("rootfs"), &mut spec)?;
        std::fs::write(config, spec.to_string())?;
        self.host.start(id).await?;
        let output = Output::new(self.host.path(format!("{id}-out")))?;
        let (bundle, stdout) = (bundle.display().to_string(), output.path());
        let create = api::CreateTaskRequest { id: id.into(), bundle, stdout, ..Default::default() };
        let _: api::CreateTaskResponse = self.shim.task("Create", &create).await?;
        let _: api::StartResponse = self.shim.task("Start", &start(id, "")).await?;
        Ok(output)
    }

    /// Runs one to its end, if it can be created; answers what it wrote, or why there is none.
    async fn attack(
        &self,
        id: &str,
        script: &str,
        change: impl FnOnce(&Path, &mut Value) -> Result<()>,
    ) -> Result<Result<String, String>> {
        let output = match self.begin(id, script, change).await {
            Ok(output) => output,
            Err(error) => {
                self.remove(id)?;
                return Ok(Err(format!("{error:#}")));
            }
        };
        let request = wait(id, "");
        let ended = self.shim.task::<api::WaitResponse>("Wait", &request);
        let _ = tokio::time::timeout(PATIENCE, ended).await.context("the attack does not end")??;
        let _: api::DeleteResponse = self.shim.task("Delete", &delete(id, "")).await?;
        self.remove(id)?;
        let text = output.to_end().await?;
        println!("{id}: {text:?}");
        ensure!(!text.contains(SECRET), "{id} has read it: {text}");
        Ok(Ok(text))
    }

    fn remove(&self, id: &str) -> Result<()> {
        self.host.delete(id)?;
        let _ = std::fs::remove_file(self.host.path(format!("{id}-out")));
        let secret = self.host.bundle("witness").join("rootfs/etc/secret");
        ensure!(std::fs::read_to_string(secret)? == SECRET, "{id} has changed the witness's file");
        Ok(())
    }

    /// The guest still works, and ends in an orderly way.
    async fn end(self) -> Result<()> {
        let text = self.attack("after", "echo works", |_, _| Ok(())).await?;
        ensure!(text.as_deref() == Ok("works\n"), "the guest is broken: {text:?}");
        let _: api::Empty = self.shim.task("Kill", &kill("witness", 9)).await?;
        let _: api::WaitResponse = self.shim.task("Wait", &wait("witness", "")).await?;
        let _: api::DeleteResponse = self.shim.task("Delete", &delete("witness", "")).await?;
        self.host.delete("witness")?;
        let _: api::Empty = self.shim.task("Kill", &kill(POD, 9)).await?;
        let _: api::WaitResponse = self.shim.task("Wait", &wait(POD, "")).await?;
        let _: api::DeleteResponse = self.shim.task("Delete", &delete(POD, "")).await?;
        let _: api::Empty = self.shim.task("Shutdown", &shutdown(POD)).await?;
        self.host.delete(POD).map(drop)
    }
}

/// Where the witness's file is in the guest.
const IN_GUEST: &str = "/run/bulkhead/share/witness/rootfs/etc/secret";

#[test]
fn hostile_25_links_of_an_image_lead_to_no_other_container() {
    on_shims(async || {
        let attacked = Attacked::new().await?;
        let volume = attacked.host.path("volume");
        std::fs::write(&volume, "the volume's")?;
        // The last of each says whether there is such a container: the link leads to a place in its own root, as on runc, where
        // the volume is then; only /proc has no room for one.
        let links = [
            ("etc/resolv.conf", "own".to_owned(), "/etc/resolv.conf", true),
            ("etc/resolv.conf", IN_GUEST.to_owned(), "/etc/resolv.conf", true),
            ("etc/resolv.conf", format!("/proc/1/root{IN_GUEST}"), "/etc/resolv.conf", false),
            ("etc/resolv.conf", "../../../witness/rootfs/etc/secret".to_owned(), "/etc/resolv.conf", true),
            ("data", "tmp".to_owned(), "/data/secret", true),
            ("data", "/run/bulkhead/share/witness/rootfs/etc".to_owned(), "/data/secret", true),
            ("data", "../../witness/rootfs/etc".to_owned(), "/data/secret", true),
        ];
        for (number, (link, to, destination, made)) in links.into_iter().enumerate() {
            let script =
                format!("cat {destination}; echo changed > {destination}; cat {IN_GUEST}; cat /proc/1/root{IN_GUEST}");
            let id = format!("link-{number}");
            let outcome = attacked.attack(&id, &script, |rootfs, spec| {
                symlink(&to, rootfs.join(link))?;
                let mount =
                    json!({ "destination": destination, "type": "bind", "source": volume, "options": ["rbind", "ro"] });
                spec["mounts"].as_array_mut().context("no mounts")?.push(mount);
                Ok(())
            });
            let outcome = outcome.await?;
            println!("{link} -> {to}: {outcome:?}");
            ensure!(outcome.is_ok() == made, "{link} -> {to}: {outcome:?}");
            ensure!(outcome.is_err() || outcome.is_ok_and(|text| text.starts_with("the volume's")), "{link} -> {to}");
        }
        ensure!(std::fs::read_to_string(&volume)? == "the volume's", "a read-only volume was written");
        attacked.end().await
    });
}

#[test]
fn hostile_25_descriptor_as_working_directory_leads_nowhere() {
    on_shims(async || {
        let attacked = Attacked::new().await?;
        // One that is missing is made, and the script's way leads to the container's own root.
        let script = "cat ../../../../../../../etc/own";
        let control = attacked.attack("control", script, |rootfs, spec| {
            spec["process"]["cwd"] = "/made/for/it".into();
            Ok(std::fs::write(rootfs.join("etc/own"), "its own")?)
        });
        let control = control.await?;
        ensure!(control.as_deref() == Ok("its own"), "{control:?}");
        for fd in 3..12 {
            let script = format!("cat ../../../../../..{IN_GUEST}; cat ../../../witness/rootfs/etc/secret");
            let id = format!("fd-{fd}");
            let outcome = attacked.attack(&id, &script, |_, spec| {
                spec["process"]["cwd"] = format!("/proc/self/fd/{fd}").into();
                Ok(())
            });
            let outcome = outcome.await?;
            // A number that is no descriptor cannot be made in /proc, and one that is leads out.
            ensure!(outcome.is_err(), "fd {fd} was taken for a directory of the container: {outcome:?}");
        }
        attacked.end().await
    });
}

#[test]
fn hostile_25_agent_is_not_changed_by_a_container_of_the_shared_pid_namespace() {
    on_shims(async || {
        let attacked = Attacked::new().await?;
        let script = "for exe in /proc/[0-9]*/exe; do
              echo tried; (echo x >> $exe) && echo appended; (: > $exe) && echo emptied
            done; true";
        let share_pids = |_: &Path, spec: &mut Value| {
            // As kubelet's shareProcessNamespace: the sandbox's pid namespace.
            spec["linux"]["namespaces"][0]["path"] = format!("/proc/{}/ns/pid", attacked.pid).into();
            Ok(())
        };
        let text = attacked.attack("writer", script, share_pids).await?;
        let text = text.map_err(|error| anyhow::anyhow!("{error}"))?;
        // Its own process, and those of the sandbox's namespace.
        ensure!(text.lines().filter(|line| *line == "tried").count() > 1, "there are no others: {text}");
        ensure!(!text.contains("appended") && !text.contains("emptied"), "{text}");
        let agent_as_program = |_: &Path, spec: &mut Value| {
            spec["process"]["args"] = json!(["/proc/self/exe", "helper"]);
            Ok(())
        };
        println!("/proc/self/exe: {:?}", attacked.attack("self", "", agent_as_program).await?);
        attacked.end().await
    });
}
