//! `ctr run`: a container with no pod around it gets a guest of its own.

use anyhow::ensure;
use bulkhead_e2e::{BUSYBOX, node_command, on_node};

use crate::{BOOT_ID, node_boot_id};

fn ctr(arguments: &[&str]) -> anyhow::Result<String> {
    node_command("ctr", &[&["-n", "k8s.io"], arguments].concat())
}

#[test]
fn ctr_run_runs_in_a_guest() {
    on_node(async |_| {
        let runtime = "io.containerd.bulkhead.v2";
        let out = ctr(&["run", "--rm", "--runtime", runtime, BUSYBOX, "lonely", "/bin/sh", "-c", BOOT_ID])?;
        ensure!(out.trim().len() == 36 && out.trim() != node_boot_id()?, "{out}");
        Ok(())
    });
}

#[test]
fn ctr_run_reports_the_exit_code() {
    on_node(async |_| {
        let runtime = "io.containerd.bulkhead.v2";
        let failed = ctr(&["run", "--rm", "--runtime", runtime, BUSYBOX, "failing", "/bin/sh", "-c", "exit 4"]);
        let again = ctr(&["run", "--rm", "--runtime", runtime, BUSYBOX, "failing", "/bin/sh", "-c", "exit 0"]);
        ensure!(failed.is_err() && again.is_ok(), "{failed:?} {again:?}");
        Ok(())
    });
}
