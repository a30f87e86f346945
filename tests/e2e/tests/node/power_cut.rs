//! A VM that is killed is a machine whose power is cut: what was said to be on the disk is there.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::log;
use bulkhead_e2e::processes::Processes;
use bulkhead_e2e::{Node, PATIENCE, node_command, on_node};

use crate::locks::{IMAGE, says, with_volume};
use crate::root_files::on_the_node;
use crate::volumes::KubeletDir;

/// Bytes of a record of `probe record`.
const RECORD: usize = 3000;

/// After how many records the VMM is killed; where in the next ones it then is, nobody knows.
const KILLED_AFTER: [usize; 4] = [1, 3, 9, 27];

#[test]
fn what_was_fsynced_is_on_the_node_whenever_the_vmm_is_killed() {
    on_node(async |node| {
        node.cri.pull(IMAGE).await?;
        for records in KILLED_AFTER {
            killed_after(node, records).await.with_context(|| format!("killed after {records} records"))?;
        }
        Ok(())
    });
}

async fn killed_after(node: &Node, records: usize) -> Result<()> {
    let name = format!("power-cut-{records}");
    let kubelet = KubeletDir::new(&name)?;
    let volume = kubelet.volume("host", "records")?;
    let pod = node.pod(&name).await?;
    let script = format!("mkdir /{name} && exec probe record /{name} /shared");
    let config = with_volume("writer", &volume, &script);
    let writer = pod.run(config.clone()).await?;
    says(&pod, &config, &format!("stdout F {records}\n")).await?;
    node_command("kill", &["-KILL", &Processes::of(&pod)?.vmm.to_string()])?;
    let status = pod.wait_exit(&writer, PATIENCE).await?;
    ensure!(status.exit_code == 137, "{status:?}");

    let said = log::text_of(&pod.log(&writer).await?, "stdout");
    let last: usize = said.lines().last().context("no record")?.parse()?;
    println!("power cut: {last} records were safe");
    ensure!(last >= records, "{said}");
    for place in [on_the_node(&name)?, volume] {
        are_whole(&place, last).with_context(|| format!("in {}", place.display()))?;
    }
    node.cri.remove_pod(&pod.id).await
}

/// Whether a directory has all records up to this one, one after the other, and this or a later one in a file that was replaced
/// with each: the line that tells of a record may be lost on its way.
fn are_whole(place: &Path, last: usize) -> Result<()> {
    for name in ["log", "mapped"] {
        let content = fs::read(place.join(name))?;
        for (number, found) in (1..=last).zip(content.chunks(RECORD).chain(std::iter::repeat(&[][..]))) {
            ensure!(found == record(number), "{name}: record {number} of {last} is not whole");
        }
    }
    let current = fs::read(place.join("current"))?;
    let number: usize = std::str::from_utf8(current.get(..8).context("current: no record")?)?.parse()?;
    ensure!(number >= last && current == record(number), "current: record {number} is old or not whole");
    Ok(())
}

fn record(number: usize) -> Vec<u8> {
    format!("{number:08}").repeat(RECORD / 8).into_bytes()
}
