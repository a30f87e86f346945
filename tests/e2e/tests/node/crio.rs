//! What CRI-O asks and expects of a runtime beyond containerd, by the test client (cri-o: internal/oci/runtime_vm.go).

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::shim::{Caller, Output, Shim, memory_alone};
use bulkhead_e2e::{PATIENCE, node_command, on_node};
use containerd_shim_protos::api;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use crate::contract::{Contract, SHIM, delete, exec, start, wait};

/// Zero stands for every limit that the pod has not set; the file `oom` is all that CRI-O learns of an end for want of
/// memory; and it opens what a pod's own container would say, waiting until the runtime does.
#[test]
fn crios_memory_limit_alone_its_note_of_an_oom_kill_and_the_streams_of_its_sandbox() {
    on_node(async |_| {
        let contract = Contract::new(Caller::CriO).await?;
        let said = contract.host.path("sandbox-out");
        mknodat(CWD, &said, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
        let path = said.clone();
        let opened = tokio::task::spawn_blocking(move || std::fs::File::open(path));
        let (shim, pid) = contract.pod_with_output(&said.display().to_string()).await?;
        let opened = tokio::time::timeout(PATIENCE, opened).await.context("nobody opens the sandbox's stdout")?;
        let mut said = opened??;
        out_of_memory(&contract, &shim, pid).await?;
        contract.end_by_task(&shim).await?;
        let mut text = String::new();
        said.read_to_string(&mut text)?;
        ensure!(text.is_empty(), "{text}");
        Ok(())
    });
}

async fn out_of_memory(contract: &Contract, shim: &Shim, sandbox_pid: u32) -> Result<()> {
    let (host, id) = (&contract.host, "crio-oom");
    let script = "until [ -e /tmp/go ]; do sleep 0.1; done; exec busybox tail /dev/zero";
    let bundle = contract.container(shim, sandbox_pid, id, script).await?;
    let resources = Any { value: memory_alone(16 << 20).to_string().into_bytes(), ..Default::default() };
    let update =
        api::UpdateTaskRequest { id: id.into(), resources: MessageField::some(resources), ..Default::default() };
    let _: api::Empty = shim.task("Update", &update).await?;
    let note = bundle.join("oom");
    ensure!(!note.exists(), "it has memory yet");
    let _: api::Empty = shim.task("Exec", &exec(id, "go", "true > /tmp/go", "")).await?;
    let _: api::StartResponse = shim.task("Start", &start(id, "go")).await?;
    let ended: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
    ensure!(ended.exit_status == 137 && note.exists(), "{ended:?} and a note: {}", note.exists());
    let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
    host.delete(id).map(drop)
}

/// CRI-O asks each runtime for its version and its features when it starts, and complains of one that does not answer.
#[test]
fn shim_tells_its_version_and_its_features_however_it_is_asked() {
    on_node(async |_| {
        for spelling in ["-v", "--version", "-version", "version"] {
            let said = node_command(SHIM, &[spelling])?;
            ensure!(said.contains("Version:"), "{spelling}: {said}");
        }
        // What it is told here it tells the kubelet, which admits no pod with a user namespace otherwise.
        let features: serde_json::Value = serde_json::from_str(&node_command(SHIM, &["features"])?)?;
        ensure!(features["linux"]["mountExtensions"]["idmap"]["enabled"] == true, "{features}");
        ensure!(features["mountOptions"].as_array().is_some_and(|list| list.contains(&"rro".into())), "{features}");
        Ok(())
    });
}

/// The first id of the host that a test's user namespace has.
const FIRST: u32 = 100_000;

/// A user namespace that a process keeps, as CRI-O keeps one for a pod.
struct Users(std::process::Child);

impl Users {
    fn new() -> Result<Self> {
        use std::io::BufRead;
        let mut keeper = std::process::Command::new("unshare")
            .args(["--user", "sh", "-c", "echo there; exec sleep 3600"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .context("no unshare")?;
        let out = keeper.stdout.take().context("no pipe")?;
        let users = Self(keeper);
        std::io::BufReader::new(out).read_line(&mut String::new())?;
        for map in ["uid_map", "gid_map"] {
            std::fs::write(format!("/proc/{}/{map}", users.0.id()), format!("0 {FIRST} 65536\n"))?;
        }
        Ok(users)
    }

    /// Gives a bundle the namespace, and a mount if there is one.
    fn give(&self, bundle: &Path, mounts: &[Value]) -> Result<()> {
        let config = bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&config)?)?;
        for key in ["uidMappings", "gidMappings"] {
            spec["linux"][key] = mapping();
        }
        let user = json!({ "type": "user", "path": format!("/proc/{}/ns/user", self.0.id()) });
        spec["linux"]["namespaces"].as_array_mut().context("no namespaces")?.push(user);
        spec["mounts"].as_array_mut().context("no mounts")?.extend_from_slice(mounts);
        std::fs::write(config, spec.to_string()).context("cannot write the spec")
    }
}

impl Drop for Users {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A volume on a file system that maps owners, removed at the end.
struct Volume(PathBuf);

impl Volume {
    fn new() -> Result<Self> {
        let path = PathBuf::from(format!("/run/crio-users-{}", std::process::id()));
        std::fs::create_dir(&path).context("cannot make the volume")?;
        Ok(Self(path))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn mapping() -> Value {
    json!([{ "containerID": 0, "hostID": FIRST, "size": 65536 }])
}

/// CRI-O keeps a container's root file system by the ids that the user namespace has on the host, and gives it its own files
/// (resolv.conf) as they are and the kubelet's volumes to be mapped.
#[test]
fn pod_of_crio_with_a_user_namespace_has_its_files_by_its_own_ids() {
    on_node(async |_| {
        let (contract, users) = (Contract::new(Caller::CriO).await?, Users::new()?);
        let (host, id) = (&contract.host, "crio-users");
        let sandbox = host.sandbox_bundle(contract.sandbox, contract.netns.path())?;
        users.give(&sandbox, &[])?;
        let (shim, pid) = contract.start_pod(&sandbox, "").await?;
        // Not on the node's overlay, which maps no owners.
        let (on_tmpfs, resolv) = (Volume::new()?, host.path("resolv.conf"));
        let volume = on_tmpfs.0.clone();
        std::fs::write(volume.join("old"), "")?;
        std::fs::write(&resolv, "nameserver 192.0.2.1\n")?;
        let script = "cat /etc/resolv.conf; busybox stat -c %u / /bin/busybox /volume /volume/old; true > /volume/new; \
                      true > /etc/made; busybox stat -c %u /volume/new /etc/made; \
                      busybox awk '{ print $1, $2, $3 }' /proc/self/uid_map";
        let bundle = host.container_bundle(id, contract.sandbox, pid, script)?;
        let volume_mount = json!({
            "destination": "/volume", "type": "bind", "source": volume, "options": ["rbind", "rw"],
            "uidMappings": mapping(), "gidMappings": mapping(),
        });
        let file = json!({
            "destination": "/etc/resolv.conf", "type": "bind", "source": resolv, "options": ["bind", "ro"],
        });
        users.give(&bundle, &[volume_mount, file])?;
        node_command("chown", &["-hR", &format!("{FIRST}:{FIRST}"), &bundle.join("rootfs").display().to_string()])?;
        host.start(id).await?;
        let output = Output::new(host.path("users-out"))?;
        let create = api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            stdout: output.path(),
            stderr: output.path(),
            ..Default::default()
        };
        let _: api::CreateTaskResponse = shim.task("Create", &create).await?;
        let _: api::StartResponse = shim.task("Start", &start(id, "")).await?;
        let ended: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
        let owner = |path: &Path| Ok::<_, anyhow::Error>(std::fs::metadata(path)?.uid());
        let on_disk = (owner(&volume.join("new"))?, owner(&bundle.join("rootfs/etc/made"))?);
        let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
        let text = output.to_end().await?;
        ensure!(ended.exit_status == 0, "{ended:?} {text}");
        ensure!(text == "nameserver 192.0.2.1\n0\n0\n0\n0\n0\n0\n0 0 65536\n", "{text}");
        ensure!(on_disk == (0, FIRST), "on disk the owners are {on_disk:?}");
        host.delete(id)?;
        contract.end_by_task(&shim).await
    });
}
