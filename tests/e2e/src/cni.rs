//! Networks beside the node's own: CNI plugins run by hand, as a container runtime runs them (CNI specification 1.0), and
//! a container in a guest of its own in the namespace that they made.

use std::io::Write;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{BUSYBOX, node_command};

const PLUGINS: &str = "/usr/lib/cni";
const RUNTIME: &str = "io.containerd.bulkhead.v2";

/// A network namespace; gone with the value, and with it what CNI or a test has put into it.
pub struct Netns {
    name: String,
    /// Plugin configurations that were added, with the interface and what they came to, to be deleted again.
    added: Vec<(Value, String, Value)>,
}

impl Netns {
    /// Makes a namespace with loopback up.
    pub fn new(name: &str) -> Result<Self> {
        ip(&format!("netns add {name}"))?;
        let netns = Self { name: name.to_owned(), added: Vec::new() };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its path.
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// Runs ip(8) in it.
    pub fn ip(&self, line: &str) -> Result<String> {
        ip(&format!("-n {} {line}", self.name))
    }

    /// Adds an interface by a chain of plugins; returns the last one's result.
    pub fn add(&mut self, interface: &str, network: &str, chain: Vec<Value>) -> Result<Value> {
        let mut result = Value::Null;
        for mut plugin in chain {
            plugin["cniVersion"] = json!("1.0.0");
            plugin["name"] = json!(network);
            let mut config = plugin.clone();
            if !result.is_null() {
                config["prevResult"] = result;
            }
            result = self.plugin("ADD", interface, &config)?;
            self.added.push((plugin, interface.to_owned(), result.clone()));
        }
        Ok(result)
    }

    fn plugin(&self, command: &str, interface: &str, config: &Value) -> Result<Value> {
        let kind = config["type"].as_str().context("a plugin without a type")?;
        let mut child = Command::new(format!("{PLUGINS}/{kind}"))
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", self.path())
            .env("CNI_IFNAME", interface)
            .env("CNI_PATH", PLUGINS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run the CNI plugin {kind}"))?;
        child.stdin.take().context("no stdin")?.write_all(config.to_string().as_bytes())?;
        let output = child.wait_with_output()?;
        let answer = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "CNI plugin {kind} {command} failed: {answer}");
        if answer.trim().is_empty() { Ok(Value::Null) } else { Ok(serde_json::from_str(&answer)?) }
    }

    /// Has the plugins check what they have added.
    pub fn check(&self) -> Result<()> {
        for (config, interface, result) in &self.added {
            let mut config = config.clone();
            config["prevResult"] = result.clone();
            self.plugin("CHECK", interface, &config)?;
        }
        Ok(())
    }

    /// Deletes what the plugins have added, the last first.
    pub fn delete(&mut self) -> Result<()> {
        while let Some((mut config, interface, result)) = self.added.pop() {
            config["prevResult"] = result;
            self.plugin("DEL", &interface, &config)?;
        }
        Ok(())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = self.delete();
        let _ = ip(&format!("netns del {}", self.name));
    }
}

/// The plugin that gives addresses of a subnet, for the `ipam` of another.
pub fn host_local(subnets: &[&str]) -> Value {
    let ranges: Vec<_> = subnets.iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
    let routes: Vec<_> = subnets
        .iter()
        .map(|subnet| json!({ "dst": if subnet.contains(':') { "::/0" } else { "0.0.0.0/0" } }))
        .collect();
    json!({ "type": "host-local", "dataDir": "/run/node/cni/networks", "ranges": ranges, "routes": routes })
}

/// Runs ip(8) on the node.
pub fn ip(line: &str) -> Result<String> {
    node_command("ip", &line.split(' ').collect::<Vec<_>>())
}

/// A container in a guest of its own, with nothing but a namespace around it; gone with the value.
pub struct Guest {
    name: String,
    execs: std::cell::Cell<u32>,
}

impl Guest {
    /// Starts one that stays.
    pub fn start(name: &str, netns: &Netns) -> Result<Self> {
        Self::start_with(name, netns, &[])
    }

    /// Starts one that stays and has the node's ip(8), by [`Self::ip`].
    pub fn start_with_ip(name: &str, netns: &Netns) -> Result<Self> {
        Self::start_with(name, netns, &["--mount", "type=bind,src=/usr,dst=/node,options=bind:ro"])
    }

    fn start_with(name: &str, netns: &Netns, options: &[&str]) -> Result<Self> {
        let namespace = format!("network:{}", netns.path());
        let stay = "while :; do sleep 3600; done";
        let before = ["run", "-d", "--with-ns", &namespace, "--runtime", RUNTIME];
        ctr(&[&before[..], options, &[BUSYBOX, name, "/bin/sh", "-c", stay]].concat())?;
        Ok(Self { name: name.to_owned(), execs: std::cell::Cell::new(0) })
    }

    /// Executes a shell script; it must succeed. Returns its standard output, trimmed.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.sh_as("0", script)
    }

    /// The same as another user.
    pub fn sh_as(&self, user: &str, script: &str) -> Result<String> {
        self.execs.set(self.execs.get() + 1);
        let id = format!("exec-{}", self.execs.get());
        let shell = [&self.name, "/bin/sh", "-c", script];
        let exec = [["task", "exec", "--exec-id", &id, "--user", user].as_slice(), &shell].concat();
        Ok(ctr(&exec)?.trim().to_owned())
    }

    /// Runs ip(8) of the node in it, several times.
    pub fn ip(&self, lines: &[&str]) -> Result<String> {
        let lib = "/node/lib/x86_64-linux-gnu";
        let ip = format!("{lib}/ld-linux-x86-64.so.2 --library-path {lib} /node/bin/ip");
        let script: Vec<String> = lines.iter().map(|line| format!("{ip} {line}")).collect();
        self.sh(&script.join(" && "))
    }

    /// Ends and removes it.
    pub fn remove(&self) -> Result<()> {
        ctr(&["task", "rm", "--force", &self.name])?;
        ctr(&["container", "rm", &self.name]).map(drop)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // A test that has come to its end has removed it itself.
        let _ = self.remove();
    }
}

fn ctr(arguments: &[&str]) -> Result<String> {
    node_command("ctr", &[&["-n", "k8s.io"], arguments].concat())
}

/// A counter of an interface, as sysfs has it.
pub fn counter(interface: &str, name: &str) -> Result<u64> {
    let path = format!("/sys/class/net/{interface}/statistics/{name}");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(text.trim().parse()?)
}

/// The host's end of the veth pair of which a plugin's result tells.
pub fn host_end(result: &Value) -> Result<String> {
    let interfaces = result["interfaces"].as_array().context("the result has no interfaces")?;
    let outside = interfaces.iter().filter(|interface| interface["sandbox"].as_str().unwrap_or_default().is_empty());
    let Some(name) = outside.filter_map(|interface| interface["name"].as_str()).find(|name| name.starts_with("veth"))
    else {
        bail!("no veth in {result}");
    };
    Ok(name.to_owned())
}

/// The addresses of a plugin's result, without prefix lengths.
pub fn addresses(result: &Value) -> Result<Vec<String>> {
    let ips = result["ips"].as_array().context("the result has no addresses")?;
    let address = |ip: &Value| Some(ip["address"].as_str()?.split('/').next()?.to_owned());
    ips.iter().map(|ip| address(ip).context("an address that is none")).collect()
}
