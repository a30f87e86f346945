//! What people run: Python, find and cat in a container that has just been made, the first time and the second.

use std::time::Duration;

use anyhow::Result;

use super::results::{Case, Sample};
use super::stage::{Bench, Measurement, PORT, Side};

/// Commands by the name that their cases have.
const COMMANDS: [(&str, &str); 3] = [
    (
        "python imports",
        "python3 -c 'import json, re, argparse, subprocess, unittest, xml.dom.minidom, email.message, http.client, \
         logging.config, decimal, urllib.request, asyncio, sqlite3'",
    ),
    ("find /usr", "find /usr"),
    ("cat /usr/bin/*", "cat /usr/bin/*"),
];

/// Measures all of it.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    bench.rounds(async |side, number| one_round(side, number).await).await
}

/// A new container, whose root file system the guest has not seen: each command twice.
async fn one_round(side: &mut Side, number: usize) -> Result<Vec<Measurement>> {
    // Two ports for a client.
    let port = PORT + 2 + 2 * u16::try_from(number)?;
    let (container, mut client) = side.attend(&format!("tools-{number}"), port).await?;
    let mut measured = Vec::new();
    for (name, command) in COMMANDS {
        for time in ["first", "second"] {
            let before = side.counts().await?;
            let taken = client.order(&format!("run {command}")).await?;
            let counts = side.since(&before).await?;
            let sample = Sample { value: taken.milliseconds, calls: 0, counts };
            measured.push((Case::time(format!("tools/{name}/{time} time"), "run", 1), sample));
        }
    }
    drop(client);
    side.pod.stop(&container, Duration::ZERO).await?;
    side.pod.remove_container(&container).await?;
    Ok(measured)
}
