//! `make bench`: what pods on Bulkhead cost beside pods on runc, see [`bulkhead_e2e::bench`].
//!
//!     bulkhead-bench [--counts] [--json FILE] [--revision NAME] [GROUP]...
//!
//! Runs the groups, or all of them: start, files, tools, network, stdio. `--counts` counts only, and takes a few minutes.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bulkhead_e2e::bench::{self, Depth, Results, Scratch};
use bulkhead_e2e::with_node;

struct Arguments {
    depth: Depth,
    json: Option<PathBuf>,
    revision: String,
    groups: Vec<String>,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments> {
    let mut arguments =
        Arguments { depth: Depth::Full, json: None, revision: "unknown".to_owned(), groups: Vec::new() };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--counts" => arguments.depth = Depth::Counts,
            "--json" => arguments.json = Some(words.next().context("--json needs a file")?.into()),
            "--revision" => arguments.revision = words.next().context("--revision needs a name")?,
            option if option.starts_with('-') => bail!("there is no option {option}"),
            _ => arguments.groups.push(word),
        }
    }
    Ok(arguments)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let Arguments { depth, json, revision, groups } = parse(std::env::args().skip(1))?;
    // Before the node is looked at, and what pods leave of it compared.
    bench::mount_debugfs()?;
    // Removed after the pods, which have it mounted.
    let scratch = Scratch::new()?;
    let mut results = Results::default();
    with_node(async |node| {
        results = bench::run(node, &scratch, depth, &groups).await?;
        Ok(())
    })
    .await?;
    println!("\n{}", bench::table(&results));
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&bench::as_json(&results, &revision, depth))? + "\n";
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("bench: all figures are in {}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_understood_or_refused() {
        let parsed = |text: &str| parse(text.split_whitespace().map(str::to_owned));
        let arguments = parsed("--counts --json build/bench.json --revision abc files network").unwrap();
        assert_eq!((arguments.depth, arguments.revision.as_str()), (Depth::Counts, "abc"));
        assert_eq!(arguments.json, Some("build/bench.json".into()));
        assert_eq!(arguments.groups, ["files", "network"]);
        assert!(parsed("--json").is_err() && parsed("--quick").is_err());
    }
}
