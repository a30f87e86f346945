//! Standard streams: logs, attach, terminals, input of every size.

use bulkhead_cli::cri::{status, v1};

use crate::PATIENCE;
use crate::compat::Area::Lifecycle;
use crate::compat::stage::ending;
use crate::compat::{Act, act, shell};
use crate::terminal::Terminal;

/// Logs, attachments and execs with input.
pub fn acts() -> Vec<Act> {
    let mut acts = logs();
    acts.extend(attachments());
    acts.extend(inputs());
    acts
}

fn logs() -> Vec<Act> {
    vec![
        act!(Lifecycle, "log with both streams and partial lines", |stage| {
            let script = "echo out; sleep 0.5; echo err >&2; sleep 0.5; printf 'no end'; sleep 0.5; printf '\\n\\n'; head -c 40000 /dev/zero | tr '\\0' x; echo; printf 'the end'; sleep 1";
            let (id, _) = stage.run_to_end(shell("log", script)).await?;
            stage.tagged_log(&id).await
        }),
        act!(Lifecycle, "log with bytes that are no text", |stage| {
            let (id, _) = stage.run_to_end(shell("bytes", "printf 'a\\000b\\377c\\033[1m\\r\\nd\\n'; sleep 1")).await?;
            let bytes = std::fs::read(stage.log_path(&id).await?)?;
            let after_time =
                |line: &[u8]| line.iter().position(|&byte| byte == b' ').map(|at| line.split_at(at).1.to_vec());
            let lines: Vec<_> = bytes.split(|&byte| byte == b'\n').filter_map(after_time).collect();
            Ok(format!("{lines:?}"))
        }),
        act!(Lifecycle, "log rotated while the container writes", |stage| {
            let config =
                shell("rotated", "echo before; until [ -e /go ]; do sleep 0.1; done; echo after; exec sleep 1000");
            let id = stage.run(config.clone()).await?;
            stage.wait_log(&config, "before").await?;
            let path = stage.log_path(&id).await?;
            std::fs::rename(&path, path.with_extension("old"))?;
            let request = v1::ReopenContainerLogRequest { container_id: id.clone() };
            stage.cri().runtime().reopen_container_log(request).await.map_err(status)?;
            stage.shell(&id, "touch /go").await?;
            stage.wait_log(&config, "after").await?;
            let old = std::fs::read_to_string(path.with_extension("old"))?;
            Ok(format!(
                "{} old lines, with before: {}\n{}",
                old.lines().count(),
                old.contains("before"),
                stage.tagged_log(&id).await?
            ))
        }),
        act!(Lifecycle, "log of a terminal", |stage| {
            let mut config = shell(
                "tty-log",
                "echo out; echo err >&2; tty; stty size; test -t 0 && test -t 1 && test -t 2 && echo all; env | grep TERM; stat -c '%t %u %g %a' $(tty); stty -a | grep -o 'speed [0-9]* baud'; stty -a | grep -oE '(isig|icanon|echo|opost|onlcr)' | sort; readlink /dev/console; ls -ln /dev/console /dev/pts | cut -c1-40; sleep 1",
            );
            config.tty = true;
            let (id, end) = stage.run_to_end(config).await?;
            Ok(ending(&end) + &stage.tagged_log(&id).await?)
        }),
        act!(Lifecycle, "standard input closed unless asked for", |stage| {
            let (id, _) = stage
                .run_to_end(shell(
                    "no-stdin",
                    "cat; echo $?; readlink /proc/self/fd/0; ls -l /proc/self/fd 2>/dev/null | wc -l; sleep 1",
                ))
                .await?;
            stage.tagged_log(&id).await
        }),
    ]
}

fn attachments() -> Vec<Act> {
    vec![
        act!(Lifecycle, "attach, detach and attach again", |stage| {
            let mut config = shell(
                "attach",
                "while read line; do echo got-$line; [ \"$line\" != end ] || exit 3; done; echo eof; exit 4",
            );
            config.stdin = true;
            let id = stage.run(config.clone()).await?;
            let mut first = Terminal::attach(&stage.pod, &id, false).await?;
            first.send("one\n").await?;
            first.expect("got-one").await?;
            drop(first);
            // containerd has to notice, or it takes the second for one that came too late.
            stage.shell(&id, "sleep 2").await?;
            let mut second = Terminal::attach(&stage.pod, &id, false).await?;
            second.send("two\nend\n").await?;
            second.expect("got-end").await?;
            let end = stage.wait_exit(&id, PATIENCE).await?;
            Ok(ending(&end) + &stage.tagged_log(&id).await?)
        }),
        act!(Lifecycle, "input that may be attached once ends with the attachment", |stage| {
            let mut config = shell("once", "while read line; do echo got-$line; done; echo eof; sleep 1; exit 4");
            config.stdin = true;
            config.stdin_once = true;
            let id = stage.run(config.clone()).await?;
            let mut only = Terminal::attach(&stage.pod, &id, false).await?;
            only.send("one\n").await?;
            only.expect("got-one").await?;
            drop(only);
            let end = stage.wait_exit(&id, PATIENCE).await?;
            Ok(ending(&end) + &stage.tagged_log(&id).await?)
        }),
        act!(Lifecycle, "attach to a terminal with its size", |stage| {
            let mut config = shell(
                "attach-tty",
                "until [ \"$(stty size)\" = '43 101' ]; do sleep 0.1; done; stty size; while read line; do echo got-$line; [ \"$line\" != end ] || exit 3; done",
            );
            config.tty = true;
            config.stdin = true;
            let id = stage.run(config.clone()).await?;
            let mut terminal = Terminal::attach(&stage.pod, &id, true).await?;
            terminal.resize(101, 43).await?;
            terminal.expect("43 101").await?;
            terminal.send("abc\u{7f}d\nend\n").await?;
            terminal.expect("got-end").await?;
            let end = stage.wait_exit(&id, PATIENCE).await?;
            Ok(format!("{}{}", ending(&end), terminal.output.contains("got-abd")))
        }),
        act!(Lifecycle, "interrupt typed at a terminal", |stage| {
            let id = stage.sleeper().await?;
            // The child says it: a shell that is interrupted before it waits has its trap run after that.
            let script = "trap 'echo interrupted; exit 7' INT; sh -c 'echo ready; exec sleep 1000'; echo went on";
            let mut shell = Terminal::exec(&stage.pod, &id, &["/bin/sh", "-c", script], true).await?;
            shell.expect("ready").await?;
            shell.send("\u{3}").await?;
            let code = shell.finish().await?;
            Ok(format!("{code} {}", shell.output))
        }),
        act!(Lifecycle, "terminal of an exec", |stage| {
            // Its own: the number of a terminal depends on what others there are in the container.
            let id = stage.run(shell("terminal", "exec sleep 3600")).await?;
            let mut shell = Terminal::exec(&stage.pod, &id, &["/bin/sh", "-c", "tty; test -t 0 && test -t 2 && echo all; stat -c '%F %u %g %a' $(tty); env | sort; ps -o tty >/tmp/ttys; sort -u /tmp/ttys; stty -a | grep -oE '(isig|icanon|opost|onlcr)'"], true).await?;
            let code = shell.finish().await?;
            Ok(format!("{code}\n{}", shell.output))
        }),
        act!(Lifecycle, "end of input typed at a terminal", |stage| {
            let id = stage.sleeper().await?;
            let script = "echo ready; cat; echo ended; exit 5";
            let mut shell = Terminal::exec(&stage.pod, &id, &["/bin/sh", "-c", script], true).await?;
            shell.expect("ready").await?;
            shell.send("line\n\u{4}").await?;
            let code = shell.finish().await?;
            Ok(format!("{code} {}", shell.output))
        }),
    ]
}

fn inputs() -> Vec<Act> {
    vec![
        act!(Lifecycle, "exec with input through the kubelet's stream", |stage| {
            let id = stage.sleeper().await?;
            let mut exec = Terminal::exec(&stage.pod, &id, &["head", "-c", "300000"], false).await?;
            let line = "0123456789".repeat(1000);
            for _ in 0..31 {
                exec.send(&line).await?;
            }
            Ok(format!("{} {} {:?}", exec.finish().await?, exec.output.len(), exec.errors))
        }),
        act!(Lifecycle, "exec with input of 0, 1 and 4 Mi bytes and its end", |stage| {
            let id = stage.sleeper().await?;
            let mut said = String::new();
            // ctr 1.6 forgets an end that comes before it has made the exec.
            for (number, size) in [0_usize, 1, 4 << 20].into_iter().enumerate() {
                let exec =
                    format!("ctr -n k8s.io task exec --exec-id input-{number} {id} /bin/sh -c 'wc -c; exit {number}'");
                said += &stage.on_node(format!("(sleep 3; head -c {size} /dev/zero) | {exec}")).await?;
            }
            Ok(said)
        }),
        act!(Lifecycle, "exec with input whose end comes before its output", |stage| {
            let id = stage.sleeper().await?;
            let exec = format!(
                "ctr -n k8s.io task exec --exec-id half {id} /bin/sh -c 'n=$(wc -c); sleep 1; seq 1 20000; echo $n'"
            );
            stage.on_node(format!("head -c 100000 /dev/zero | {exec} | tail -n 1")).await
        }),
        act!(Lifecycle, "input to a program that does not read it", |stage| {
            let id = stage.sleeper().await?;
            let exec = format!("ctr -n k8s.io task exec --exec-id unread {id} /bin/sh -c 'exit 6'");
            stage.on_node(format!("head -c 1000000 /dev/zero | {exec} 2>/dev/null")).await
        }),
    ]
}
