//! What CRI-O asks and expects of a runtime beyond containerd, by the test client (cri-o: internal/oci/runtime_vm.go).

use std::io::Read;

use anyhow::{Context, Result, ensure};
use bulkhead_e2e::shim::{Caller, Shim, memory_alone};
use bulkhead_e2e::{PATIENCE, node_command, on_node};
use containerd_shim_protos::api;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::contract::{Contract, SHIM, delete, kill, start, wait};

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
    let script = "trap 'exec busybox tail /dev/zero' TERM; while :; do sleep 1; done";
    let bundle = contract.container(shim, sandbox_pid, id, script).await?;
    let resources = Any { value: memory_alone(16 << 20).to_string().into_bytes(), ..Default::default() };
    let update =
        api::UpdateTaskRequest { id: id.into(), resources: MessageField::some(resources), ..Default::default() };
    let _: api::Empty = shim.task("Update", &update).await?;
    let note = bundle.join("oom");
    ensure!(!note.exists(), "it has memory yet");
    let _: api::Empty = shim.task("Kill", &kill(id, 15)).await?;
    let ended: api::WaitResponse = shim.task("Wait", &wait(id, "")).await?;
    ensure!(ended.exit_status == 137 && note.exists(), "{ended:?} and a note: {}", note.exists());
    let _: api::DeleteResponse = shim.task("Delete", &delete(id, "")).await?;
    host.delete(id).map(drop)
}

/// CRI-O asks each runtime for its version when it starts, and complains of one that does not answer.
#[test]
fn shim_tells_its_version_however_it_is_asked() {
    on_node(async |_| {
        for spelling in ["-v", "--version", "-version", "version"] {
            let said = node_command(SHIM, &[spelling])?;
            ensure!(said.contains("Version:"), "{spelling}: {said}");
        }
        Ok(())
    });
}
