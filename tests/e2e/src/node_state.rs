//! The node as a pod finds it and has to leave it: links, addresses, routes, rules, queueing disciplines, mounts and sysctls,
//! compared both ways. What a pod leaves behind is found by it, and what a pod takes away or changes as well.
//!
//! Not compared is what does not stay the same on a node without pods, or is changed by who makes networks and mounts for any
//! runtime: the bridge of the CNI configuration, which comes with the first pod, with all that is about it; the mount that
//! ip-netns(8) makes of its directory; lifetimes of addresses and routes; and of sysctls those that count or measure
//! ([`CHANGING`]), those of single links, and those that come or go with a module. Neighbours, statistics and connections are
//! none of the list.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// The bridge of the CNI configuration.
const BRIDGE: &str = "cni0";

/// Sysctls that change by themselves.
const CHANGING: [&str; 12] = [
    "fs/aio-nr",
    "fs/dentry-state",
    "fs/file-nr",
    "fs/inode-nr",
    "fs/inode-state",
    "fs/quota/",
    "kernel/ns_last_pid",
    "kernel/perf_event_max_sample_rate",
    "kernel/pty/nr",
    "kernel/random/",
    "kernel/tainted",
    "net/netfilter/nf_conntrack_count",
];

/// What is asked for and how, a program and what it reads.
const QUESTIONS: [(&str, &[&str], &str); 3] = [
    ("ip", &["-o", "-batch", "-"], "link show\naddr show\nroute show table all\nrule show\n"),
    ("ip", &["-6", "-o", "-batch", "-"], "route show table all\nrule show\n"),
    ("tc", &["-batch", "-"], "qdisc show\n"),
];

/// What of a line about a link, an address or a route is not of interest: the rest of it from a word on, or the word alone.
const FROM: [&str; 2] = ["valid_lft", "expires"];
const WORDS: [&str; 2] = ["linkdown", "dadfailed"];

/// Links, addresses, routes, rules, queueing disciplines and mounts, each as often as it is there.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NodeState(BTreeMap<String, usize>);

impl NodeState {
    /// Looks at the node.
    pub fn look() -> Result<Self> {
        let mut seen = Self::default();
        for (program, arguments, questions) in QUESTIONS {
            for line in ask(program, arguments, questions)?.lines() {
                let about_bridge = line.split([' ', ':', '@']).any(|word| word == BRIDGE);
                if !about_bridge && !line.trim().is_empty() {
                    seen.add(format!("{program}: {}", kept(line)));
                }
            }
        }
        let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
        table.lines().filter_map(mount).for_each(|mount| seen.add(mount));
        Ok(seen)
    }

    fn add(&mut self, what: String) {
        *self.0.entry(what).or_default() += 1;
    }

    /// What is different from before.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let more = |one: &Self, other: &Self, how: &str| {
            let more = one.0.iter().filter(|(what, count)| other.0.get(*what).is_none_or(|there| there < count));
            more.map(|(what, _)| format!("{how} {what}")).collect::<Vec<_>>()
        };
        [more(self, before, "has come:"), more(before, self, "has gone:")].concat()
    }
}

fn ask(program: &str, arguments: &[&str], questions: &str) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {program}"))?;
    child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(questions.as_bytes()))?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn kept(line: &str) -> String {
    let words = line.split_whitespace().take_while(|word| !FROM.contains(word));
    words.filter(|word| !WORDS.contains(word)).collect::<Vec<_>>().join(" ")
}

/// A line of the mount table without its numbers.
fn mount(line: &str) -> Option<String> {
    let fields: Vec<_> = line.split(' ').collect();
    let (root, point, options) = (fields.get(3)?, fields.get(4)?, fields.get(5)?);
    let mut rest = fields.iter().skip(6);
    let propagation: Vec<_> =
        rest.by_ref().take_while(|field| **field != "-").filter_map(|tag| tag.split(':').next()).collect();
    let (kind, source) = (rest.next()?, rest.next()?);
    (*point != "/run/netns")
        .then(|| format!("mount {point} ({kind} {source}{root}, {options} {})", propagation.join(" ")))
}

/// Values of the node's sysctls.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sysctls(BTreeMap<String, String>);

impl Sysctls {
    /// Reads them.
    pub fn look() -> Self {
        let mut values = BTreeMap::new();
        read(Path::new("/proc/sys"), "", &mut values);
        Self(values)
    }

    /// Those that are there as before, but with another value.
    pub fn changes_since(&self, before: &Self) -> Vec<String> {
        let of = |(name, now): (&String, &String)| {
            let then = before.0.get(name).filter(|then| *then != now)?;
            Some(format!("sysctl {name} was {then:?} and is {now:?}"))
        };
        self.0.iter().filter_map(of).collect()
    }
}

fn read(directory: &Path, place: &str, values: &mut BTreeMap<String, String>) {
    // A directory for each link, whose values it brings along.
    let of_links =
        matches!(place, "net/ipv4/conf/" | "net/ipv4/neigh/" | "net/ipv6/conf/" | "net/ipv6/neigh/" | "net/mpls/conf/");
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{place}{name}");
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if CHANGING.iter().any(|one| path == *one || format!("{path}/") == *one) {
            continue;
        }
        if !is_directory {
            // Some can only be written.
            if let Ok(value) = fs::read_to_string(entry.path()) {
                values.insert(path, value.trim().to_owned());
            }
        } else if !of_links || matches!(name.as_str(), "all" | "default" | "lo") {
            read(&entry.path(), &format!("{path}/"), values);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_goes_and_changes_is_told() {
        let state = |lines: &[&str]| {
            let mut state = NodeState::default();
            lines.iter().for_each(|line| state.add((*line).to_owned()));
            state
        };
        let (before, after) = (state(&["a", "b", "b"]), state(&["a", "a", "b"]));
        assert_eq!(after.changes_since(&before), ["has come: a", "has gone: b"]);
        assert!(before.changes_since(&before).is_empty());
        let values = |value: &str| Sysctls(BTreeMap::from([("x".to_owned(), value.to_owned())]));
        assert_eq!(values("1").changes_since(&values("0")), ["sysctl x was \"0\" and is \"1\""]);
        assert!(Sysctls(BTreeMap::new()).changes_since(&values("0")).is_empty(), "a module was unloaded");
    }

    #[test]
    fn lifetimes_and_numbers_are_left_out() {
        let line = "2: eth0    inet6 fe80::1/64 scope link dadfailed \\       valid_lft 12sec preferred_lft 1sec";
        assert_eq!(kept(line), "2: eth0 inet6 fe80::1/64 scope link \\");
        let line = "36 35 98:0 /a /mnt rw,noatime shared:7 master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount(line).unwrap(), "mount /mnt (ext3 /dev/root/a, rw,noatime shared master)");
        assert_eq!(mount("36 35 0:1 / /run/netns rw shared:7 - tmpfs tmpfs rw"), None);
    }
}
