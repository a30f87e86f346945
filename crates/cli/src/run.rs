//! `bulkhead run`: one pod, from RunPodSandbox to its removal, with what an operator would look at printed on the way.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::{self, Cri, Pod};
use bulkhead_cli::{log, net};

/// How long the pod's server may take to answer; generous, because test nodes are emulated.
const SERVER_LIMIT: Duration = Duration::from_secs(60);

/// How long the container may take to end after its stop signal before it is killed. Its script only kills a server and says
/// so; generous, because test nodes are emulated, and still less than the 30 s that Kubernetes gives.
const GRACE: Duration = Duration::from_secs(20);

/// The container: names its kernel in the log, serves its boot id, ends with 0 on SIGTERM.
const SCRIPT: &str = r#"
mkdir -p /tmp/www && cp /proc/sys/kernel/random/boot_id /tmp/www/index.html
echo "kernel $(uname -r), boot id $(cat /proc/sys/kernel/random/boot_id)"
busybox httpd -f -p 8080 -h /tmp/www & server=$!
trap 'kill $server; echo stopped; exit 0' TERM
wait $server
"#;

/// How to reach the CRI.
#[derive(clap::Args)]
struct CriArguments {
    /// Socket of the CRI runtime
    #[arg(long, default_value = cri::CONTAINERD_SOCKET)]
    socket: PathBuf,
    /// Runtime handler, as in a RuntimeClass
    #[arg(long, default_value = "bulkhead")]
    handler: String,
}

/// Options of `bulkhead run`.
#[derive(clap::Args)]
pub struct RunArguments {
    #[command(flatten)]
    cri: CriArguments,
    /// Image of the container; needs busybox
    #[arg(long, default_value = "127.0.0.1:5000/busybox:latest")]
    image: String,
}

/// Times the steps of a run.
struct Steps {
    last: Instant,
    rows: Vec<(&'static str, Duration)>,
}

impl Steps {
    fn start() -> Self {
        Self { last: Instant::now(), rows: Vec::new() }
    }

    fn done(&mut self, step: &'static str) {
        let now = Instant::now();
        self.rows.push((step, now - self.last));
        self.last = now;
    }
}

/// Runs the pod and prints what it finds.
pub async fn run(arguments: RunArguments) -> Result<()> {
    let cri = Cri::connect(&arguments.cri.socket).await?;
    let logs = std::env::temp_dir().join(format!("bulkhead-run-{}", std::process::id()));
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let mut steps = Steps::start();
    cri.pull(&arguments.image).await?;
    steps.done("pull the image");
    let pod = cri.run_pod(cri::pod_config("bulkhead-run", &logs), &arguments.cri.handler).await?;
    steps.done("RunPodSandbox");
    let shown = show(&pod, &arguments.image, &mut steps).await;
    let removed = pod.remove().await;
    steps.done("stop and remove the pod");
    let _ = fs::remove_dir_all(&logs);
    shown?;
    removed?;
    println!("\n{:<28}{:>10}", "step", "ms");
    for (step, time) in steps.rows {
        println!("{step:<28}{:>10}", time.as_millis());
    }
    Ok(())
}

async fn show(pod: &Pod, image: &str, steps: &mut Steps) -> Result<()> {
    let container = pod.create(cri::container_config("main", image, &["/bin/sh", "-c", SCRIPT])).await?;
    steps.done("CreateContainer");
    pod.start(&container).await?;
    steps.done("StartContainer");
    let addresses = pod.addresses().await?;
    let address: IpAddr = addresses
        .first()
        .and_then(|ip| ip.parse().ok())
        .context("the pod has no address: has the CNI configuration been installed?")?;
    let pong = net::ping(address).await?;
    steps.done("ping");
    let served = net::http_get(address, 8080, "/", SERVER_LIMIT).await?;
    steps.done("HTTP request");
    let release = pod.exec(&container, &["uname", "-r"]).await?;
    steps.done("exec");
    pod.stop(&container, GRACE).await?;
    let end = pod.wait_exit(&container, GRACE).await?;
    steps.done("StopContainer");
    let lines = pod.log(&container).await?;

    let boot_id = |text: &str| text.trim().to_owned();
    let host_boot_id = boot_id(&read("/proc/sys/kernel/random/boot_id")?);
    let pod_boot_id = boot_id(&served);
    println!("{:<12}{:<40}pod", "", "host");
    println!("{:<12}{:<40}{}", "uname -r", read("/proc/sys/kernel/osrelease")?.trim(), release.stdout.trim());
    println!("{:<12}{host_boot_id:<40}{pod_boot_id}", "boot id");
    println!("{:<12}{:<40}{}", "address", "", addresses.join(", "));
    println!("{:<12}{pong}", "ping");
    println!("{:<12}GET http://{address}:8080/ -> {}", "http", served.trim());
    for line in log::text_of(&lines, "stdout").lines() {
        println!("{:<12}{line}", "log");
    }
    println!("{:<12}{}", "exit code", end.exit_code);
    ensure!(pod_boot_id != host_boot_id, "the pod runs on the host's kernel: the handler is not Bulkhead's");
    ensure!(end.exit_code == 0, "the container ended with {}: {}", end.exit_code, end.message);
    Ok(())
}

fn read(path: impl AsRef<Path>) -> Result<String> {
    fs::read_to_string(path.as_ref()).with_context(|| format!("cannot read {}", path.as_ref().display()))
}
