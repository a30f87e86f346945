//! Bad set-ups are refused with one sentence that names cause and remedy, and leave nothing behind (the fixture checks).

use std::fs;

use anyhow::{Context, Result, ensure};
use bulkhead_cli::cri::v1;
use bulkhead_e2e::{Node, node_command, on_node};

/// The operator's configuration in the node.
const CONFIG: &str = "/etc/bulkhead/config.toml";

/// Changes the configuration for the time of one refused pod.
async fn refused_with_config(node: &Node, name: &str, change: impl FnOnce(&str) -> String) -> Result<String> {
    let good = fs::read_to_string(CONFIG).with_context(|| format!("cannot read {CONFIG}"))?;
    fs::write(CONFIG, change(&good)).with_context(|| format!("cannot write {CONFIG}"))?;
    let message = node.refused_pod(name, |_| {}).await;
    fs::write(CONFIG, good).with_context(|| format!("cannot restore {CONFIG}"))?;
    message
}

fn names(message: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(message.contains(word), "{message:?} does not name {word:?}");
    }
    Ok(())
}

fn namespaces(config: &mut v1::PodSandboxConfig) -> &mut v1::NamespaceOption {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().namespace_options.get_or_insert_default()
}

#[test]
fn host_network_is_refused() {
    on_node(async |node| {
        let host = |config: &mut v1::PodSandboxConfig| namespaces(config).network = v1::NamespaceMode::Node.into();
        let message = node.refused_pod("host-network", host).await?;
        names(&message, &["hostNetwork", "runc"])
    });
}

#[test]
fn host_ipc_is_refused() {
    on_node(async |node| {
        let host = |config: &mut v1::PodSandboxConfig| namespaces(config).ipc = v1::NamespaceMode::Node.into();
        let message = node.refused_pod("host-ipc", host).await?;
        names(&message, &["hostIPC", "runc"])
    });
}

#[test]
fn missing_guest_kernel_is_named() {
    on_node(async |node| {
        let message =
            refused_with_config(node, "no-kernel", |good| replace(good, "kernel", "/no/such/vmlinux")).await?;
        names(&message, &["/no/such/vmlinux", "kernel"])
    });
}

#[test]
fn kernel_that_is_no_kernel_is_named() {
    on_node(async |node| {
        let message = refused_with_config(node, "bad-kernel", |good| replace(good, "kernel", "/etc/hostname")).await?;
        names(&message, &["kernel", "ELF"])
    });
}

#[test]
fn unreadable_config_is_named() {
    on_node(async |node| {
        let message = refused_with_config(node, "bad-config", |_| "kernel = [".to_owned()).await?;
        names(&message, &[CONFIG])
    });
}

#[test]
fn unknown_config_key_is_named() {
    on_node(async |node| {
        let message = refused_with_config(node, "odd-config", |good| format!("colour = \"red\"\n{good}")).await?;
        names(&message, &[CONFIG, "colour"])
    });
}

#[test]
fn malformed_annotation_is_named() {
    on_node(async |node| {
        let message = node
            .refused_pod("bad-annotation", |config| {
                config.annotations.insert("io.bulkhead.vcpus".into(), "many".into());
            })
            .await?;
        names(&message, &["io.bulkhead.vcpus", "many"])
    });
}

#[test]
fn missing_kvm_is_named() {
    on_node(async |node| {
        // What a machine without virtualization looks like: the device is there and cannot be used, or is not there.
        node_command("mv", &["/dev/kvm", "/dev/kvm-away"])?;
        let message = node.refused_pod("no-kvm", |_| {}).await;
        node_command("mv", &["/dev/kvm-away", "/dev/kvm"])?;
        names(&message?, &["/dev/kvm"])
    });
}

/// The configuration with one key's value changed.
fn replace(config: &str, key: &str, value: &str) -> String {
    let line = format!("{key} = {value:?}");
    let is_key = |text: &str| text.split('=').next().is_some_and(|name| name.trim() == key);
    let mut lines: Vec<&str> = config.lines().filter(|text| !is_key(text)).collect();
    lines.insert(0, &line);
    lines.join("\n") + "\n"
}
