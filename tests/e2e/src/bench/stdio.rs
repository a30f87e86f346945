//! Standard streams: what a container writes to its log, and what an exec reads of its client. The time is the container's.

use anyhow::{Result, ensure};

use super::client;
use super::results::{Case, Sample};
use super::stage::{Bench, Depth, Measurement, Side};
use crate::terminal::Terminal;

/// What a client sends at once, as kubectl does.
const CHUNK: usize = 32 << 10;

/// Measures all of it.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    // Counts of a MiB are the same, however many there are.
    let mib = if bench.depth() == Depth::Full { 100 } else { 25 };
    bench.rounds(async |side, _| Ok(vec![log(side, mib).await?])).await?;
    bench.rounds(async |side, _| Ok(vec![exec(side, mib).await?])).await
}

async fn log(side: &mut Side, mib: u32) -> Result<Measurement> {
    let sample = side.order(&format!("say {mib}")).await?;
    // Nobody reads it, and the node keeps it in memory. It is written at its end, wherever that is.
    let log = side.pod.log_path(&side.container).await?;
    std::fs::File::options().write(true).open(&log)?.set_len(0)?;
    Ok((Case::time("stdio/log", "MiB", mib), sample))
}

async fn exec(side: &mut Side, mib: u32) -> Result<Measurement> {
    let bytes = u64::from(mib) << 20;
    // The client's time begins with the first byte.
    let rest = (bytes - 1).to_string();
    let mut terminal = Terminal::exec(&side.pod, &side.container, &["bench", "sink", &rest], false).await?;
    let before = side.counts().await?;
    let chunk = vec![0; CHUNK];
    for _ in 0..bytes / CHUNK as u64 {
        terminal.send_bytes(&chunk).await?;
    }
    let code = terminal.finish().await?;
    let counts = side.since(&before).await?;
    ensure!(code == 0, "the exec ended with {code}: {}", terminal.errors);
    let taken = client::taken(&terminal.output)?;
    let sample = Sample { value: taken.milliseconds, calls: taken.calls, counts };
    Ok((Case::time("stdio/exec -i", "MiB", mib), sample))
}
