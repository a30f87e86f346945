//! The guest's clock is the node's.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::{cri, log};
use bulkhead_e2e::log_watch::LogWatch;
use bulkhead_e2e::{PATIENCE, compat, on_node};
use rustix::time::{ClockId, clock_gettime, clock_settime};

/// By how much the node's clock is set, in seconds.
const STEP: i64 = 600;

/// How long a pod may live in another time than the node.
const FOLLOWED: Duration = Duration::from_secs(1);

/// The node's clock, which goes right again when this is dropped.
struct NodeClock {
    ahead: i64,
}

impl NodeClock {
    fn set(&mut self, seconds: i64) -> Result<()> {
        let mut time = clock_gettime(ClockId::Realtime);
        time.tv_sec += seconds;
        clock_settime(ClockId::Realtime, time).context("cannot set the node's clock")?;
        self.ahead += seconds;
        Ok(())
    }
}

impl Drop for NodeClock {
    fn drop(&mut self) {
        let _ = self.set(-self.ahead);
    }
}

#[test]
fn pod_follows_within_a_second_when_the_nodes_clock_is_set() {
    // A node in namespaces has its machine's clock, which is no test's to set.
    if std::env::var("BULKHEAD_NODE_KIND").as_deref() != Ok("emulated") {
        return;
    }
    on_node(async |node| {
        node.cri.pull(compat::IMAGE).await?;
        let pod = node.pod("clock").await?;
        let config = cri::container_config("main", compat::IMAGE, &["/bin/probe", "steps", "/tmp", "2"]);
        let watch = || LogWatch::new(Path::new(&pod.config.log_directory), &config.log_path);
        let (waits, followed) = (watch()?, watch()?);
        let container = pod.run(config.clone()).await?;
        waits.contains("waiting".to_owned(), PATIENCE).await?;
        let mut clock = NodeClock { ahead: 0 };
        clock.set(STEP)?;
        followed.contains(format!("set by {STEP} s"), PATIENCE).await?;
        clock.set(-STEP)?;
        pod.wait_exit(&container, PATIENCE).await?;
        let told = log::text_of(&pod.log(&container).await?, "stdout");
        println!("{told}");
        for step in [STEP, -STEP] {
            let line = told.lines().find(|line| line.starts_with(&format!("set by {step} s,")));
            let words = line.with_context(|| format!("not set by {step} s: {told}"))?.split(' ');
            let apart: Vec<u64> = words.filter_map(|word| word.parse().ok()).collect();
            let apart = Duration::from_millis(*apart.last().context("no time")?);
            ensure!(apart <= FOLLOWED, "set by {step} s after {apart:?}");
        }
        // Files are of the clock's time, to the grain of a file system's stamps.
        let config = cri::container_config("files", compat::IMAGE, &["/bin/probe", "clock", "/tmp"]);
        let (_, shown) = pod.run_to_end(config).await?;
        ensure!(shown.contains(" 0 newer than the clock"), "{shown}");
        Ok(())
    });
}
