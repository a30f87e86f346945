//! Processes executed in running containers.

use anyhow::ensure;
use bulkhead_e2e::terminal::Terminal;
use bulkhead_e2e::{on_node, sh};

#[test]
fn exec_returns_output_errors_and_exit_code() {
    on_node(async |node| {
        let pod = node.pod("exec").await?;
        let container = pod.sleeper("main").await?;
        let answer = pod.exec(&container, &["/bin/sh", "-c", "echo out; echo err >&2; exit 7"]).await?;
        ensure!((answer.stdout.as_str(), answer.stderr.as_str(), answer.code) == ("out\n", "err\n", 7), "{answer:?}");
        // In runc's words, once.
        let missing =
            pod.exec(&container, &["nosuch"]).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
        let said = "exec: \"nosuch\": executable file not found in $PATH";
        ensure!(missing.matches(said).count() == 1 && missing.matches("executable file").count() == 1, "{missing}");
        ensure!(pod.sh(&container, "echo still here").await? == "still here", "a failed exec ended the container");
        Ok(())
    });
}

#[test]
fn exec_has_the_containers_environment_and_root() {
    on_node(async |node| {
        let pod = node.pod("exec-env").await?;
        let mut config = sh("main", "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done");
        config.envs = vec![bulkhead_cli::cri::v1::KeyValue { key: "COLOUR".into(), value: "green blue".into() }];
        config.working_dir = "/tmp".into();
        let container = pod.run(config).await?;
        ensure!(
            pod.sh(&container, "echo $COLOUR; pwd").await? == "green blue\n/tmp",
            "environment or directory is lost"
        );
        ensure!(pod.sh(&container, "cat /proc/1/comm; id -u").await? == "sh\n0", "the exec is not in the container");
        Ok(())
    });
}

#[test]
fn many_execs_at_once_all_answer() {
    on_node(async |node| {
        let pod = node.pod("exec-many").await?;
        let container = pod.sleeper("main").await?;
        let scripts: Vec<_> = (0..8).map(|number| format!("echo {number}; exit {number}")).collect();
        let commands: Vec<_> = scripts.iter().map(|script| ["/bin/sh", "-c", script.as_str()]).collect();
        let execs = commands.iter().map(|command| pod.exec(&container, command));
        for (number, answer) in futures::future::join_all(execs).await.into_iter().enumerate() {
            let answer = answer?;
            ensure!(answer.stdout == format!("{number}\n") && usize::try_from(answer.code)? == number, "{answer:?}");
        }
        Ok(())
    });
}

#[test]
fn exec_with_stdin_gets_it_and_its_end() {
    on_node(async |node| {
        let pod = node.pod("exec-stdin").await?;
        let container = pod.sleeper("main").await?;
        let mut exec = Terminal::exec(&pod, &container, &["head", "-n", "2"], false).await?;
        exec.send("first\nsecond\nthird\n").await?;
        ensure!(exec.finish().await? == 0 && exec.output == "first\nsecond\n", "{:?}", exec.output);
        Ok(())
    });
}

#[test]
fn exec_with_terminal_has_size_echo_and_exit_code() {
    on_node(async |node| {
        let pod = node.pod("exec-tty").await?;
        let container = pod.sleeper("main").await?;
        let mut shell = Terminal::exec(&pod, &container, &["/bin/sh"], true).await?;
        shell.send("test -t 0 && test -t 1 && echo is-a-$((1+1))-way-tty\n").await?;
        shell.expect("is-a-2-way-tty").await?;
        shell.resize(101, 43).await?;
        // Resize and input are separate streams of containerd: the shell asks until the new size is there.
        shell.send("until stty size | grep '43 101'; do :; done; echo sized-$((40+2))\n").await?;
        shell.expect("sized-42").await?;
        shell.send("exit 9\n").await?;
        ensure!(shell.finish().await? == 9, "{:?}", shell.status);
        Ok(())
    });
}

#[test]
fn container_with_terminal_can_be_attached() {
    on_node(async |node| {
        let pod = node.pod("attach-tty").await?;
        let mut config = sh("main", "read line; echo got-$line-$(test -t 0 && echo tty)");
        config.tty = true;
        config.stdin = true;
        let container = pod.run(config).await?;
        let mut terminal = Terminal::attach(&pod, &container, true).await?;
        terminal.send("hello\n").await?;
        terminal.expect("got-hello-tty").await?;
        let status = pod.wait_exit(&container, bulkhead_e2e::PATIENCE).await?;
        ensure!(status.exit_code == 0, "{status:?}");
        Ok(())
    });
}

#[test]
fn exec_that_a_signal_ends_reports_it() {
    on_node(async |node| {
        let pod = node.pod("exec-signal").await?;
        let container = pod.sleeper("main").await?;
        let answer = pod.exec(&container, &["/bin/sh", "-c", "kill -9 $$"]).await?;
        ensure!(answer.code == 137, "{answer:?}");
        Ok(())
    });
}
