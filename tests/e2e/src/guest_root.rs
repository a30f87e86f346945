//! Root of the guest itself, outside of every container: what a container with all capabilities can become, and from where
//! the host has to be out of reach.
//!
//! The guest's kernel hands core dumps to a program that it starts as root in its first namespaces (core(5)); a privileged
//! container names one of its own.

use anyhow::{Context, Result};
use bulkhead_cli::cri::v1;

use crate::{HANDLER, Node, TestPod};

/// The image with what a hostile container does.
const ESCAPE: &str = "127.0.0.1:5000/escape:latest";

/// A pod whose containers may be privileged, and their image.
pub async fn pod(node: &Node, name: &str) -> Result<TestPod> {
    node.cri.pull(ESCAPE).await?;
    let privileged = |pod: &mut v1::PodSandboxConfig| {
        let linux = pod.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
    };
    node.pod_with(name, HANDLER, privileged).await
}

/// A container with all capabilities that stays.
pub fn privileged(name: &str) -> v1::ContainerConfig {
    let stay = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done";
    let mut config = bulkhead_cli::cri::container_config(name, ESCAPE, &["/bin/sh", "-c", stay]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    config
}

/// Runs a shell script as the guest's root and returns what it prints on either stream. `$own` in it is the container's
/// root directory, `$run` runs an applet of its busybox.
pub async fn sh(pod: &TestPod, container: &str, script: &str) -> Result<String> {
    let script = format!(
        "own=/proc/$1/root; run=$own/bin/busybox; exec 3<&0 > $own/out 2>&1 < /dev/null\n{script}\necho the end\n"
    );
    let file = format!("cat > /script <<'the end of the script'\n{script}\nthe end of the script\n");
    pod.sh(container, &file).await?;
    // With a limit the kernel keeps the process that has died as long as the program has the pipe, its descriptor 3.
    let crash = "rm -f /out; cd /proc/sys/kernel && echo 1 > core_pipe_limit && \
                 echo '|/proc/%P/root/bin/busybox sh /proc/%P/root/script %P' > core_pattern && \
                 sh -c 'kill -SEGV $$'; cat /out";
    let out = pod.exec(container, &["/bin/sh", "-c", crash]).await?.stdout;
    let out =
        out.strip_suffix("the end\n").with_context(|| format!("the guest's root has not come to the end: {out:?}"));
    println!("escape: guest root says {out:?}");
    let out = out?.trim().to_owned();
    Ok(out)
}
