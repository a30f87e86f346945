//! Execs: output, exit codes, errors, limits of time, and their end together with the container's.

use std::time::Duration;

use anyhow::Result;
use bulkhead_cli::cri::v1;

use super::lifecycle::cause;
use crate::compat::Area::Lifecycle;
use crate::compat::{Act, Stage, act, shell};

/// Execs by ExecSync, as probes and hooks are made.
pub fn acts() -> Vec<Act> {
    vec![
        act!(Lifecycle, "exec with output and exit code", |stage| {
            let mut said = String::new();
            for code in [0, 1, 2, 126, 127, 128, 137, 255] {
                said +=
                    &exec(stage, &["/bin/sh", "-c", &format!("echo out {code}; echo err >&2; exit {code}")]).await?;
            }
            Ok(said)
        }),
        act!(Lifecycle, "exec ended by signals", |stage| {
            let mut said = String::new();
            for number in [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 30, 31] {
                said += &exec(stage, &["/bin/sh", "-c", &format!("kill -{number} $$; echo survived")]).await?;
            }
            Ok(said)
        }),
        act!(Lifecycle, "exec of a missing program", |stage| { exec(stage, &["/no/such"]).await }),
        act!(Lifecycle, "exec of what is not in PATH", |stage| { exec(stage, &["no-such"]).await }),
        act!(Lifecycle, "exec of what is no program", |stage| { exec(stage, &["/etc/passwd"]).await }),
        act!(Lifecycle, "exec of a directory", |stage| { exec(stage, &["/etc"]).await }),
        act!(Lifecycle, "exec with many and long arguments", |stage| {
            let long = "x".repeat(100_000);
            exec(stage, &["/bin/sh", "-c", "echo ${#1} $# \"$3\"", "sh", &long, "", "a  b", "\u{fc}\n*"]).await
        }),
        act!(Lifecycle, "exec with large output", |stage| {
            let id = stage.sleeper().await?;
            let answer = stage.shell(&id, "seq 1 60000; seq 1 20000 >&2").await?;
            Ok(format!("{} {} {}", answer.stdout.len(), answer.stderr.len(), answer.stdout.ends_with("60000\n")))
        }),
        act!(Lifecycle, "exec that leaves a child with its streams", |stage| {
            let id = stage.sleeper().await?;
            let answer = stage.shell(&id, "sleep 2 & echo parent; exit 5").await?;
            Ok(format!("{answer:?}"))
        }),
        act!(Lifecycle, "exec beyond its time", |stage| {
            let id = stage.sleeper().await?;
            let request = v1::ExecSyncRequest {
                container_id: id.clone(),
                cmd: ["/bin/sh", "-c", "exec sleep 1234"].map(str::to_owned).to_vec(),
                timeout: 2,
            };
            let answer = stage.cri().runtime().exec_sync(request).await;
            let left = stage.shell(&id, "ps -o args | grep -c '[s]leep 1234'").await?;
            Ok(format!(
                "{:?}\n{left:?}",
                answer.map(|_| ()).map_err(|error| (error.code(), error.message().replace(&id, "ID")))
            ))
        }),
        act!(Lifecycle, "exec in what has ended", |stage| {
            let (id, _) = stage.run_to_end(shell("exec-ended", "true")).await?;
            Ok(stage.shell(&id, "true").await.err().map(|error| error.to_string()).unwrap_or_default())
        }),
        act!(Lifecycle, "exec in what was not started", |stage| {
            let id = stage.create(shell("exec-created", "true")).await?;
            let answer = stage.shell(&id, "true").await.err().map(|error| error.to_string()).unwrap_or_default();
            stage.remove_container(&id).await?;
            Ok(answer)
        }),
        act!(Lifecycle, "execs that run when the container stops", |stage| {
            let id = stage.run(shell("exec-stop", "exec sleep 1000")).await?;
            let ends = async {
                // The exec has begun when its file is there.
                stage.shell(&id, "until [ -e /begun ]; do sleep 0.1; done").await?;
                stage.stop(&id, Duration::ZERO).await
            };
            let (exec, stopped) = tokio::join!(stage.shell(&id, "touch /begun; exec sleep 1000"), ends);
            stopped?;
            Ok(format!("{:?} {}", exec.map(|exec| exec.code).ok(), stage.container(&id).await?.exit_code))
        }),
        act!(Lifecycle, "exec in a container with control groups of its own", |stage| {
            let mut config = shell(
                "nested-groups",
                "mount -o remount,rw /sys/fs/cgroup; cd /sys/fs/cgroup && mkdir inner && echo 1 > inner/cgroup.procs && echo +pids +memory > cgroup.subtree_control; echo ready; exec sleep 1000",
            );
            crate::compat::security(&mut config).capabilities =
                Some(v1::Capability { add_capabilities: vec!["SYS_ADMIN".into()], ..Default::default() });
            let id = stage.run(config.clone()).await?;
            stage.wait_log(&config, "ready").await?;
            let answer = stage.shell(&id, "cat /proc/self/cgroup; cat /sys/fs/cgroup/cgroup.subtree_control").await;
            let answer = answer.map_err(|error| error.to_string());
            Ok(format!("{answer:?}\n{}", stage.text(&id, "stdout").await?))
        }),
        act!(Lifecycle, "exec with a file mode mask and directory of its own", |stage| {
            let mut config = shell("exec-directory", "exec sleep 1000");
            config.working_dir = "/tmp".into();
            let id = stage.run(config).await?;
            Ok(format!(
                "{:?}",
                stage
                    .shell(&id, "pwd; umask; touch made; stat -c %a made; ulimit -c; cat /proc/self/oom_score_adj")
                    .await?
            ))
        }),
    ]
}

/// Executes in the group's sleeper.
async fn exec(stage: &Stage, command: &[&str]) -> Result<String> {
    let id = stage.sleeper().await?;
    Ok(match stage.exec(&id, command).await {
        Ok(output) => format!("{output:?}\n"),
        Err(error) => format!("error: {}\n", cause(&error)),
    })
}
