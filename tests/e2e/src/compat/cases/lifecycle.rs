//! A container's life as the kubelet drives it: create, start, signals, stop, restart, removal.

use std::time::Duration;

use anyhow::Result;
use bulkhead_cli::cri::v1;

use crate::compat::Area::Lifecycle;
use crate::compat::stage::ending;
use crate::compat::{Act, Stage, act, security, shell};

/// Containers that end in every way.
pub fn acts() -> Vec<Act> {
    let mut acts = vec![
        ends("exit code 0", "exit 0"),
        ends("exit code 1", "exit 1"),
        ends("exit code 255", "exit 255"),
        ends("exit code of a child ended by SIGSEGV", "sh -c 'kill -SEGV $$'; exit $?"),
        ends("end of init leaves no children", "sleep 1000 & sleep 1000 & exit 4"),
        ends(
            "orphans are reaped by a shell as init",
            "(sleep 0.1 & ) ; (true & ) ; sleep 1; ps -o comm | grep -c sleep; exit 6",
        ),
        fails("missing program", "/no/such/program"),
        fails("program not in PATH", "no-such-program"),
        fails("program without permission", "/etc/passwd"),
        fails("directory as program", "/etc"),
        unfit("program with a missing interpreter", "/bin/no-interpreter"),
        unfit("program of another machine", "/bin/other-machine"),
    ];
    acts.extend(bad_configurations());
    acts.extend(stops());
    acts.extend(memory());
    acts.extend(task_api());
    acts
}

fn identifier(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' }).collect()
}

/// A container that ends by itself.
fn ends(name: &'static str, script: &'static str) -> Act {
    Act::new(Lifecycle, name, move |stage| {
        Box::pin(async move {
            let (_, status) = stage.run_to_end(shell(&identifier(name), script)).await?;
            Ok(ending(&status))
        })
    })
}

/// The end of an error's text: what went wrong, without the runtime's name and its account of where it was.
pub fn cause(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    let from =
        ["exec: \"", "unable to find user", "no users found", "mkdir ", "chdir to cwd", "stat ", "error mounting"];
    let at = from.iter().filter_map(|word| text.find(word)).min();
    at.and_then(|at| text.get(at..)).unwrap_or(&text).to_owned()
}

/// A container that cannot be started.
async fn failure(stage: &Stage, config: v1::ContainerConfig) -> Result<String> {
    let id = match stage.create(config).await {
        Ok(id) => id,
        Err(error) => return Ok(format!("not created: {}\n", cause(&error))),
    };
    let started = stage.start(&id).await;
    let status = stage.container(&id).await?;
    let told = started.err().map_or_else(|| "started".to_owned(), |error| cause(&error));
    let message = cause(&anyhow::anyhow!("{}", status.message));
    stage.remove_container(&id).await?;
    Ok(format!(
        "start: {told}\nstate: {:?}\nexit code: {}\nreason: {}\nmessage: {message}\n",
        status.state(),
        status.exit_code,
        status.reason
    ))
}

fn fails(name: &'static str, program: &'static str) -> Act {
    Act::new(Lifecycle, name, move |stage| {
        Box::pin(async move {
            let mut config = shell(&identifier(name), "");
            config.command = vec![program.to_owned()];
            failure(stage, config).await
        })
    })
}

/// A container that starts, and whose program is then refused by the kernel: only its log can tell why.
fn unfit(name: &'static str, program: &'static str) -> Act {
    Act::new(Lifecycle, name, move |stage| {
        Box::pin(async move {
            let mut config = shell(&identifier(name), "");
            config.command = vec![program.to_owned()];
            let (id, status) = stage.run_to_end(config).await?;
            Ok(ending(&status) + &stage.text(&id, "stderr").await?)
        })
    })
}

fn bad_configurations() -> Vec<Act> {
    vec![
        act!(Lifecycle, "unknown user name", |stage| {
            let mut config = shell("unknown-user-name", "true");
            security(&mut config).run_as_username = "nobody-knows".into();
            failure(stage, config).await
        }),
        act!(Lifecycle, "working directory that is a file", |stage| {
            let mut config = shell("bad-directory", "true");
            config.working_dir = "/etc/passwd".into();
            // The two word it differently: what the kubelet acts on is the code and the reason.
            let told = failure(stage, config).await?;
            Ok(told.lines().filter(|line| !line.starts_with("start") && !line.starts_with("message")).collect())
        }),
        act!(Lifecycle, "volume onto a missing file's directory", |stage| {
            let mut config = shell("deep-volume", "ls /not/yet/there; stat -c '%a %u' /not /not/yet");
            config.mounts = vec![stage.place.mount("deep", "/not/yet/there")];
            let (id, status) = stage.run_to_end(config).await?;
            Ok(ending(&status) + &stage.text(&id, "stdout").await?)
        }),
        act!(Lifecycle, "container created twice under one name", |stage| {
            let id = stage.create(shell("twice", "true")).await?;
            let again = stage.create(shell("twice", "true")).await;
            stage.remove_container(&id).await?;
            Ok(again.err().map_or_else(|| "created".into(), |error| error.to_string()))
        }),
        act!(Lifecycle, "start of what has ended", |stage| {
            let (id, _) = stage.run_to_end(shell("again", "true")).await?;
            let again = stage.start(&id).await;
            Ok(again.err().map_or_else(|| "started".into(), |error| error.to_string()))
        }),
        act!(Lifecycle, "removal of a created container", |stage| {
            let id = stage.create(shell("created", "true")).await?;
            let state = stage.container(&id).await?.state();
            stage.remove_container(&id).await?;
            let after = stage.container(&id).await.err().map(|error| error.to_string());
            Ok(format!("{state:?}, then {after:?}"))
        }),
        act!(Lifecycle, "removal of a running container", |stage| {
            let id = stage.run(shell("running", "exec sleep 1000")).await?;
            stage.remove_container(&id).await?;
            Ok(format!("{:?}", stage.container(&id).await.err().map(|error| error.to_string())))
        }),
        act!(Lifecycle, "restart under a new attempt has fresh files", |stage| {
            let mut seen = String::new();
            for attempt in 0..3 {
                let mut config = shell("restarted", "ls /mark 2>&1; touch /mark; exit 3");
                config.metadata = Some(v1::ContainerMetadata { name: "restarted".into(), attempt });
                config.log_path = format!("restarted_{attempt}.log");
                let (id, status) = stage.run_to_end(config).await?;
                let metadata = status.metadata.clone().unwrap_or_default();
                seen +=
                    &format!("attempt {}\n{}{}", metadata.attempt, ending(&status), stage.text(&id, "stdout").await?);
            }
            Ok(seen)
        }),
    ]
}

/// Stops a container once it has said `ready`.
async fn stopped(stage: &Stage, config: v1::ContainerConfig, grace: u64) -> Result<String> {
    let id = stage.run(config.clone()).await?;
    stage.wait_log(&config, "ready").await?;
    stage.stop(&id, Duration::from_secs(grace)).await?;
    Ok(ending(&stage.container(&id).await?) + &stage.text(&id, "stdout").await?)
}

fn stops() -> Vec<Act> {
    vec![
        act!(Lifecycle, "stop honoured with a code of its own", |stage| {
            let script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.2; done";
            stopped(stage, shell("honours", script), 60).await
        }),
        act!(Lifecycle, "stop without a handler waits and kills", |stage| {
            stopped(stage, shell("no-handler", "echo ready; exec sleep 1000"), 2).await
        }),
        act!(Lifecycle, "stop of what ignores it kills", |stage| {
            let script = "trap '' TERM; echo ready; while :; do sleep 0.2; done";
            stopped(stage, shell("ignores", script), 2).await
        }),
        act!(Lifecycle, "stop without grace kills at once", |stage| {
            let script = "trap 'echo heard' TERM; echo ready; while :; do sleep 0.2; done";
            stopped(stage, shell("no-grace", script), 0).await
        }),
        act!(Lifecycle, "stop of what a shell started", |stage| {
            let script =
                "sleep 1000 & child=$!; trap 'kill $child; wait $child; exit $?' TERM; echo ready; wait $child; exit 1";
            stopped(stage, shell("parent", script), 60).await
        }),
        act!(Lifecycle, "stop signal of the image", |stage| {
            let script =
                "trap 'echo usr1; exit 9' USR1; trap 'echo term; exit 8' TERM; echo ready; while :; do sleep 0.2; done";
            let mut config = shell("image-signal", script);
            config.image = Some(v1::ImageSpec { image: own_image(stage).await?, ..Default::default() });
            stopped(stage, config, 60).await
        }),
        act!(Lifecycle, "stop twice", |stage| {
            let id = stage.run(shell("stop-twice", "exec sleep 1000")).await?;
            stage.stop(&id, Duration::ZERO).await?;
            stage.stop(&id, Duration::ZERO).await?;
            Ok(ending(&stage.container(&id).await?))
        }),
        act!(Lifecycle, "user, directory and variables of the image", |stage| {
            let mut config = shell("image-own", "");
            config.image = Some(v1::ImageSpec { image: own_image(stage).await?, ..Default::default() });
            config.command = Vec::new();
            config.args = vec!["id; pwd; env | sort; stat -c '%u %a' . /home/app".into()];
            let (id, status) = stage.run_to_end(config).await?;
            Ok(ending(&status) + &stage.text(&id, "stdout").await?)
        }),
        act!(Lifecycle, "DNS configuration where the image has a link to nothing", |stage| {
            let mut config = shell("image-link", "");
            config.image = Some(v1::ImageSpec { image: own_image(stage).await?, ..Default::default() });
            config.command = Vec::new();
            let script = "readlink /etc/resolv.conf; cat /etc/resolv.conf; cd /run/systemd/resolve; cat stub-resolv.conf; stat -c '%F %a %u' . stub-resolv.conf";
            config.args = vec![script.into()];
            let (id, status) = stage.run_to_end(config).await?;
            Ok(ending(&status) + &stage.tagged_log(&id).await?)
        }),
        act!(Lifecycle, "preStop runs before the stop signal", |stage| {
            let script = "trap 'echo stopped; exit 0' TERM; echo ready; while :; do sleep 0.2; done";
            let config = shell("pre-stop", script);
            let id = stage.run(config.clone()).await?;
            let hook = stage.shell(&id, "echo started > /proc/1/fd/1").await?;
            stage.wait_log(&config, "ready").await?;
            let before = stage.shell(&id, "echo hook > /proc/1/fd/1; exit 3").await?;
            stage.stop(&id, Duration::from_secs(60)).await?;
            let log = stage.text(&id, "stdout").await?;
            let mut lines: Vec<_> = log.lines().collect();
            // postStart and the entry point run side by side.
            lines.get_mut(..2).map(<[&str]>::sort);
            Ok(format!("{hook:?} {before:?} {lines:?} {}", ending(&stage.container(&id).await?)))
        }),
        act!(Lifecycle, "termination message", |stage| {
            let mut config = shell(
                "message",
                "echo last words > /dev/termination-log; ls -ln /dev/termination-log | cut -c1-20; exit 2",
            );
            let file = stage.place.path("termination-log");
            std::fs::write(&file, "")?;
            config.mounts = vec![stage.place.mount("termination-log", "/dev/termination-log")];
            let (id, status) = stage.run_to_end(config).await?;
            Ok(ending(&status) + &stage.text(&id, "stdout").await? + &std::fs::read_to_string(file)?)
        }),
    ]
}

/// The image with a configuration of its own.
async fn own_image(stage: &Stage) -> Result<String> {
    let image = "127.0.0.1:5000/compat-own:latest";
    stage.cri().pull(image).await?;
    Ok(image.to_owned())
}

fn limited(name: &str, script: &str) -> v1::ContainerConfig {
    let mut config = shell(name, script);
    config.linux.get_or_insert_default().resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 24 << 20,
        memory_swap_limit_in_bytes: 24 << 20,
        oom_score_adj: 1000,
        ..Default::default()
    });
    config
}

/// Fills memory until it is killed.
const FILL: &str = "tail -c 200000000 /dev/zero";

fn memory() -> Vec<Act> {
    vec![
        act!(Lifecycle, "out of memory", |stage| {
            let (_, status) = stage.run_to_end(limited("oom", &format!("exec {FILL}"))).await?;
            Ok(ending(&status))
        }),
        act!(Lifecycle, "out of memory in a child only", |stage| {
            // Containers of Kubernetes are killed as a whole only with cgroup v2 and a newer kubelet than containerd 1.6.
            let script = format!("{FILL}; echo child $?; grep oom_kill /sys/fs/cgroup/memory.events; exit 7");
            let (id, status) = stage.run_to_end(limited("oom-child", &script)).await?;
            Ok(ending(&status) + &stage.text(&id, "stdout").await?)
        }),
        act!(Lifecycle, "update of resources", |stage| {
            let id = stage.run(limited("update", "exec sleep 1000")).await?;
            let read = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight memory.swap.max";
            let before = stage.shell(&id, read).await?.stdout;
            let request = v1::UpdateContainerResourcesRequest {
                container_id: id.clone(),
                linux: Some(v1::LinuxContainerResources {
                    cpu_period: 50_000,
                    cpu_quota: 25_000,
                    cpu_shares: 2048,
                    memory_limit_in_bytes: 48 << 20,
                    memory_swap_limit_in_bytes: 48 << 20,
                    ..Default::default()
                }),
                ..Default::default()
            };
            let answer = stage.cri().runtime().update_container_resources(request).await;
            let after = stage.shell(&id, read).await?.stdout;
            Ok(format!("{before}{:?}\n{after}", answer.map(|_| ()).map_err(|status| status.to_string())))
        }),
        act!(Lifecycle, "fields of the stats", |stage| {
            let id = stage.sleeper().await?;
            let request = v1::ContainerStatsRequest { container_id: id.clone() };
            let answer = stage.cri().runtime().container_stats(request).await;
            let stats = answer.map_err(bulkhead_cli::cri::status)?.into_inner().stats.unwrap_or_default();
            let cpu = stats.cpu.unwrap_or_default();
            let memory = stats.memory.unwrap_or_default();
            let metadata = stats.attributes.and_then(|attributes| attributes.metadata);
            Ok(format!(
                "{metadata:?}\ncpu: {} {}\nmemory: working set {} available {} usage {} rss {} faults {} {}\nlayer {}",
                cpu.usage_core_nano_seconds.is_some_and(|value| value.value > 0),
                cpu.usage_nano_cores.is_some(),
                memory.working_set_bytes.is_some_and(|value| value.value > 0),
                memory.available_bytes.is_some(),
                memory.usage_bytes.is_some_and(|value| value.value > 0),
                memory.rss_bytes.is_some(),
                memory.page_faults.is_some(),
                memory.major_page_faults.is_some(),
                stats.writable_layer.is_some(),
            ))
        }),
    ]
}

fn task_api() -> Vec<Act> {
    vec![
        act!(Lifecycle, "pause and resume", |stage| {
            let id =
                stage.run(shell("paused", "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.1; done")).await?;
            stage.shell(&id, "until [ -s /count ]; do :; done").await?;
            let paused = stage.on_node(format!("ctr -n k8s.io task pause {id}")).await?;
            let list = format!("ctr -n k8s.io task ls | grep {id} | awk '{{ print $3 }}'");
            let state = stage.on_node(list.clone()).await?;
            let exec = stage.shell(&id, "true").await.err().map(|error| error.to_string().contains("paused"));
            let again = stage.on_node(format!("ctr -n k8s.io task pause {id} >/dev/null 2>&1")).await?;
            let resumed = stage.on_node(format!("ctr -n k8s.io task resume {id}")).await?;
            let after = stage.on_node(list).await?;
            let goes_on = stage
                .shell(&id, "read a < /count; until read b < /count && [ \"$b\" != \"$a\" ]; do :; done; echo goes on")
                .await?;
            Ok(format!("{paused}{state}exec refused: {exec:?}\nagain {again}{resumed}{after}{goes_on:?}"))
        }),
        act!(Lifecycle, "stop of a paused container", |stage| {
            let id = stage.run(shell("stop-paused", "exec sleep 1000")).await?;
            let paused = stage.on_node(format!("ctr -n k8s.io task pause {id}")).await?;
            stage.stop(&id, Duration::ZERO).await?;
            Ok(paused + &ending(&stage.container(&id).await?))
        }),
        act!(Lifecycle, "checkpoint", |stage| {
            let id = stage.sleeper().await?;
            // runc would leave it to CRIU, which the node does not have.
            let answer = format!(
                "said=$(ctr -n k8s.io task checkpoint {id} 2>&1); code=$?
                 case $said in *'not implemented'* | *criu*) echo cannot be done;; *) echo \"$said\";; esac; exit $code"
            );
            let answer = stage.on_node(answer).await?;
            Ok(format!("{answer}{}", stage.shell(&id, "echo alive").await?.stdout))
        }),
        act!(Lifecycle, "kill of every process", |stage| {
            let script = "sleep 1000 & sleep 1000 & trap 'echo first; wait; echo children gone; exit 3' USR1; echo ready; wait; wait";
            let config = shell("kill-all", script);
            let id = stage.run(config.clone()).await?;
            stage.wait_log(&config, "ready").await?;
            let killed = stage.on_node(format!("ctr -n k8s.io task kill --all -s USR1 {id}")).await?;
            let status = stage.wait_exit(&id, crate::PATIENCE).await?;
            Ok(killed + &ending(&status) + &stage.text(&id, "stdout").await?)
        }),
        act!(Lifecycle, "signals by number", |stage| {
            let script = "for s in 1 2 10 12 15 28 34 64; do trap \"echo got $s\" $s; done; echo ready; while :; do sleep 0.1; done";
            let config = shell("signals", script);
            let id = stage.run(config.clone()).await?;
            stage.wait_log(&config, "ready").await?;
            let kill = format!("ctr -n k8s.io task kill -s $s {id} || exit 1; sleep 0.3");
            let said = stage.on_node(format!("for s in 1 2 10 12 15 28 34 64; do {kill}; done")).await?;
            stage.wait_log(&config, "got 64\n").await?;
            Ok(said + &stage.text(&id, "stdout").await?)
        }),
        act!(Lifecycle, "signals that end what has no handler", |stage| {
            let mut said = String::new();
            // A pid namespace's init does not get a signal without a handler, SIGKILL from outside excepted.
            for (number, patience) in [(9, crate::PATIENCE), (15, Duration::from_secs(2))] {
                let id = stage.run(shell(&format!("signal-{number}"), "exec sleep 1000")).await?;
                said += &stage.on_node(format!("ctr -n k8s.io task kill -s {number} {id}")).await?;
                let exit = stage.wait_exit(&id, patience).await;
                said += &exit.map_or_else(|_| "goes on\n".into(), |status| ending(&status));
                stage.stop(&id, Duration::ZERO).await?;
            }
            Ok(said)
        }),
        act!(Lifecycle, "kill of what has ended", |stage| {
            let (id, _) = stage.run_to_end(shell("kill-ended", "true")).await?;
            stage.on_node(format!("ctr -n k8s.io task kill {id} 2>&1 | sed 's/{id}/ID/g'")).await
        }),
        act!(Lifecycle, "ctr's list of processes", |stage| {
            let config = shell("list", "(echo ready; exec sleep 1000) & exec sleep 1000");
            let id = stage.run(config.clone()).await?;
            stage.wait_log(&config, "ready").await?;
            stage.on_node(format!("ctr -n k8s.io task ps {id} | wc -l")).await
        })
        .differs("each container and exec has one pid on the node; the processes that they start have pids in the guest only"),
        act!(Lifecycle, "metrics of the task", |stage| {
            let id = stage.sleeper().await?;
            stage.on_node(format!("ctr -n k8s.io task metrics --format json {id} | grep -oE '\"(pids|cpu|memory|io|memory_events|usage_usec|usage|anon|pgfault)\":' | sort -u")).await
        }),
    ]
}
